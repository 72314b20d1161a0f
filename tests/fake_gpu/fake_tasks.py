"""What the children of a fork server run: each function takes and returns what JSON holds. Imported before torch."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import megatron_opd.simulate.gpu  # noqa: F401  before torch


def prepare(*, with_te: bool) -> None:
    """Import what every task needs."""
    if with_te:
        from megatron_opd.simulate import transformer_engine

        transformer_engine.install()
    import megatron_opd.simulate.stage
    import megatron_opd.train.checkpoint
    import megatron_opd.train.loop  # noqa: F401


def versions() -> dict[str, str]:
    return {"megatron_core": importlib.metadata.version("megatron-core")}


def step(case: dict[str, Any], *, fault: str | None = None) -> dict[str, Any]:
    """The second of two steps of a case (cases.Case), with a fault of faults.py in the code."""
    import faults
    from cases import Case

    from megatron_opd.cost.gpus import GPUS
    from megatron_opd.simulate.stage import simulate_stage

    wanted = Case(**case)
    with faults.injected(fault):
        found = simulate_stage(
            wanted.recipe,
            wanted.stage,
            ranks=wanted.gpus,
            rank=wanted.rank,
            layers=wanted.layers,
            micro_batches=wanted.micro_batches,
            lengths=wanted.lengths,
            gpu=GPUS[wanted.gpu],
        )
    return found.to_json()


def save_and_load(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """A step of a case, a checkpoint of it, the load of that, and one more step: all but the files."""
    from pathlib import Path

    import checkpoint_shapes
    from cases import Case

    from megatron_opd.cost.gpus import GPUS
    from megatron_opd.simulate import gpu, stage
    from megatron_opd.simulate.stand_ins import stand_ins
    from megatron_opd.train.checkpoint import load_checkpoint

    wanted = Case(**case)
    config, arch = wanted.config, wanted.arch
    lengths = wanted.lengths
    with (
        gpu.world(rank=wanted.rank, size=wanted.gpus, gpu=GPUS[wanted.gpu]) as ledger,
        stand_ins(ledger, arch, config, lengths),
        checkpoint_shapes.shelf() as shelf,
    ):
        trainee, parameters = stage._build(ledger, arch, config, {})
        stage._steps(ledger, trainee, arch, wanted.recipe, wanted.stage, lengths, micro_batches=wanted.micro_batches, steps=1)
        ledger.start_step("save")
        checkpoint_shapes.save(trainee, Path(folder))
        ledger.start_step("load")
        load_checkpoint(Path(folder), trainee)
        stage._steps(ledger, trainee, arch, wanted.recipe, wanted.stage, lengths, micro_batches=wanted.micro_batches, steps=1)
        return {
            "parameters": parameters,
            "tensors": shelf.tensors,
            "bytes": shelf.bytes,
            "host_peaks": ledger.host_peaks,
            "peaks": ledger.peaks,
        }


def whole_run(tree: dict[str, Any], stage: str, *, rank: int, size: int, steps: list[int]) -> list[dict[str, int]]:
    """`sft` or `train` of a recipe, started once for each entry of `steps` (the last step of that start), from its own checkpoints.

    Returns what whole_run.run does, of all steps.
    """
    import checkpoint_shapes
    import whole_run as runs

    from megatron_opd.recipe.files import build_recipe

    found = []
    with checkpoint_shapes.shelf() as shelf:
        for last in steps:
            recipe = build_recipe(tree | {stage: tree[stage] | {"steps": last}})
            found += runs.run(recipe, stage, rank=rank, size=size, shelf=shelf)
    return found


def shipped(name: str, stage: str, *, gpus: int, rank: int, micro_batches: int) -> dict[str, Any]:
    """A step of a shipped recipe as it is."""
    from megatron_opd.recipe.files import load_recipe
    from megatron_opd.simulate.stage import simulate_stage

    return simulate_stage(load_recipe(name), stage, ranks=gpus, rank=rank, micro_batches=micro_batches).to_json()
