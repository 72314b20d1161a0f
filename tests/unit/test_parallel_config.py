"""Layouts, precision and FP8 as configuration: what fits is taken, what does not is refused with the reason, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_opd.data.context import context_parallel_tokens
from megatron_opd.errors import UserError
from megatron_opd.model.architecture import Architecture, parse_architecture
from megatron_opd.model.fp8 import Machine, check_fp8, fp8_options, megatron_fp8_fields
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.layout import Fp8Config, ParallelConfig
from megatron_opd.recipe.training_stages import TrainStage

H100, B200, A100 = (9, 0), (10, 0), (8, 0)
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 25600,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 64, "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.fixture
def mixture() -> Architecture:
    return parse_architecture(QWEN3_30B_A3B, "config.json")


@pytest.fixture
def dense() -> Architecture:
    return parse_architecture(QWEN3_32B, "config.json")


def test_parameters_of_published_models(mixture: Architecture, dense: Architecture) -> None:
    """The model cards say 30.5B in total, 3.3B activated, and 32.8B."""
    assert mixture.num_parameters == pytest.approx(30.5e9, rel=0.005)
    assert mixture.num_active_parameters == pytest.approx(3.3e9, rel=0.02)
    assert dense.num_parameters == dense.num_active_parameters == pytest.approx(32.8e9, rel=0.005)


def test_shipped_recipes_fit_their_models(mixture: Architecture, dense: Architecture) -> None:
    for name, arch, gpus in (("opd_30b_a3b", mixture, 8), ("opd_32b_4nodes", dense, 32)):
        recipe = load_recipe(name)
        for stage in (recipe.sft, recipe.train):
            arch.check_parallel(stage.parallel)
            assert gpus % stage.parallel.min_ranks == 0
    train = load_recipe("opd_30b_a3b_paper").train
    assert (train.parallel.tp, train.parallel.ep, train.micro_batch_tokens, train.optimizer_offload) == (4, 8, 12288, 1.0)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"ep": 3}, r"ep=3 does not divide the model's 128 experts \(ep may be 1, 2, 4, 8, 16, 32, 64, 128\)"),
        ({"tp": 8}, r"tp=8 does not divide the model's 4 key-value heads \(tp may be 1, 2, 4\)"),
        ({"tp": 2, "sequence_parallel": False}, "needs sequence_parallel = true"),
        ({"pp": 8, "vpp": 7}, "56 stages, but the model has 48 layer"),
    ],
)
def test_layouts_that_do_not_fit_a_mixture(mixture: Architecture, sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        mixture.check_parallel(ParallelConfig(**sizes))


def test_a_dense_model_has_no_experts_to_spread(dense: Architecture) -> None:
    with pytest.raises(UserError, match="has no experts"):
        dense.check_parallel(ParallelConfig(ep=2))
    dense.check_parallel(ParallelConfig(pp=3))


@given(st.integers(1, 100), st.integers(1, 100))
def test_stages_share_the_layers(num_layers: int, stages: int) -> None:
    arch = parse_architecture(QWEN3_32B | {"num_hidden_layers": max(num_layers, stages)}, "config.json")
    layers = arch.stage_layers(stages)
    assert (len(layers), sum(layers)) == (stages, arch.num_layers)
    assert max(layers) - min(layers) <= 1
    assert layers[0] == min(layers) or arch.num_layers % stages == stages - 1
    assert layers[-1] == min(layers)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_ranks_that_a_layout_needs(tp: int, pp: int, cp: int, ep: int) -> None:
    ranks = ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep).min_ranks
    assert ranks % (tp * pp * cp) == 0
    assert ranks % (ep * pp) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallel": {"vpp": 2}}, "needs pp > 1"),
        ({"moments_dtype": "bfloat16"}, "need precision_aware_optimizer"),
        ({"optimizer_offload": 0.5}, "needs precision_aware_optimizer"),
        ({"precision_aware_optimizer": True, "distributed_optimizer": False}, "needs distributed_optimizer"),
        ({"precision_aware_optimizer": True, "dtype": "float32"}, "for bfloat16 training"),
        ({"fp8": {"recipe": "blockwise"}, "dtype": "float32"}, "for bfloat16 training"),
        ({"fp8": {"recipe": "delayed", "bf16_first_layers": 1}}, "not with delayed"),
        ({"fp8": {"recipe": "delayed", "parameters": True}}, "needs tensorwise, blockwise or mxfp8"),
        ({"fp8": {"recipe": "blockwise", "parameters": True}, "distributed_optimizer": False}, "needs distributed_optimizer = true"),
        (
            {"fp8": {"recipe": "blockwise", "parameters": True}, "precision_aware_optimizer": True, "optimizer_offload": 1.0},
            "and no optimizer_offload",
        ),
        ({"precision_aware_optimizer": True, "optimizer_offload": 1.0, "moments_dtype": "bfloat16"}, "moments in float32"),
        ({"precision_aware_optimizer": True, "moments_dtype": "fp8", "fp8": {"recipe": "blockwise"}}, "without their scales"),
        ({"fp8": {"recipe": "hopper"}}, "recipe"),
        ({"recompute_modules": ["everything"]}, "recompute_modules"),
    ],
)
def test_settings_that_exclude_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainStage(**options)


def test_tokens_of_a_micro_batch_are_padded_for_the_layout_and_fp8() -> None:
    assert TrainStage().token_multiple == 1
    assert TrainStage(parallel=ParallelConfig(tp=2, cp=2)).token_multiple == 8
    assert TrainStage(parallel=ParallelConfig(tp=2), fp8=Fp8Config(recipe="delayed")).token_multiple == 32
    assert TrainStage(fp8=Fp8Config(recipe="mxfp8")).token_multiple == 32


@pytest.mark.parametrize(
    ("recipe", "capability", "engine", "said"),
    [
        ("blockwise", None, None, "no GPU here.*Transformer Engine 2.3 or newer is not installed.*Leave fp8 out"),
        ("delayed", A100, (2, 4), "at least 8.9, this one has 8.0"),
        ("blockwise", B200, (2, 4), "at least 9.0 and below 10.0, this one has 10.0.*Here can run: delayed, tensorwise, mxfp8"),
        ("mxfp8", H100, (2, 4), "at least 10.0, this one has 9.0.*Here can run: delayed, tensorwise, blockwise"),
        ("tensorwise", H100, (2, 1), "Transformer Engine 2.2 or newer, 2.1 is installed.*Here can run: delayed"),
    ],
)
def test_fp8_is_refused_where_it_can_not_run(recipe: Any, capability: Any, engine: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_fp8(Fp8Config(recipe=recipe), Machine(capability, engine))


def test_fp8_parameters_need_a_newer_transformer_engine() -> None:
    fp8 = Fp8Config(recipe="tensorwise", parameters=True)
    with pytest.raises(UserError, match=r"Transformer Engine 2.4 or newer, 2.3 is installed"):
        check_fp8(fp8, Machine(H100, (2, 3)))
    check_fp8(fp8, Machine(H100, (2, 4)))


@pytest.mark.parametrize(("recipe", "reused"), [("blockwise", False), ("mxfp8", True)])
def test_fp8_parameters_are_gathered_at_once(recipe: Any, reused: bool) -> None:
    from megatron_opd.train.optim import gather_options

    assert gather_options(TrainStage()) == {"overlap_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": False}
    assert gather_options(TrainStage(fp8=Fp8Config(recipe=recipe, parameters=True))) == {
        "overlap_param_gather": False, "reuse_grad_buf_for_mxfp8_param_ag": reused,
    }  # fmt: skip


def test_fp8_that_can_run_passes(dense: Architecture) -> None:
    for recipe, capability in (("delayed", H100), ("tensorwise", H100), ("blockwise", H100), ("mxfp8", B200)):
        check_fp8(Fp8Config.model_validate({"recipe": recipe}), Machine(capability, (2, 4)))
    fields = megatron_fp8_fields(Fp8Config(recipe="blockwise", bf16_first_layers=1, bf16_last_layers=2), dense, ParallelConfig(pp=2))
    assert fields["fp8"] == "e4m3"
    assert not fields["fp8_param"]
    assert megatron_fp8_fields(Fp8Config(recipe="blockwise", parameters=True), dense, ParallelConfig())["fp8_param"]
    assert fields["first_last_layers_bf16"]
    assert (fields["num_layers_at_start_in_bf16"], fields["num_layers_at_end_in_bf16"]) == (1, 2)
    with pytest.raises(UserError, match="a pipeline stage has 16 layers"):
        megatron_fp8_fields(Fp8Config(recipe="blockwise", bf16_first_layers=17), dense, ParallelConfig(pp=4))


def test_a_cpu_has_no_fp8(dense: Architecture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(UserError, match="no GPU here"):
        fp8_options(Fp8Config(recipe="delayed"), dense, ParallelConfig())


@pytest.mark.parametrize(
    ("modules", "said"),
    [(["moe"], "has no moe"), (["layernorm"], "need a GPU with Transformer Engine"), (["core_attn", "mlp"], None)],
)
def test_what_is_recomputed_must_be_there(dense: Architecture, modules: list[str], said: str | None) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    from megatron_opd.model import student

    arguments: dict[str, Any] = {
        "parallel": ParallelConfig(),
        "dtype": torch.bfloat16,
        "recompute": "selective",
        "recompute_modules": modules,
    }
    if said is None:
        assert student.transformer_config(dense, **arguments).recompute_modules == modules
    else:
        with pytest.raises(UserError, match=said):
            student.transformer_config(dense, **arguments)


def test_the_optimizer_of_lower_precision_is_refused_without_transformer_engine() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    from megatron_opd.train.optim import optimizer_config

    for options in ({}, {"optimizer_offload": 1.0}, {"moments_dtype": "fp8", "main_grads_dtype": "bfloat16"}):
        with pytest.raises(UserError, match="needs a GPU with Transformer Engine"):
            optimizer_config(TrainStage(precision_aware_optimizer=True, **options), bf16=True)


@given(st.lists(st.integers(1, 9), max_size=5), st.integers(1, 4))
def test_context_parallel_ranks_share_every_sequence(halves: list[int], cp: int) -> None:
    """Every token once; each rank has the same number of tokens of each sequence, and the same causal work."""
    bounds = np.cumsum([0, *(half * 2 * cp for half in halves)])
    parts = [context_parallel_tokens(bounds, cp=cp, rank=rank) for rank in range(cp)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(bounds[-1]))
    position = np.concatenate([np.arange(n) for n in np.diff(bounds)]) if halves else np.zeros(0)
    for part in parts:
        assert len(part) == bounds[-1] // cp
        assert position[part].sum() == position.sum() / cp
    if cp > 1:
        with pytest.raises(ValueError, match="not multiples"):
            context_parallel_tokens(np.array([0, 2 * cp + 1]), cp=cp, rank=0)
