"""The estimator: parameter counts of published models, refusals with changes that do fit, and what must go up or down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.cli import main
from megatron_opd.cost.gpus import GPUS
from megatron_opd.estimate.allocation import Allocation
from megatron_opd.estimate.compute import predict_speed
from megatron_opd.estimate.known_models import KNOWN, known_config
from megatron_opd.estimate.memory import GIB, Layout, fullest_stage, rank_parameters
from megatron_opd.estimate.ranges import Range, exactly
from megatron_opd.estimate.recipe import estimate_recipe
from megatron_opd.estimate.workload import longest_response, trained_lengths
from megatron_opd.model.architecture import Architecture, parse_architecture
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.training_stages import TrainStage

# Billions of parameters as their model cards say them; the embedding of a tied model counts once.
PUBLISHED = {
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.7,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235.1,
    "QwQ-32B": 32.8,
}


def architecture(name: str) -> Architecture:
    return parse_architecture(KNOWN[name], name)


@pytest.mark.parametrize("name", KNOWN)
def test_published_models_have_their_size(name: str) -> None:
    arch = architecture(name)
    assert arch.num_parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.05)
    whole = rank_parameters(arch, Layout(gpus=1, tp=1, pp=1, vpp=1, cp=1, ep=1), 0).total
    assert whole == pytest.approx(arch.num_parameters, rel=1e-4)  # but for the padding of the vocabulary


def test_a_published_model_is_known_by_the_name_of_its_directory() -> None:
    assert known_config("models/Qwen3-4B-Base") == KNOWN["Qwen3-4B"]
    assert known_config("/data/Qwen3-30B-A3B-Thinking-2507/") == KNOWN["Qwen3-30B-A3B"] | {"max_position_embeddings": 262144}
    assert known_config("Qwen3-8B") == KNOWN["Qwen3-8B"] | {"max_position_embeddings": 40960}
    assert known_config("models/Qwen3-40B") is None


@settings(deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]), dp=st.integers(1, 8),
    tokens=st.integers(4200, 40000), recompute=st.sampled_from(["none", "full"]), batch=st.integers(4096, 8192),  # more micro-batches than stages
)  # fmt: skip
def test_what_takes_and_gives_memory(tp: int, pp: int, dp: int, tokens: int, recompute: Any, batch: int) -> None:
    arch = parse_architecture(KNOWN["Qwen3-8B"], "Qwen3-8B")

    def total(*, tp: int = tp, pp: int = pp, dp: int = dp, tokens: int = tokens, recompute: Any = recompute) -> float:
        config = TrainStage(init="", store="", output="", micro_batch_tokens=tokens, recompute=recompute, global_batch=batch)
        # Of a step: while a model is built neither data parallelism nor tokens matter.
        return sum(fullest_stage(arch, config, Layout(tp * pp * dp, tp, pp, 1, 1, 1), mean_tokens=1900).parts.values())

    here = total()
    assert total(tp=2 * tp) < here
    assert total(dp=2 * dp) < here
    assert total(tokens=tokens + 1000) > here
    assert total(recompute="full") <= here <= total(recompute="none")
    # More stages hold fewer weights, and as many activations of more micro-batches in flight: less as long as those are recomputed.
    assert recompute == "none" or total(pp=2 * pp) < here
    config = TrainStage(init="", store="", output="", micro_batch_tokens=tokens, recompute=recompute, global_batch=batch)
    layout = Layout(tp * pp * dp, tp, pp, 1, 1, 1)
    speed = predict_speed(arch, config, layout, tokens=exactly(1900), steps=10, gpu=GPUS["h100"])
    assert 0 < speed.tokens_per_second.low < speed.tokens_per_second.high
    assert speed.gpu_hours.low == pytest.approx(10 * speed.step_seconds.low * tp * pp * dp / 3600)
    assert speed.tokens_per_second.high * speed.step_seconds.low == pytest.approx(batch * 1900)
    longer = predict_speed(arch, config, layout, tokens=Range(1900, 2000), steps=10, gpu=GPUS["h100"])
    assert longer.gpu_hours.low == speed.gpu_hours.low
    assert longer.gpu_hours.high > speed.gpu_hours.high


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["check", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("recipe", ["opd_4b", "opd_8b"])
def test_the_shipped_recipes_fit_their_node(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = check(capsys, recipe, "--gpus", "8", "--gpu-memory", "80")
    assert code == 0
    assert re.search(r"^train +tp \d x pp 1 x cp 1 x dp \d ", text, re.MULTILINE)
    assert "3,000 steps" in text
    assert "150 steps" in text
    assert re.search(r"^generate: 300,000 prompts", text, re.MULTILINE)
    assert re.search(r"^total  ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpus", "6"],
            r"sft\.parallel\.tp = 4 would cut groups .* nodes of 6 GPUs; take one of 1, 2, 3, 6.*; sft\.parallel: 6 ranks do not fit",
        ),
        (
            ["--gpus", "6", "sft.parallel.tp=2", "sft.recompute=full", "train.parallel.tp=3"],
            r"error: train: tp=3 does not divide the model's 32 attention heads.*tp may be 1, 2, 4, 8\); change train\.parallel$",
        ),
        (
            ["--gpus", "8", "train.parallel.pp=2", 'train.fp8={recipe="blockwise",bf16_first_layers=19}'],
            r"error: train: fp8\.bf16_first_layers = 19, but a pipeline stage has 18 layers; change train\.parallel or train\.fp8$",
        ),
        (["--gpu-memory", "80"], r"--gpu-memory is for the estimate, which needs the number of GPUs too: add --gpus N"),
        (["--gpus", "8", "train.global_batch=1"], r"train\.global_batch = 1 is smaller than 4 data-parallel ranks"),
        (["--gpus", "8", "train.micro_batch_tokens=4000"], r"train: a rollout may have 4352 tokens .*over micro_batch_tokens = 4000"),
        (
            ["--gpus", "8", "train.parallel.tp=1", "train.recompute=none"],
            r"train: needs about \d+ GiB on a GPU, which has 80; .*any of these alone",
        ),
        (["--gpus", "8", "--gpu-memory", "12"], r"sft: needs about \d+ GiB on a GPU, which has 12; .*no single change"),
        (
            ["--gpus", "8", "--node-memory", "64"],
            r"sft: needs about 107 GiB of a node's memory, which has 64: while a checkpoint is saved or loaded 107 GiB; take more nodes$",
        ),
        (["--node-memory", "64"], r"--node-memory is for the estimate, which needs the number of GPUs too: add --gpus N"),
        (["--gpus", "8", "models.student=models/unheard-of"], r"models/unheard-of: no config.json, and no model whose sizes are known"),
    ],
)
def test_what_can_t_be_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = check(capsys, "opd_8b", *arguments, "engine.launch=null")
    assert code == 2
    assert re.search(message, text, re.MULTILINE), text


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [("--gpu-memory", value, "a number of GiB above 0") for value in ("nan", "0", "-80", "inf", "much")]
    + [("--gpus", value, "a whole number above 0") for value in ("0", "-8", "2.5", "many")],
)
def test_numbers_that_are_none(option: str, value: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "opd_8b", "--gpus", "8", f"{option}={value}"])
    assert caught.value.code == 2
    assert f"argument {option}: {wanted} is expected, got {value!r}" in capsys.readouterr().err


def test_the_changes_that_are_proposed_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["opd_8b", "--gpus", "8", "train.parallel.tp=1", "train.recompute=none"]
    _, text = check(capsys, *arguments)
    proposed = re.findall(r"(train\.[\w.]+) = ('?\w+'?)", text)
    assert len(proposed) > 1
    for field, value in proposed:
        kept = [argument for argument in arguments if not argument.startswith(f"{field}=")]
        assert check(capsys, *kept, f"{field}={value}")[0] == 0, (field, value)


def test_lengths_come_from_the_store_that_is_there(tmp_path: Path) -> None:
    make_model(tmp_path / "student")
    reader = make_scored_store(tmp_path / "store", sampler=tmp_path / "student", teacher=tmp_path / "student")
    recipe = load_recipe(
        "tiny", [f"train.init={str(tmp_path / 'student')!r}", f"train.store={str(tmp_path / 'store')!r}", "train.epochs=3"]
    )
    lines = "\n".join(estimate_recipe(recipe, Allocation(1, 2), GPUS["h100"]))
    assert f"train: {exactly(reader.lengths.mean()).text()} tokens a rollout ({tmp_path / 'store'})" in lines
    assert re.search(r"s a step; 4 steps", lines), "20 rollouts, three times, 16 a step"
    assert f"({tmp_path / 'student'}/config.json)" in lines
    horizon = load_recipe("tiny", [f"train.store={str(tmp_path / 'store')!r}", "train.loss.horizon={ start = 2, end = 5, steps = 9 }"])
    assert horizon.rollout is not None
    cut = exactly(float(np.minimum(reader.response_lens, 5).mean()))
    assert trained_lengths(horizon.train, horizon.rollout).response == cut
    assert longest_response(horizon.rollout, horizon.train) == 16  # sampling goes on behind it
    guessed = trained_lengths(horizon.train.model_copy(update={"store": str(tmp_path / "none")}), horizon.rollout)
    assert guessed.response.high == 5
    assert GIB == 1 << 30
