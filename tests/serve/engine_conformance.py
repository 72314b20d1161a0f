"""What every engine must do, as functions of an engine and an independent reference; each engine's test module runs all of them.

Legend: P prompt tokens, R response tokens, T = P + R, V vocabulary, K candidates. The model is that of `write_model`, in fp32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_opd.errors import EngineError
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.records import Finish, SamplingParams
from megatron_opd.serve.engine import Engine, Generated, GenerateRequest, ScoreRequest

VOCAB_SIZE = 512
CONTEXT_LENGTH = 512
EOS_ID = 1
# As in real models the generation config knows more end-of-turn ids than the config; with 24 of 512, sampling meets one soon.
STOP_IDS = [EOS_ID, *range(200, 223)]
TOLERANCE = 1e-4
SAMPLING = {
    "nucleus": SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=24),
    "nucleus_at_temperature_1": SamplingParams(temperature=1.0, top_p=0.8, max_new_tokens=24),
    "top_k_at_temperature_1": SamplingParams(temperature=1.0, top_k=5, max_new_tokens=24),
    "hot": SamplingParams(temperature=1.3, max_new_tokens=24),
    "greedy": SamplingParams(temperature=0.0, max_new_tokens=24),
}


def write_model(directory: Path, *, seed: int = 0) -> Path:
    """A tiny random Qwen3 with logits of spread 2 and more ids than its tokenizer has tokens; `seed` draws the weights."""
    make_model(directory, "qwen3", seed=seed, vocab=VOCAB_SIZE, max_position_embeddings=CONTEXT_LENGTH, scale=16.0)
    # Sampling settings that a server or generate() might pick up by themselves, and must not.
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.5}
    GenerationConfig(eos_token_id=STOP_IDS, pad_token_id=0, **settings).save_pretrained(directory)
    return directory


class Reference:
    """The model by a plain forward pass of transformers, one sequence at a time."""

    def __init__(self, directory: str | Path):
        self.directory = directory
        self.model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, local_files_only=True).eval()

    @torch.no_grad()
    def logp_TV(self, tokens: np.ndarray) -> np.ndarray:
        """Row t holds log p(. | tokens[:t]) at temperature 1; row 0 is NaN."""
        logits_TV = self.model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
        logp_TV = torch.log_softmax(logits_TV.double(), -1).numpy()
        return np.concatenate([np.full((1, logp_TV.shape[1]), np.nan), logp_TV[:-1]])

    def logp(self, tokens: np.ndarray) -> np.ndarray:
        """log p(tokens[t] | tokens[:t])."""
        return self.logp_TV(tokens)[np.arange(len(tokens)), tokens]


def random_prompts(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Prompts of 1 to 40 tokens of the whole vocabulary."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, rng.integers(1, 41)).astype(np.int32) for _ in range(count)]


def random_score_requests() -> list[ScoreRequest]:
    """Sequences of many lengths and starts, with end-of-turn tokens inside, the first and last id, and repeats of one sequence."""
    rng = np.random.default_rng(1)
    requests = []
    for T in (2, 3, 17, 40, 41, 64, 97, 150):
        tokens = rng.integers(0, VOCAB_SIZE, T).astype(np.int32)
        tokens[rng.integers(0, T, 3)] = [0, EOS_ID, VOCAB_SIZE - 1]
        requests += [ScoreRequest(tokens, start) for start in sorted({1, T // 2 or 1, T - 1})]
    tokens = np.full(6, VOCAB_SIZE - 1, np.int32)
    return [*requests, ScoreRequest(tokens, 2), requests[4]]


def scores_agree_with_reference(engine: Engine, reference: Reference) -> None:
    requests = random_score_requests()
    for request, scores in zip(requests, engine.score(requests), strict=True):
        assert scores.logp.dtype == np.float32
        assert scores.topk_ids is None
        assert scores.topk_logp is None
        assert np.isnan(scores.logp[: request.start]).all()
        np.testing.assert_allclose(scores.logp[request.start :], reference.logp(request.tokens)[request.start :], atol=TOLERANCE, rtol=0)


def topk_agrees_with_reference(engine: Engine, reference: Reference) -> None:
    requests = random_score_requests()
    for request, scores, alone in zip(requests, engine.score(requests, top_k=7), engine.score(requests), strict=True):
        assert scores.topk_ids is not None
        assert scores.topk_logp is not None
        assert scores.topk_ids.shape == scores.topk_logp.shape == (len(request.tokens), 7)
        assert scores.topk_ids.dtype == np.int32
        assert scores.topk_logp.dtype == np.float32
        assert (scores.topk_ids[: request.start] == -1).all()
        assert np.isnan(scores.topk_logp[: request.start]).all()
        np.testing.assert_allclose(scores.logp, alone.logp, atol=TOLERANCE, rtol=0)
        logp_RV = reference.logp_TV(request.tokens)[request.start :]
        ids_RK, topk_logp_RK = scores.topk_ids[request.start :], scores.topk_logp[request.start :]
        assert all(len(set(row)) == 7 for row in ids_RK.tolist())
        # Values at the given ids, and the K highest values: ids alone could differ where two tokens tie.
        np.testing.assert_allclose(topk_logp_RK, np.take_along_axis(logp_RV, ids_RK, 1), atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(topk_logp_RK, -np.sort(-logp_RV, 1)[:, :7], atol=TOLERANCE, rtol=0)


def topk_of_the_whole_vocabulary(engine: Engine, reference: Reference) -> None:
    request = ScoreRequest(np.array([3, 1, 4, 1, VOCAB_SIZE - 1], np.int32), 2)
    (scores,) = engine.score([request], top_k=VOCAB_SIZE)
    assert scores.topk_logp is not None
    assert scores.topk_ids is not None
    np.testing.assert_allclose(np.exp(scores.topk_logp[2:]).sum(1), 1.0, atol=1e-4)
    assert (np.sort(scores.topk_ids[2:], 1) == np.arange(VOCAB_SIZE)).all()
    with pytest.raises(EngineError, match=str(VOCAB_SIZE + 1)):
        engine.score([request], top_k=VOCAB_SIZE + 1)
    scores_agree_with_reference(engine, reference)


def generated_logp_is_at_temperature_1(engine: Engine, reference: Reference) -> None:
    for name, sampling in SAMPLING.items():
        for prompt, generated in _generate(engine, random_prompts(6), sampling):
            assert generated.tokens.dtype == np.int32
            assert generated.logp.dtype == np.float32
            want = reference.logp(np.concatenate([prompt, generated.tokens]))[len(prompt) :]
            np.testing.assert_allclose(generated.logp, want, atol=TOLERANCE, rtol=0, err_msg=name)


def samples_keep_to_top_p_and_top_k(engine: Engine, reference: Reference) -> None:
    for name, sampling in SAMPLING.items():
        for prompt, generated in _generate(engine, random_prompts(6, seed=2), sampling):
            logp_RV = reference.logp_TV(np.concatenate([prompt, generated.tokens]))[len(prompt) :]
            rows = np.arange(len(generated.tokens))
            rank_R = (logp_RV > logp_RV[rows, generated.tokens][:, None] + TOLERANCE).sum(1)
            assert sampling.top_k == 0 or (rank_R < sampling.top_k).all(), name
            if sampling.temperature == 0:
                assert (rank_R == 0).all(), name
                continue
            weight_RV = np.exp(logp_RV / sampling.temperature)
            prob_RV = weight_RV / weight_RV.sum(1, keepdims=True)
            higher_R = np.where(prob_RV > prob_RV[rows, generated.tokens][:, None] * (1 + TOLERANCE), prob_RV, 0).sum(1)
            assert (higher_R <= sampling.top_p + TOLERANCE).all(), name


def first_tokens_follow_the_distribution(engine: Engine, reference: Reference) -> None:
    """At temperature 1 over the whole vocabulary; the model's generation_config.json, which says otherwise, has no say."""
    prompt, count = random_prompts(1, seed=3)[0], 400
    sampling = SamplingParams(max_new_tokens=1)
    generated = engine.generate([GenerateRequest(prompt, 0, sample) for sample in range(count)], sampling)
    seen = Counter(int(answer.tokens[0]) for answer in generated)
    probs_V = np.exp(reference.logp_TV(np.append(prompt, 0))[-1])
    for token in np.argsort(-probs_V)[:8]:
        spread = np.sqrt(count * probs_V[token] * (1 - probs_V[token]))
        assert abs(seen[int(token)] - count * probs_V[token]) < 5 * spread, (
            f"token {token}: {seen[int(token)]} times, p={probs_V[token]:.3f}"
        )


