"""The project's own build, step and save of one training stage, as one rank on a simulated GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.config import Recipe, TrainerConfig
from megatron_opd.errors import UserError
from megatron_opd.gpus import GPUS, Gpu
from megatron_opd.simulate import gpu as simulated  # before torch
from megatron_opd.simulate.devices import GIB

import torch  # isort: skip

REST_BYTES = 3 * GIB  # CUDA context, cuBLAS and NCCL buffers: what estimate/memory.py adds, an assumption
PROMPT_TOKENS = 256  # of each sequence, where nobody says otherwise: estimate/workload.py's
_LONGEST_SFT = 16384  # tokens of a sequence of sft where the recipe does not cut them


@dataclass(frozen=True)
class Message:
    """One collective operation of a step: calls and bytes (the whole buffer) of one rank."""

    operation: str
    group: str
    ranks: int
    calls: int
    bytes: int
    spans_nodes: bool


@dataclass(frozen=True)
class Simulation:
    """What one rank holds, waits for, copies, computes and sends. Bytes, FLOPs and counts; those of a step are of the last one."""

    recipe: str
    stage: str
    ranks: int
    rank: int
    layers: int
    layout: dict[str, int]
    gpu: str
    gpu_bytes: int
    rest_bytes: int
    lengths: list[int]
    micro_batches: int
    steps: int
    parameters: int
    peak_bytes: int
    peak_phase: str
    peaks: dict[str, int]  # 'build', 'step', 'save' where it was asked for: bytes on the GPU
    host_peaks: dict[str, int]  # the same, of tensors in the host's memory
    by_place: list[tuple[str, int]]
    flops: float
    messages: list[Message]
    waits: dict[str, int]
    copies: dict[str, int]
    calls: dict[str, int]  # of Transformer Engine's compiled functions
    runs_out: dict[str, Any] | None  # phase, bytes and place where the GPU would have run out; None if it would not
    stood_in_for: list[str]
    versions: dict[str, str]
    seconds: float

    @property
    def blocking_copies(self) -> dict[str, int]:
        return {what: count for what, count in self.copies.items() if "BLOCKING" in what}

    @property
    def pageable_copies(self) -> dict[str, int]:
        return {what: count for what, count in self.copies.items() if "pageable" in what}

    def to_json(self) -> dict[str, Any]:
        """For json.dump; `from_json` reads it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Simulation:
        messages = [Message(**message) for message in tree["messages"]]
        places = [(place, size) for place, size in tree["by_place"]]
        return Simulation(**(tree | {"messages": messages, "by_place": places}))


def simulate_stage(
    recipe: Recipe,
    stage: str,
    *,
    ranks: int,
    rank: int = 0,
    layers: int | None = None,
    micro_batches: int = 2,
    lengths: Sequence[int] | None = None,
    steps: int = 2,
    with_save: bool = False,
    gpu: Gpu | None = None,
    settings: dict[str, Any] | None = None,
    top: int = 24,
) -> Simulation:
    """Build the student and take `steps` optimizer steps of `micro_batches` each; in a process that imported simulate.gpu before torch.

    layers: fewer than the student has, to be quick. lengths: tokens of the sequences of every micro-batch (default: as long as the recipe
    allows). settings: fields of Megatron-Core's TransformerConfig to change. top: places in `by_place`.
    Raises UserError for a student whose sizes are not known, and what building it raises.
    """
    from megatron_opd.simulate.stand_ins import stand_ins

    config: TrainerConfig = getattr(recipe, stage)
    config.check_ranks(stage, ranks)
    gpu = gpu or GPUS["h100"]
    arch = _architecture(recipe, layers)
    lengths = list(lengths) if lengths is not None else default_lengths(stage, config)
    started = time.monotonic()
    limit = int(gpu.memory_gib * GIB) - REST_BYTES
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(simulated.world(rank=rank, size=ranks, gpu=gpu, limit=limit))
        names = stack.enter_context(stand_ins(ledger, arch, config, lengths))
        stack.enter_context(_determinism_kept())
        calls = _calls()
        calls.clear()
        trainee, parameters = _build(ledger, arch, config, settings or {})
        _steps(ledger, trainee, arch, config, stage, lengths, micro_batches=micro_batches, steps=steps)
        step_phase = ledger.phase
        counted = {
            "flops": ledger.flops,
            "waits": dict(ledger.waits.most_common()),
            "copies": dict(ledger.copies.most_common()),
            "messages": _messages(ledger),
            "calls": dict(calls),
        }
        if with_save:
            _save(ledger, trainee, recipe, config)
        uses_te = bool(calls)
        del trainee
    if not uses_te:
        names.append("Transformer Engine is not used: Megatron-Core's local layers")
    else:
        names.append("Transformer Engine's compiled half: shapes and dtypes of results, no numbers")
    return Simulation(
        recipe=recipe.name,
        stage=stage,
        ranks=ranks,
        rank=rank,
        layers=arch.num_layers,
        layout=_layout(config, ranks),
        gpu=gpu.name,
        gpu_bytes=int(gpu.memory_gib * GIB),
        rest_bytes=REST_BYTES,
        lengths=lengths,
        micro_batches=micro_batches,
        steps=steps,
        parameters=parameters,
        peak_bytes=ledger.peak,
        peak_phase=ledger.peak_phase,
        peaks=_by_part(ledger.peaks, step_phase),
        host_peaks=_by_part(ledger.host_peaks, step_phase),
        by_place=ledger.by_place(top),
        runs_out=None if ledger.overrun is None else dict(zip(("phase", "bytes", "place"), ledger.overrun, strict=True)),
        stood_in_for=names,
        versions=_versions(uses_te),
        seconds=round(time.monotonic() - started, 2),
        **counted,
    )


