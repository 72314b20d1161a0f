"""The shipped recipes at their full size: a rank's peak is what `check --gpus` says, and it fits the GPU that the recipe is for."""

from __future__ import annotations

import pytest
from cases import NEWEST, OLDEST
from simulator import Simulators, Step

from megatron_opd.cost.gpus import GPUS
from megatron_opd.estimate.memory import GIB, Layout, stage_memory
from megatron_opd.estimate.workload import find_model
from megatron_opd.recipe.files import load_recipe

RECIPES = {"opd_4b": 8, "opd_8b": 8, "opd_30b_a3b": 8, "opd_32b_4nodes": 32}  # GPUs
SLOW = [pytest.param(version, name, "sft", marks=pytest.mark.slow) for version in (OLDEST, NEWEST) for name in RECIPES]
SLOW += [pytest.param(OLDEST, name, "train", marks=pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize(("version", "name", "stage"), [*((NEWEST, name, "train") for name in RECIPES), *SLOW])
def test_a_shipped_recipe_at_its_full_size(version: str, name: str, stage: str, simulators: Simulators) -> None:
    recipe, gpus = load_recipe(name), RECIPES[name]
    config = getattr(recipe, stage)
    arch = find_model(recipe.models.student).arch
    assert arch is not None
    layout = Layout.of(config, gpus)
    micro_batches = 2 * layout.pp
    for pipeline_stage in sorted({0, layout.pp - 1}):
        rank = pipeline_stage * (gpus // layout.pp)
        asked = {"name": name, "stage": stage, "gpus": gpus, "rank": rank, "micro_batches": micro_batches}
        step = Step(simulators(version).ask("shipped", **asked))
        memory = stage_memory(arch, config, layout, pipeline_stage, micro_batches=micro_batches, megatron_core=version)
        assert sum(memory.parts.values()) / GIB == pytest.approx(step.peak / GIB, rel=0.03), memory.parts
        assert step.peak < GPUS["h100"].memory_gib * GIB
        assert step.result["runs_out"] is None