def stop_token_is_kept_and_length_is_exact(engine: Engine, reference: Reference) -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=40)
    finishes = Counter[Finish]()
    for _, generated in _generate(engine, random_prompts(32, seed=4), sampling):
        stops = np.isin(generated.tokens, STOP_IDS)
        assert not stops[:-1].any()
        assert len(generated.tokens) == len(generated.logp)
        assert generated.finish is (Finish.STOP if stops[-1] else Finish.LENGTH)
        assert stops[-1] or len(generated.tokens) == 40
        finishes[generated.finish] += 1
    assert set(finishes) == {Finish.STOP, Finish.LENGTH}, f"the check needs both: {finishes}"


def stop_ids_that_are_asked_for_count(engine: Engine, reference: Reference) -> None:
    """Those of the SFT answers, which the model's own files do not name."""
    asked = list(range(300, 340))
    sampling = SamplingParams(temperature=1.0, max_new_tokens=40, stop_token_ids=asked)
    ended = Counter[bool]()
    for _, generated in _generate(engine, random_prompts(24, seed=7), sampling):
        stops = np.isin(generated.tokens, [*asked, *STOP_IDS])
        assert not stops[:-1].any()
        assert generated.finish is (Finish.STOP if stops[-1] else Finish.LENGTH)
        ended[bool(np.isin(generated.tokens[-1], asked))] += 1
    assert ended[True], "the check needs a response that ends at one of them"


