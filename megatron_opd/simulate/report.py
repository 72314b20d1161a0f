"""A simulation in words."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_opd.simulate.devices import GIB
from megatron_opd.simulate.result import Message, Simulation


def describe(found: Simulation, *, places: int = 12) -> Iterator[str]:
    """Lines for people: memory with its largest places, arithmetic, messages, waits and copies, whether it fits."""
    layout = ", ".join(f"{name} {size}" for name, size in found.layout.items() if size > 1) or "one GPU"
    yield (
        f"{found.recipe}, {found.stage}: rank {found.rank} of {found.ranks} ({layout}) on a simulated {found.gpu}, {found.layers} layers, "
        f"{found.parameters:,} parameters on this rank"
    )
    yield f"  {found.micro_batches} micro-batches a step, of sequences of {', '.join(map(str, found.lengths))} tokens; {found.seconds:.0f} s to simulate"
    yield f"  memory of tensors on the GPU: {_parts(found.peaks)}; most in {found.peak_phase!r}, {_gib(found.peak_bytes)}:"
    yield from (f"    {_gib(size):>10}  {place}" for place, size in found.by_place[:places])
    if rest := sum(size for _, size in found.by_place[places:]):
        yield f"    {_gib(rest):>10}  other places"
    yield f"  memory of tensors on the host: {_parts(found.host_peaks)}"
    yield f"  arithmetic of a step: {found.flops / 1e12:.1f} TFLOP (matrix products and attention)"
    yield f"  messages of a step: {sum(message.calls for message in found.messages)}"
    yield from (f"    {_message(message)}" for message in found.messages)
    yield f"  the host waits for the GPU {_times(sum(found.waits.values()))} a step"
    yield from (f"    {count} x {what}" for what, count in found.waits.items())
    blocking, pageable = found.blocking_copies, found.pageable_copies
    pinned = sum(found.copies.values()) - sum(blocking.values()) - sum(pageable.values())
    yield (
        f"  copies between host and GPU in a step: {sum(blocking.values())} blocking, {sum(pageable.values())} from or to pageable memory, "
        f"{pinned} from pinned memory"
    )
    yield from (f"    {count} x {what}" for what, count in (blocking | pageable).items())
    yield _fit(found)


def provenance(found: Simulation) -> Iterator[str]:
    """What was not real, and whose code ran."""
    yield "stood in for:"
    yield from (f"  {what}" for what in found.stood_in_for)
    yield f"real: {', '.join(f'{name} {version}' for name, version in found.versions.items())}, and this project's code"


def _fit(found: Simulation) -> str:
    room = found.gpu_bytes - found.rest_bytes
    of = f"{room / GIB:.1f} GiB ({found.gpu_bytes / GIB:.0f} less {found.rest_bytes / GIB:.0f} for CUDA, cuBLAS and NCCL, an assumption)"
    if found.runs_out is None:
        return f"  fits: {found.peak_bytes / GIB:.1f} of {of}"
    out = found.runs_out
    return f"  RUNS OUT: {out['bytes'] / GIB:.1f} of {of} in {out['phase']!r}, at {out['place']}"


def _message(message: Message) -> str:
    nodes = ", over several nodes" if message.spans_nodes else ""
    return f"{message.operation} over {message.group} ({message.ranks} ranks{nodes}): {message.calls} calls, {_gib(message.bytes)}"


def _parts(peaks: dict[str, int]) -> str:
    words = {"build": "while building", "step": "in a step", "save": "in a save"}
    return ", ".join(f"{_gib(size)} {words[name]}" for name, size in peaks.items())


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
