"""A simulation in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_opd.simulate.devices import GIB

if TYPE_CHECKING:
    from megatron_opd.simulate.stage import Simulation


def describe(simulation: Simulation, *, places: int = 12) -> Iterator[str]:
    """Lines for people."""
    s = simulation
    layout = ", ".join(f"{name} {size}" for name, size in s.layout.items() if size > 1) or "one GPU"
    yield f"{s.recipe}, {s.stage}: rank {s.rank} of {s.ranks} ({layout}) on a simulated {s.gpu}, {s.layers} layers, {s.parameters:,} parameters"
    yield f"  {s.micro_batches} micro-batches a step, sequences of {', '.join(map(str, s.lengths))} tokens; {s.seconds:.0f} s to simulate"
    yield f"  memory of tensors on the GPU: {_parts(s.peaks)}; at most {s.peak_bytes / GIB:.1f} GiB in {s.peak_phase!r}"
    yield f"  memory of tensors on the host: {_parts(s.host_peaks)}"
    for place, size in s.by_place[:places]:
        yield f"    {size / GIB:7.2f} GiB  {place}"
    yield f"  arithmetic: {s.flops / 1e12:.1f} TFLOP a step"
    for message in s.messages:
        nodes = ", over several nodes" if message.spans_nodes else ""
        yield f"    {message.operation} over {message.group} ({message.ranks} ranks{nodes}): {message.calls} calls, {message.bytes / GIB:.2f} GiB"
    yield f"  the host waits {sum(s.waits.values())} times a step"
    yield from (f"    x{count} {what}" for what, count in s.waits.items())
    yield f"  copies between host and GPU: {sum(s.blocking_copies.values())} blocking, {sum(s.pageable_copies.values())} from pageable memory"
    yield from (f"    x{count} {what}" for what, count in s.copies.items())
    room = (s.gpu_bytes - s.rest_bytes) / GIB
    if s.runs_out is None:
        yield f"  fits: {s.peak_bytes / GIB:.1f} of {room:.1f} GiB ({s.gpu_bytes / GIB:.0f} less {s.rest_bytes / GIB:.0f} for CUDA, cuBLAS and NCCL)"
    else:
        yield f"  RUNS OUT of {room:.1f} GiB in {s.runs_out['phase']!r}, at {s.runs_out['place']}"
    yield from (f"  stood in for: {what}" for what in s.stood_in_for)
    yield f"  versions: {', '.join(f'{name} {version}' for name, version in s.versions.items())}"


def _parts(peaks: dict[str, int]) -> str:
    return ", ".join(f"{size / GIB:.1f} GiB in {name}" for name, size in peaks.items())
