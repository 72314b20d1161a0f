"""Whose matrix product adds weight gradients up in float32."""

from __future__ import annotations

import pytest
import torch

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.estimate.known_models import known_config
from megatron_opd.model.accumulation import choose_fusion, fuse_accumulation_
from megatron_opd.model.architecture import parse_architecture
from megatron_opd.recipe.layout import ParallelConfig


@pytest.mark.parametrize(
    ("on_gpu", "transformer_engine", "apex", "taken"),
    [
        (True, True, False, "Transformer Engine"),
        (True, True, True, "Transformer Engine"),
        (True, False, True, "apex"),
        (True, False, False, None),
        (False, False, True, None),
    ],
)
def test_the_library_whose_layers_these_are_adds(on_gpu: bool, transformer_engine: bool, apex: bool, taken: str | None) -> None:
    found = {
        dtype: choose_fusion(dtype=dtype, on_gpu=on_gpu, transformer_engine=transformer_engine, apex=apex)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert found == {torch.bfloat16: taken, torch.float16: taken, torch.float32: None}


class Linear(torch.nn.Linear):
    """As Transformer Engine's: the switch is read in each forward pass."""

    fuse_wgrad_accumulation = False


def test_only_layers_that_have_the_switch_are_told() -> None:
    model = torch.nn.Sequential(Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Sequential(Linear(2, 2)))
    assert fuse_accumulation_(model) == 2
    assert model[0].fuse_wgrad_accumulation
    assert not hasattr(model[1], "fuse_wgrad_accumulation")


def test_nothing_changes_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    from megatron_opd.model.student import transformer_config

    config = known_config("Qwen/Qwen3-30B-A3B")
    assert config is not None
    arch = parse_architecture(config, "config.json")
    for dtype in (torch.bfloat16, torch.float32):
        fields = transformer_config(arch, parallel=ParallelConfig(), dtype=dtype)
        assert not fields.gradient_accumulation_fusion
        assert not fields.moe_permute_fusion
