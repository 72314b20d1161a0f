"""The project's own build, step and save of one training stage, as one rank on a simulated GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_opd.cost.gpus import GPUS, Gpu
from megatron_opd.errors import UserError
from megatron_opd.estimate.memory import FIXED_BYTES
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.simulate import gpu as simulated  # before torch
from megatron_opd.simulate.devices import GIB
from megatron_opd.simulate.result import Message, Simulation

import torch  # isort: skip


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
    lengths = list(lengths) if lengths is not None else default_lengths(recipe, stage)
    started = time.monotonic()
    limit = int(gpu.memory_gib * GIB) - FIXED_BYTES
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(simulated.world(rank=rank, size=ranks, gpu=gpu, limit=limit))
        names = stack.enter_context(stand_ins(ledger, arch, config, lengths))
        stack.enter_context(_determinism_kept())
        calls = _calls()
        calls.clear()
        trainee, parameters = _build(ledger, arch, config, settings or {})
        _steps(ledger, trainee, arch, recipe, stage, lengths, micro_batches=micro_batches, steps=steps)
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
    names.append(
        "Transformer Engine's compiled half gives shapes and dtypes of results"
        if uses_te
        else "Transformer Engine is not used: Megatron-Core's local layers"
    )
    return Simulation(
        recipe=recipe.name,
        stage=stage,
        ranks=ranks,
        rank=rank,
        layers=arch.num_layers,
        layout=_layout(config, ranks),
        gpu=gpu.name,
        gpu_bytes=int(gpu.memory_gib * GIB),
        rest_bytes=FIXED_BYTES,
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


def default_lengths(recipe: Recipe, stage: str) -> list[int]:
    """A full micro-batch of the longest sequences that the stage's store has, or may have, and a last one that fills it."""
    from megatron_opd.estimate.workload import PROMPT_TOKENS, trained_lengths

    config: TrainerConfig = getattr(recipe, stage)
    sampler = recipe.generate if stage == "sft" else recipe.rollout
    multiple = config.token_multiple
    budget = config.micro_batch_tokens // multiple * multiple
    if sampler is not None:
        longest = trained_lengths(config, sampler).longest
    else:
        longest = PROMPT_TOKENS + config.longest_response if config.longest_response else budget
    longest = max(multiple, min(longest, budget) // multiple * multiple)
    rest = budget % longest
    return [longest] * (budget // longest) + ([rest] if rest > 1 else [])


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


def _steps(ledger: Any, trainee: Any, arch: Any, recipe: Recipe, stage: str, lengths: list[int], *, micro_batches: int, steps: int) -> None:
    from megatron.core import parallel_state

    from megatron_opd.simulate.batches import make_batch, make_source
    from megatron_opd.train.loss import make_loss, sft_loss
    from megatron_opd.train.step import train_step

    config: TrainerConfig = getattr(recipe, stage)
    loss = sft_loss if stage == "sft" else make_loss(recipe.train.loss)
    source = make_source(recipe, stage, arch, lengths, cp_rank=parallel_state.get_context_parallel_rank())
    for number in range(steps):
        ledger.start_step(f"step {number}")
        batches = [make_batch(source).pinned() for _ in range(micro_batches)]
        train_step(trainee, arch, loss, batches, seed=config.seed, chunk_tokens=config.chunk_tokens)


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
    from megatron.core import package_info

    found = {"python": platform.python_version(), "torch": torch.__version__, "megatron-core": package_info.__shortversion__}
    if uses_te:
        found["transformer-engine"] = importlib.metadata.version("transformer-engine")
    return found
