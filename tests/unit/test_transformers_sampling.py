"""The embedded engine's sampler against the distribution that it must follow, exactly where that can be, else by chi-square.

Legend: B rows, V vocabulary. What every engine must do is tested in tests/serve.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from megatron_opd.errors import UserError
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import Finish, SamplingParams
from megatron_opd.serve.engine import GenerateRequest, ScoreRequest
from megatron_opd.serve.transformers_engine import TransformersEngine, _draw, _SeededSampler

LOGITS_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, -torch.inf])
DRAWS = 4000


def wanted_probs(sampling: SamplingParams) -> np.ndarray:
    """The definition, in float64: temperature, then what top-k and top-p leave, renormalized."""
    weight_V = np.exp(LOGITS_V.double().numpy() / sampling.temperature)
    prob_V = weight_V / weight_V.sum()
    order = np.argsort(-prob_V, kind="stable")
    keep = np.zeros(len(prob_V), bool)
    total = 0.0
    for rank, token in enumerate(order):
        if (sampling.top_k and rank >= sampling.top_k) or total >= sampling.top_p:
            break
        keep[token] = True
        total += prob_V[token]
    return np.where(keep, prob_V, 0) / prob_V[keep].sum()


def choices(sampling: SamplingParams, rows: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """(chosen token, its log-probability) of one step of `rows` rows, each a prompt of its own."""
    requests = [GenerateRequest(np.array([3], np.int32), number, 0) for number in range(rows)]
    sampler = _SeededSampler(requests, sampling, prompt_len=1)
    scores_BV = LOGITS_V.expand(rows, -1)
    forced_BV = sampler(torch.zeros(rows, 1, dtype=torch.long), scores_BV)
    chosen_B = forced_BV.argmax(-1)
    assert (torch.isfinite(forced_BV).sum(-1) == 1).all()
    return chosen_B.numpy(), sampler.finish(torch.zeros(rows, 2))[:, 0].numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, top_p=0.9, top_k=4),
        SamplingParams(top_p=1e-6),
        SamplingParams(top_k=1),
        SamplingParams(top_k=100),
    ],
    ids=lambda sampling: f"T{sampling.temperature}-p{sampling.top_p}-k{sampling.top_k}",
)
def test_the_sampler_follows_the_distribution(sampling: SamplingParams) -> None:
    chosen, logp = choices(sampling)
    prob_V = wanted_probs(sampling)
    count_V = np.bincount(chosen, minlength=len(prob_V))
    assert count_V[prob_V == 0].sum() == 0
    live = prob_V > 0
    chi_square = ((count_V[live] - DRAWS * prob_V[live]) ** 2 / (DRAWS * prob_V[live])).sum()
    assert chi_square < 35  # 7 degrees of freedom or fewer: by chance less than once in 100,000; the seed is fixed
    # Stored log-probabilities are those at temperature 1 over the whole vocabulary, however the token was drawn.
    np.testing.assert_allclose(logp, torch.log_softmax(LOGITS_V, -1).numpy()[chosen], atol=1e-6)


def test_greedy() -> None:
    chosen, logp = choices(SamplingParams(temperature=0.0), rows=5)
    assert chosen.tolist() == [0] * 5
    np.testing.assert_allclose(logp, float(torch.log_softmax(LOGITS_V, -1)[0]), atol=1e-6)


def test_seeds_prompts_and_samples_have_streams_of_their_own() -> None:
    def first_numbers(seed: int, prompt: int, sample: int) -> bytes:
        (stream,) = _SeededSampler([GenerateRequest(np.array([1]), prompt, sample)], SamplingParams(seed=seed), prompt_len=1).streams
        return stream.random(4).tobytes()

    names = [(seed, prompt, sample) for seed in (0, 1, 2**63 - 1) for prompt in (0, 1, 1000) for sample in (0, 1, 63)]
    assert len({first_numbers(*name) for name in names}) == len(names)
    assert first_numbers(5, 6, 7) == first_numbers(5, 6, 7)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-12, 0.1, 0.3, 1.0, 7.0]), min_size=1, max_size=12).filter(any),
    uniform=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
)
@settings(deadline=None)
def test_a_draw_has_a_weight(weights: list[float], uniform: float) -> None:
    (column,) = _draw(torch.tensor([weights], dtype=torch.double), [uniform]).tolist()
    assert weights[column] > 0
    total = sum(weights)
    assert sum(weights[:column]) <= uniform * total + 1e-9 * total
    assert sum(weights[: column + 1]) >= uniform * total - 1e-9 * total


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def engine_for(model: Path, **changes: object) -> TransformersEngine:
    return TransformersEngine(EngineConfig(kind="transformers", device="cpu", **changes), model)  # type: ignore[arg-type]


def test_the_room_for_a_response_does_not_depend_on_the_batch(model: Path) -> None:
    """With max_new_tokens over the context, a response may fill what its own prompt leaves, whatever else is in the batch."""
    engine = engine_for(model, context_length=48)
    engine.stop_ids = []  # every response runs to its limit
    rng = np.random.default_rng(0)
    requests = [
        GenerateRequest(rng.integers(3, 200, length).astype(np.int32), number, 0) for number, length in enumerate((2, 40, 2, 47, 11))
    ]
    sampling = SamplingParams(max_new_tokens=500)
    together = engine.generate(requests, sampling)
    assert [len(generated.tokens) for generated in together] == [46, 8, 46, 1, 37]
    assert {generated.finish for generated in together} == {Finish.LENGTH}
    for request, want in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], sampling)
        assert alone.tokens.tolist() == want.tokens.tolist()
    limited = engine.generate(requests[:3], SamplingParams(max_new_tokens=8))
    assert [len(generated.tokens) for generated in limited] == [8, 8, 8]


def test_sampled_log_probabilities_are_those_that_scoring_gives(model: Path) -> None:
    engine = engine_for(model)
    requests = [GenerateRequest(np.arange(3, 3 + length, dtype=np.int32), length, 0) for length in (1, 5, 9)]
    for request, generated in zip(
        requests, engine.generate(requests, SamplingParams(temperature=0.6, top_p=0.9, max_new_tokens=20)), strict=True
    ):
        (scores,) = engine.score([ScoreRequest(np.concatenate([request.prompt, generated.tokens]), len(request.prompt))])
        np.testing.assert_allclose(scores.logp[len(request.prompt) :], generated.logp, atol=1e-4)


def test_a_device_that_is_not_there(model: Path) -> None:
    for device in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match=f"engine.device is '{device}': .*'auto' takes what is there"):
            TransformersEngine(EngineConfig(device=device), model)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, {}]}'])
def test_a_broken_generation_config_is_named(model: Path, tmp_path: Path, content: str) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    (copied / "generation_config.json").write_text(content)
    with pytest.raises(
        UserError,
        match=r"copied/generation_config.json: (not JSON|must be a JSON object, not list|no valid end-of-turn ids: eos_token_id is)",
    ):
        engine_for(copied)


def test_end_of_turn_ids_come_from_all_files_each_once(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    assert engine_for(copied).stop_ids == [1]
    (copied / "generation_config.json").write_text('{"eos_token_id": [7, 1, 9, 7]}')
    assert engine_for(copied).stop_ids == [7, 1, 9]
    (copied / "generation_config.json").unlink()
    assert engine_for(copied).stop_ids == [1]


@pytest.mark.parametrize("fault", ["missing tensor", "other shape", "unknown architecture", "unknown activation"])
def test_a_model_that_is_not_whole_is_refused(model: Path, tmp_path: Path, fault: str) -> None:
    """transformers would draw a missing tensor at random, with a warning."""
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    weights, config = copied / "model.safetensors", copied / "config.json"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing tensor":
        del tensors[name]
    elif fault == "other shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        change = {"model_type": "abacus", "architectures": ["Abacus"]} if fault == "unknown architecture" else {"hidden_act": "abacus"}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    save_file(tensors, weights, metadata={"format": "pt"})
    message = (
        rf"1 tensors are in no \*.safetensors file \(first: {name}\)" if fault == "missing tensor" else "transformers can't load this model"
    )
    with pytest.raises(UserError, match=f"copied: {message}"):
        engine_for(copied)


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    engine_for(make_model(tmp_path / "tied", "qwen3-tied"))
