"""`megatron-opd check RECIPE --gpus N --simulate`: every training stage simulated in a process of its own, beside the closed form. No torch here."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.cost.gpus import Gpu
from megatron_opd.errors import UserError
from megatron_opd.estimate.memory import GIB, Layout, stage_memory
from megatron_opd.estimate.workload import student_of, trained_lengths
from megatron_opd.pipeline.stages import list_stages
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.simulate.needs import build_guard, python_path
from megatron_opd.simulate.report import describe, provenance
from megatron_opd.simulate.result import Simulation
from megatron_opd.simulate.timing import predict, whole_step

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

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
    """Simulate and print. Returns the exit code: 0, or 1 where a simulation ended with an error that is nobody's to mend.

    Raises UserError for what can't be simulated, and, when all is printed, for what would not fit.
    """
    path = _environment(request)
    too_much: list[str] = []
    last: Simulation | None = None
    jobs = _jobs(recipe, request)
    for number, (stage, rank) in enumerate(jobs, 1):
        config: TrainerConfig = getattr(recipe, stage)
        micro_batches = _micro_batches(recipe, stage, request.gpus)
        print(f"[{number}/{len(jobs)}] simulating {stage} as rank {rank} of {request.gpus} ...", file=sys.stderr, flush=True)
        found = _run(request, stage, rank, path, micro_batches=min(micro_batches, _enough(config)))
        if found is None:
            return 1
        print("\n".join(describe(found)))
        print("\n".join(_beside(recipe, request, stage, found, micro_batches)), flush=True)
        if found.runs_out is not None:
            too_much.append(f"{stage}: rank {rank} runs out of memory in {found.runs_out['phase']!r}, at {found.runs_out['place']}")
        last = found
    print("\n".join(provenance(last)) if last else "")
    if too_much:
        raise UserError(f"{'; '.join(too_much)}; 'check' without --simulate names single changes that would fit")
    return 0


def _environment(request: Request) -> str:
    """PYTHONPATH of the simulations. Raises UserError for what is missing, before anything starts."""
    build_guard()
    return python_path() if request.transformer_engine else os.environ.get("PYTHONPATH", "")


def _jobs(recipe: Recipe, request: Request) -> list[tuple[str, int]]:
    """(stage, rank) of every simulation. Raises ConfigError or UserError for layouts that can't be."""
    names = {stage.name for stage in list_stages(recipe)} & {"sft", "train"}
    jobs: list[tuple[str, int]] = []
    for name in ("sft", "train"):
        if name not in names:
            continue
        config: TrainerConfig = getattr(recipe, name)
        config.check_ranks(name, request.gpus)
        _arch(recipe, request).check_stage(config, name)
        if request.rank is None:  # the first rank of each pipeline stage
            jobs += [(name, number * request.gpus // config.parallel.pp) for number in range(config.parallel.pp)]
        elif request.rank < request.gpus:
            jobs.append((name, request.rank))
        else:
            raise UserError(f"--rank {request.rank} is none of {request.gpus} ranks, which count from 0")
    return jobs


def _arch(recipe: Recipe, request: Request) -> Architecture:
    """The student's. Raises UserError where its sizes are not known."""
    arch = student_of(recipe).arch
    assert arch is not None
    return arch if request.layers is None else dataclasses.replace(arch, num_layers=request.layers)


def _micro_batches(recipe: Recipe, stage: str, gpus: int) -> int:
    """Of a whole step on one rank, when sequences are as long as they may be; an interleaved pipeline takes them pp at a time."""
    config: TrainerConfig = getattr(recipe, stage)
    sampler = recipe.generate if stage == "sft" else recipe.rollout
    mean = trained_lengths(config, sampler).tokens.high if sampler is not None else float(config.micro_batch_tokens)
    number = max(1, round(config.step_tokens(mean) / Layout.of(config, gpus).dp / config.micro_batch_tokens))
    multiple = config.parallel.pp if config.parallel.vpp > 1 else 1
    return -(-number // multiple) * multiple


def _enough(config: TrainerConfig) -> int:
    """Micro-batches that fill a pipeline: the memory of a step does not grow beyond."""
    pp = config.parallel.pp
    return 2 * pp if config.parallel.vpp > 1 else pp + 1


def _run(request: Request, stage: str, rank: int, path: str, *, micro_batches: int) -> Simulation | None:
    """One simulation in a process of its own; None, with its last words printed, where it failed. Raises UserError for what it refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "simulation.json"
        command = [sys.executable, "-W", "ignore", "-m", "megatron_opd.simulate", request.recipe, stage, *request.overrides]
        command += ["--gpus", str(request.gpus), "--rank", str(rank), "--micro-batches", str(micro_batches), "--save", "--json", str(file)]
        command += ["--gpu", request.gpu.name.lower(), "--gpu-memory", f"{request.gpu.memory_gib:g}"]
        command += ["--layers", str(request.layers)] if request.layers is not None else []
        command += [] if request.transformer_engine else ["--no-te"]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
        if result.returncode == 0:
            return Simulation.from_json(json.loads(file.read_text(encoding="utf-8")))
    words = result.stderr.strip().splitlines()
    if result.returncode == 2 and words:
        raise UserError(f"{stage}, rank {rank}: {words[-1]}")
    print(f"the simulation of {stage} as rank {rank} failed (exit code {result.returncode}): {shlex.join(command)}", file=sys.stderr)
    print("\n".join(words[-_TAIL:]), file=sys.stderr, flush=True)
    return None


def _beside(recipe: Recipe, request: Request, stage: str, found: Simulation, micro_batches: int) -> Iterator[str]:
    """The closed form beside a simulation, and the predicted time of a whole step."""
    config: TrainerConfig = getattr(recipe, stage)
    arch, layout = _arch(recipe, request), Layout.of(config, request.gpus)
    number = found.rank // (request.gpus // layout.pp)
    version = found.versions["megatron-core"]
    memory = stage_memory(arch, config, layout, number, micro_batches=found.micro_batches, megatron_core=version)
    tensors = sum(memory.parts.values())
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts.items())
    yield (
        f"  closed form, pipeline stage {number + 1} of {layout.pp}: {tensors / GIB:.1f} GiB of tensors ({parts}); "
        f"simulated in a step: {found.peaks['step'] / GIB:.1f} GiB"
    )
    step = whole_step(found, micro_batches)
    time = predict(step, arch, config, layout, request.gpu)
    yield f"  a whole step has about {micro_batches} such micro-batches on this rank, {step.flops / 1e12:.0f} TFLOP: {time.total.text()} s"
    yield f"    {time.describe()} (the shares of the GPU's figures that these rest on are assumptions: docs/simulation.md)"
