"""The estimate of a GPU's memory against peaks of simulated steps, of models cut to a few layers.

The peaks are of a rank's second step on tensors that only have shapes, with the Python half of Transformer Engine 2.20.2 and Megatron-Core
0.16.1, in GiB; tests/fake_gpu simulates such steps anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.estimate.memory import GIB, Layout, fullest_stage, stage_memory
from megatron_opd.model.architecture import parse_architecture
from megatron_opd.recipe.training_stages import TrainStage

PART_ON_HOST = {"precision_aware_optimizer": True, "optimizer_offload": 0.5, "main_grads_dtype": "bfloat16"}
MIXTURE = {"parallel": {"tp": 4, "ep": 8}, "micro_batch_tokens": 12288}


@pytest.mark.parametrize(
    ("model", "layers", "stage", "micro_batches", "fields", "peak"),
    [
        ("Qwen3-8B", 2, 0, 2, {"parallel": {"tp": 4}, "recompute": "full"}, 5.674),
        ("Qwen3-8B", 2, 0, 2, {"parallel": {"tp": 1}, "recompute": "full"}, 15.757),
        ("Qwen3-8B", 4, 0, 2, {"parallel": {"tp": 2}, "recompute": "none", "micro_batch_tokens": 8192}, 11.464),
        ("Qwen3-8B", 4, 0, 2, {"parallel": {"tp": 4}, "recompute": "selective", "recompute_modules": ["mlp"]}, 7.357),
        ("Qwen3-8B", 8, 0, 4, {"parallel": {"tp": 2, "pp": 4}, "recompute": "full"}, 11.029),
        ("Qwen3-8B", 2, 0, 2, {"parallel": {"tp": 4}, "recompute": "full", **PART_ON_HOST}, 4.124),
        ("Qwen3-4B", 2, 0, 2, {"parallel": {"tp": 1}, "recompute": "none", "micro_batch_tokens": 8192}, 7.383),
        ("Qwen3-30B-A3B", 4, 0, 2, {**MIXTURE, "recompute": "none"}, 8.902),
        ("Qwen3-30B-A3B", 4, 0, 2, {**MIXTURE, "recompute": "full"}, 7.992),
    ],
)
def test_a_step_holds_what_is_said(model: str, layers: int, stage: int, micro_batches: int, fields: dict[str, Any], peak: float) -> None:
    arch = replace(parse_architecture(KNOWN[model], model), num_layers=layers)
    config = TrainStage.model_validate({"init": "", "store": "", "output": "", "global_batch": 256, "micro_batch_tokens": 16384} | fields)
    memory = stage_memory(arch, config, Layout.of(config, 8), stage, micro_batches=micro_batches)
    assert sum(memory.parts.values()) / GIB == pytest.approx(peak, rel=0.015), memory


def test_building_counts_where_a_step_needs_less() -> None:
    """All of the optimizer on the host, and short micro-batches: weights twice and gradients are the most."""
    arch = parse_architecture(KNOWN["Qwen3-8B"], "Qwen3-8B")
    config = TrainStage(
        init="", store="", output="", micro_batch_tokens=512, recompute="full", precision_aware_optimizer=True, optimizer_offload=1.0
    )
    memory = fullest_stage(arch, config, Layout.of(config, 8), mean_tokens=400)
    assert sum(memory.parts.values()) < memory.building == 8 * arch.num_parameters
    assert memory.total == pytest.approx(1.05 * memory.building + 3 * GIB)