def default_lengths(stage: str, config: TrainerConfig) -> list[int]:
    """A full micro-batch of the longest sequences that the recipe allows, and a last one that fills it."""
    longest = config.max_response_tokens + PROMPT_TOKENS if config.max_response_tokens else _LONGEST_SFT
    budget = config.micro_batch_tokens // config.token_multiple * config.token_multiple
    longest = min(longest, budget) // config.token_multiple * config.token_multiple
    lengths = [longest] * (budget // longest)
    return lengths + ([rest] if (rest := budget - sum(lengths)) else [])


def _architecture(recipe: Recipe, layers: int | None) -> Any:
    from megatron_opd.estimate.workload import find_model

    model = find_model(recipe.models.student)
    if model.arch is None:
        raise UserError(f"models.student: {model.source}")
    return model.arch if layers is None else dataclasses.replace(model.arch, num_layers=layers)


def _layout(config: TrainerConfig, ranks: int) -> dict[str, int]:
    parallel = config.parallel
    sizes = {name: getattr(parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep")}
    return sizes | {"dp": ranks // (parallel.tp * parallel.pp * parallel.cp)}


@contextlib.contextmanager
def _determinism_kept() -> Iterator[None]:
    """What `make_deterministic` sets for the whole process is undone."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _build(ledger: Any, arch: Any, config: TrainerConfig, settings: dict[str, Any]) -> tuple[Any, int]:
    """The trainee, as train/loop.py makes it, but for the weights; and this rank's parameters."""
    from megatron_opd.model import parallel
    from megatron_opd.model.student import build_chunks, transformer_config
    from megatron_opd.train.optim import make_trainee

    if config.deterministic:
        parallel.make_deterministic()
    device = parallel.start(config.parallel, seed=config.seed)
    ledger.phase = "parameters"
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    model_config = transformer_config(
        arch,
        parallel=config.parallel,
        dtype=dtype,
        recompute=config.recompute,
        recompute_modules=config.recompute_modules,
        fp8=config.fp8,
        deterministic=config.deterministic,
    )
    for name, value in settings.items():
        if not hasattr(model_config, name):
            raise UserError(f"Megatron-Core's TransformerConfig has no field {name!r}")
        setattr(model_config, name, value)
    students = build_chunks(arch, model_config)
    for student in students:
        student.to(device)
    ledger.phase = "wrapper and optimizer"
    trainee = make_trainee(students, config, steps=config.steps or 1)
    return trainee, sum(parameter.numel() for student in students for parameter in student.parameters())


def _steps(
    ledger: Any, trainee: Any, arch: Any, config: TrainerConfig, stage: str, lengths: list[int], *, micro_batches: int, steps: int
) -> None:
    from megatron_opd.train.loss import make_loss, sft_loss
    from megatron_opd.train.step import train_step

    loss = sft_loss if stage == "sft" else make_loss(config.loss)  # pyright: ignore[reportAttributeAccessIssue]
    device = torch.device("cuda", torch.cuda.current_device())
    for number in range(steps):
        ledger.start_step(f"step {number}")
        batches = [_micro_batch(config, stage, lengths).to(device) for _ in range(micro_batches)]
        train_step(trainee, arch, loss, batches, seed=config.seed, chunk_tokens=config.chunk_tokens)


def _micro_batch(config: TrainerConfig, stage: str, lengths: list[int]) -> Any:
    """One, as train/batches.py makes it, in the host's memory."""
    from megatron_opd.train.batches import MicroBatch

    cp = config.parallel.cp
    num_tokens = sum(lengths)
    num_rows = sum(max(1, length - PROMPT_TOKENS) for length in lengths) // cp
    ints = functools.partial(torch.zeros, dtype=torch.int64)
    floats = functools.partial(torch.zeros, dtype=torch.float32)
    distils = stage == "train"
    return MicroBatch(
        tokens=ints(1, num_tokens // cp),
        positions=ints(1, num_tokens // cp),
        cu_seqlens=torch.zeros(len(lengths) + 1, dtype=torch.int32),
        rows=ints(num_rows),
        labels=ints(num_rows),
        response_positions=ints(num_rows),
        weights=floats(num_rows),
        student_logp=floats(num_rows),
        teacher_logp=floats(num_rows) if distils else None,
        topk_ids=None,
        topk_logp=None,
        overlap_ids=None,
        denominator=num_rows,
        max_seqlen=max(lengths),
        num_sequences=len(lengths),
        num_tokens=num_tokens,
        sum_squared_lengths=sum(length * length for length in lengths),
    )


class _Saved(BaseException):
    """Ends a save where Megatron-Core would begin to write files: there are no numbers to write."""


def _save(ledger: Any, trainee: Any, recipe: Recipe, config: TrainerConfig) -> None:
    """The state of a checkpoint as train/checkpoint.py makes it, and the copies to the host of what this rank would write."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
    from torch.utils._pytree import tree_leaves

    from megatron_opd.records import Lineage
    from megatron_opd.train.checkpoint import CheckpointWriter

    ledger.start_step("save")

    def save(sharded_state_dict: Any, *args: Any, **kwargs: Any) -> None:
        written = [leaf for leaf in tree_leaves(sharded_state_dict) if isinstance(leaf, ShardedTensor)]
        copies = [
            leaf.data.to("cpu") for leaf in written if leaf.data is not None and leaf.data.is_cuda and is_main_replica(leaf.replica_id)
        ]
        del copies
        raise _Saved

    with tempfile.TemporaryDirectory() as folder, simulated.replaced(dist_checkpointing, "save", save), contextlib.suppress(_Saved):
        writer = CheckpointWriter(Path(folder), recipe.models.student, Lineage(), asynchronous=False)
        writer.save(trainee, {"step": 1})


def _calls() -> Any:
    from megatron_opd.simulate.transformer_engine import CALLS

    return CALLS


def _messages(ledger: Any) -> list[Message]:
    found = []
    for what, (count, size) in ledger.comm.items():
        operation, _, where = what.partition(" over ")
        group = ledger.messages.groups[where.rpartition(" (")[0]]
        found.append(Message(operation, group.kind, group.ranks, count, size, group.spans_nodes))
    return sorted(found, key=lambda message: -message.bytes)


def _by_part(peaks: dict[str, int], step_phase: str) -> dict[str, int]:
    """Peaks while building, in the last step and in a save."""
    parts = {"build": max(peaks.get(phase, 0) for phase in ("parameters", "wrapper and optimizer")), "step": peaks.get(step_phase, 0)}
    return parts | ({"save": peaks["save"]} if "save" in peaks else {})


def _versions(uses_te: bool) -> dict[str, str]:
    import megatron.core

    found = {"python": platform.python_version(), "torch": torch.__version__, "megatron-core": megatron.core.package_info.__shortversion__}
    if uses_te:
        found["transformer-engine"] = importlib.metadata.version("transformer-engine")
    return found