def samples_of_a_prompt_differ(engine: Engine, reference: Reference) -> None:
    prompt = random_prompts(1, seed=5)[0]
    generated = engine.generate([GenerateRequest(prompt, 0, sample) for sample in range(16)], SamplingParams(max_new_tokens=16))
    assert len({answer.tokens.tobytes() for answer in generated}) > 4


def bad_requests_are_refused(engine: Engine, reference: Reference) -> None:
    """Before anything is sent, naming the request; the engine works on."""
    good = np.array([5, 6, 7], np.int32)
    for bad, message in (
        (np.array([5, VOCAB_SIZE, 7], np.int32), str(VOCAB_SIZE)),
        (np.array([5, -1, 7], np.int32), "-1"),
        (good[:0], "no tokens"),
    ):
        with pytest.raises(EngineError, match=f"request 1: .*{message}"):
            engine.generate([GenerateRequest(good, 0, 0), GenerateRequest(bad, 1, 0)], SamplingParams(max_new_tokens=2))
        with pytest.raises(EngineError, match=f"request 1: .*{message}"):
            engine.score([ScoreRequest(good, 1), ScoreRequest(bad, 1)])
    for start in (0, -1, 3, 4):
        with pytest.raises(EngineError, match=f"position {start}"):
            engine.score([ScoreRequest(good, start)])
    for top_k in (-1, VOCAB_SIZE + 1):
        with pytest.raises(EngineError, match=str(top_k)):
            engine.score([ScoreRequest(good, 1)], top_k=top_k)
    scores_agree_with_reference(engine, reference)


def context_length_is_what_it_says(engine: Engine, reference: Reference) -> None:
    longest = np.random.default_rng(6).integers(0, VOCAB_SIZE, engine.context_length).astype(np.int32)
    (scores,) = engine.score([ScoreRequest(longest, len(longest) - 20)])
    np.testing.assert_allclose(scores.logp[-20:], reference.logp(longest)[-20:], atol=TOLERANCE, rtol=0)
    with pytest.raises(EngineError, match=f"{len(longest) + 1} tokens"):
        engine.score([ScoreRequest(np.append(longest, 1).astype(np.int32), 1)])
    with pytest.raises(EngineError, match="room"):
        engine.generate([GenerateRequest(longest, 0, 0)], SamplingParams(max_new_tokens=5))
    for temperature in (0.7, 1.0):
        for sample in range(4):
            (generated,) = engine.generate(
                [GenerateRequest(longest[:-3], 0, sample)], SamplingParams(temperature=temperature, max_new_tokens=50)
            )
            assert len(generated.tokens) == 3 if generated.finish is Finish.LENGTH else 1 <= len(generated.tokens) <= 3


def progress_counts_tokens(engine: Engine, reference: Reference) -> None:
    seen: list[int] = []
    generated = engine.generate(
        [GenerateRequest(prompt, i, 0) for i, prompt in enumerate(random_prompts(5))], SamplingParams(max_new_tokens=6), seen.append
    )
    assert sorted(seen) == sorted(len(answer.tokens) for answer in generated)  # one call a response
    seen.clear()
    requests = random_score_requests()
    engine.score(requests, 0, seen.append)
    assert sum(seen) == sum(len(request.tokens) - request.start for request in requests)
    assert engine.generate([], SamplingParams()) == []
    assert engine.score([]) == []


def describes_itself(engine: Engine, reference: Reference) -> None:
    described = engine.describe()
    assert described["kind"]
    assert described["version"]
    assert described["dtype"] == "float32"
    assert "://" not in json.dumps(described)  # addresses and paths stay out of manifests
    assert engine.fingerprint == fingerprint_model(reference.directory)


CHECKS: tuple[Callable[[Engine, Reference], None], ...] = (
    scores_agree_with_reference,
    topk_agrees_with_reference,
    topk_of_the_whole_vocabulary,
    generated_logp_is_at_temperature_1,
    samples_keep_to_top_p_and_top_k,
    first_tokens_follow_the_distribution,
    stop_token_is_kept_and_length_is_exact,
    stop_ids_that_are_asked_for_count,
    samples_of_a_prompt_differ,
    bad_requests_are_refused,
    context_length_is_what_it_says,
    progress_counts_tokens,
    describes_itself,
)


def _generate(engine: Engine, prompts: list[np.ndarray], sampling: SamplingParams) -> list[tuple[np.ndarray, Generated]]:
    generated = engine.generate([GenerateRequest(prompt, number, 0) for number, prompt in enumerate(prompts)], sampling)
    return list(zip(prompts, generated, strict=True))
