"""`megatron-opd check RECIPE --gpus N --simulate`: every training stage simulated in a process of its own, beside the closed form. No torch here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.config import Recipe, TrainerConfig
from megatron_opd.errors import UserError
from megatron_opd.estimate.workload import student_of
from megatron_opd.gpus import Gpu
from megatron_opd.pipeline.stages import list_stages
from megatron_opd.simulate.needs import build_guard, find_transformer_engine, no_transformer_engine
from megatron_opd.simulate.report import describe

_TAIL = 15  # lines of a failed simulation that are shown


@dataclass(frozen=True)
class Request:
    """What is simulated: the recipe as the command line names it, the allocation, and which ranks (None: one of each pipeline stage)."""

    recipe: str
    overrides: Sequence[str]
    gpus: int
    gpu: Gpu
    rank: int | None = None
    layers: int | None = None
    transformer_engine: bool = True


def simulate_recipe(recipe: Recipe, request: Request) -> int:
    """Simulate and print. Returns the exit code: 0, or 1 where a simulation failed, which a run on GPUs would do as well.

    Raises UserError for what can't be simulated, and, when all is printed, for what would not fit.
    """
    path = _environment(request)
    too_much: list[str] = []
    for stage, rank in _jobs(recipe, request):
        config: TrainerConfig = getattr(recipe, stage)
        micro_batches = _micro_batches(recipe, stage, request.gpus)
        print(f"simulating {stage} as rank {rank} of {request.gpus} ...", flush=True)
        found = _run(request, stage, rank, path, micro_batches=min(micro_batches, _enough(config)))
        if found is None:
            return 1
        print("\n".join(describe(found)))
        print("\n".join(_beside(recipe, stage, found, micro_batches)), flush=True)
        if found.runs_out is not None:
            too_much.append(f"{stage}: rank {rank} runs out of memory in {found.runs_out['phase']!r}, at {found.runs_out['place']}")
    if too_much:
        raise UserError(f"{'; '.join(too_much)}; 'check' without --simulate names single changes that would fit")
    return 0


def _environment(request: Request) -> str:
    """PYTHONPATH of the simulations. Raises UserError for what is missing, before anything starts."""
    build_guard()
    found = find_transformer_engine() if request.transformer_engine else ""
    if found is None:
        raise UserError(no_transformer_engine())
    return os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), found)))


def _jobs(recipe: Recipe, request: Request) -> list[tuple[str, int]]:
    """(stage, rank) of every simulation. Raises ConfigError or UserError for layouts that can't be."""
    names = {stage.name for stage in list_stages(recipe)} & {"sft", "train"}
    jobs: list[tuple[str, int]] = []
    for name in ("sft", "train"):
        if name not in names:
            continue
        config: TrainerConfig = getattr(recipe, name)
        config.check_ranks(name, request.gpus)
        student_arch(recipe).check_stage(config, name)
        if request.rank is None:  # the first rank of each pipeline stage
            jobs += [(name, number * request.gpus // config.parallel.pp) for number in range(config.parallel.pp)]
        elif request.rank < request.gpus:
            jobs.append((name, request.rank))
        else:
            raise UserError(f"--rank {request.rank} is none of {request.gpus} ranks, which count from 0")
    return jobs


def student_arch(recipe: Recipe):
    arch = student_of(recipe).arch
    assert arch is not None
    return arch
