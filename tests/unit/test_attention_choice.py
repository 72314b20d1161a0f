"""Which attention a GPU gets, asked of a stand-in for Transformer Engine's chooser; and that a fixed order is asked of PyTorch's."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.errors import UserError
from megatron_opd.estimate.known_models import known_config
from megatron_opd.model.architecture import parse_architecture
from megatron_opd.model.attention import CoreAttention, ask_transformer_engine, choose_attention
from megatron_opd.model.layers import order_strictly
from megatron_opd.recipe.layout import ParallelConfig
from megatron_opd.recipe.training_stages import TrainStage

A100, H100 = (8, 0), (9, 0)


@dataclass
class AttentionParams:
    """Fields that the chooser has in every version; newer ones have more."""

    qkv_dtype: torch.dtype
    qkv_layout: str
    num_heads: int
    max_seqlen_q: int
    attn_mask_type: str
    deterministic: bool
    batch_size: int


def ask(monkeypatch: pytest.MonkeyPatch, chooser: Any, **options: Any) -> Any:
    name = "transformer_engine.pytorch.attention.dot_product_attention"
    utils: Any = types.ModuleType(f"{name}.utils")
    utils.AttentionParams, utils.get_attention_backend = AttentionParams, chooser
    parents = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.attention", name]
    for parent in parents:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, f"{name}.utils", utils)
    monkeypatch.setattr(sys.modules[name], "utils", utils, raising=False)
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "cp": 1, "dtype": torch.bfloat16, "longest": 4096, "deterministic": False}
    return ask_transformer_engine(**(sizes | options))


@pytest.mark.parametrize(
    ("flash", "fused", "kind"),
    [(True, False, "FlashAttention"), (False, True, "cuDNN's fused attention"), (False, False, "unfused attention")],
)
def test_the_chooser_is_asked_for_packed_causal_sequences(monkeypatch: pytest.MonkeyPatch, flash: bool, fused: bool, kind: str) -> None:
    seen: list[AttentionParams] = []

    def chooser(params: AttentionParams) -> tuple[Any, ...]:
        seen.append(params)
        return flash, None, fused, None, not (flash or fused), []

    assert ask(monkeypatch, chooser) == kind
    assert [(p.qkv_layout, p.attn_mask_type, p.num_heads, p.max_seqlen_q) for p in seen] == [("thd_thd_thd", "padding_causal", 8, 4096)]


def test_a_long_sequence_among_many_decides_for_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformer Engine 2.20 on Hopper, where cuDNN's is left out from 2^30 on."""

    def chooser(params: AttentionParams) -> tuple[Any, ...]:
        large = params.deterministic and params.batch_size * params.num_heads * params.max_seqlen_q**2 >= 1 << 30
        return False, None, not large, None, large, []

    assert ask(monkeypatch, chooser) == "cuDNN's fused attention"
    assert ask(monkeypatch, chooser, deterministic=True) == "unfused attention"


def test_without_a_chooser_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    sizes: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "cp": 1, "longest": 4096}
    assert ask_transformer_engine(**sizes, dtype=torch.bfloat16, deterministic=False) is None


@pytest.mark.parametrize("kind", ["FlashAttention", "cuDNN's fused attention"])
def test_transformer_engines_fused_attention_is_kept(kind: Any) -> None:
    for capability, cp in ((A100, 1), (H100, 2)):
        chosen = choose_attention(kind, capability=capability, cp=cp)
        assert not chosen.ours
        assert kind in chosen.why


def test_unfused_attention_is_replaced_and_said() -> None:
    chosen = choose_attention("unfused attention", capability=A100, cp=1)
    assert chosen.ours
    assert "holds all S x S scores" in chosen.why
    assert "compute capability 9.0 or higher" in chosen.why
    on_hopper = choose_attention("unfused attention", capability=H100, cp=1, deterministic=True)
    assert on_hopper.ours
    assert "deterministic = false" in on_hopper.why
    assert "9.0 or higher" not in on_hopper.why


def test_unfused_attention_over_context_parallel_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.cp = 2: .* set cp = 1, install flash-attn"):
        choose_attention("unfused attention", capability=A100, cp=2)


def test_a_version_that_cannot_be_asked_is_judged_by_the_gpu() -> None:
    assert choose_attention(None, capability=A100, cp=1).ours
    assert "can't be asked" in choose_attention(None, capability=A100, cp=1).why
    assert not choose_attention(None, capability=A100, cp=2, has_flash=True).ours
    assert choose_attention("unfused attention", capability=H100, cp=1, dtype=torch.float32).why.endswith('set dtype = "bfloat16"')
    assert not choose_attention(None, capability=H100, cp=1).ours


def test_one_node_of_the_backward_pass_runs_under_the_strict_setting() -> None:
    seen: dict[str, bool] = {}

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            seen[ctx.name] = torch.is_deterministic_algorithms_warn_only_enabled()
            return gradients[0], None

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = Told.apply(torch.ones(2, requires_grad=True), "before")
        attended: Any = Told.apply(before, "attention")
        order_strictly(attended.grad_fn)
        Told.apply(attended, "after").sum().backward()
        assert seen == {"before": True, "attention": False, "after": True}
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("ours", "begins"), [(True, "WARNING: layers: Transformer Engine's"), (False, "layers: Transformer Engine's")])
def test_people_are_told_what_a_gpu_gets(monkeypatch: pytest.MonkeyPatch, ours: bool, begins: str) -> None:
    from megatron_opd.model import student

    config = known_config("Qwen/Qwen3-8B")
    assert config is not None
    asked: dict[str, Any] = {}

    def chosen(arch: Any, **options: Any) -> CoreAttention:
        asked.update(options)
        return CoreAttention(ours, "the reason")

    monkeypatch.setattr(student, "core_attention", chosen)
    monkeypatch.setattr(student, "uses_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stage = TrainStage(micro_batch_tokens=12288, parallel=ParallelConfig(tp=4, cp=2), deterministic=True)
    layers, sums = student.describe_layers(parse_architecture(config, "config.json"), stage)
    assert layers == f"{begins}; attention: the reason"
    assert "by Transformer Engine" in sums
    assert asked == {"tp": 4, "cp": 2, "dtype": torch.bfloat16, "deterministic": True, "longest": 12288}
