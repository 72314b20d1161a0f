"""The transformers engine does what every engine must, and is reproducible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serve.engine_conformance import CHECKS, CONTEXT_LENGTH, VOCAB_SIZE, Reference, random_prompts, random_score_requests, write_model
from tiny_models import make_model

from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import SamplingParams
from megatron_opd.serve.engine import GenerateRequest
from megatron_opd.serve.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def engine(reference: Reference) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineConfig(kind="transformers", device="cpu"), reference.directory)
    yield engine
    engine.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, engine: TransformersEngine, reference: Reference) -> None:
    check(engine, reference)


def test_samples_depend_on_seed_prompt_and_sample_alone(engine: TransformersEngine, reference: Reference) -> None:
    """Whatever is in the batch, and in which order."""
    sampling = SamplingParams(temperature=0.9, top_p=0.95, max_new_tokens=20, seed=3)
    requests = [GenerateRequest(prompt, number, sample) for number, prompt in enumerate(random_prompts(4)) for sample in range(2)]
    together = engine.generate(requests, sampling)
    small_batches = TransformersEngine(EngineConfig(kind="transformers", device="cpu", batch_sequences=3), reference.directory)
    for request, want, backwards in zip(requests, together, reversed(small_batches.generate(requests[::-1], sampling)), strict=True):
        (alone,) = engine.generate([request], sampling)
        assert alone.tokens.tolist() == want.tokens.tolist() == backwards.tokens.tolist()
        np.testing.assert_allclose(alone.logp, want.logp, atol=1e-5)
    other_seed = engine.generate(requests, sampling.model_copy(update={"seed": 4}))
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(together, other_seed, strict=True))


def test_scores_do_not_depend_on_the_batch(engine: TransformersEngine, reference: Reference) -> None:
    requests = random_score_requests()
    one_by_one = TransformersEngine(EngineConfig(kind="transformers", device="cpu", batch_tokens=1), reference.directory)
    for left, right in zip(engine.score(requests), one_by_one.score(requests), strict=True):
        np.testing.assert_allclose(left.logp, right.logp, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "qwen3-moe"])
def test_other_weights_are_loaded_into_an_open_engine(kind: str, tmp_path: Path) -> None:
    """In place where the files' tensors are the module's; of experts, which transformers may hold otherwise, as a new model."""
    first, second = (
        make_model(tmp_path / f"{seed}", kind, seed=seed, vocab=VOCAB_SIZE, max_position_embeddings=CONTEXT_LENGTH) for seed in (1, 2)
    )
    options = EngineConfig(kind="transformers", device="cpu")
    requests, sampling = random_score_requests(), SamplingParams(max_new_tokens=8, seed=3)
    engine, fresh = TransformersEngine(options, first), TransformersEngine(options, second)
    module = engine.model
    before = engine.score(requests)
    engine.load(second)
    assert engine.fingerprint == fresh.fingerprint
    assert kind == "qwen3-moe" or engine.model is module
    for left, right, old in zip(engine.score(requests), fresh.score(requests), before, strict=True):
        np.testing.assert_array_equal(left.logp, right.logp)
        assert not np.array_equal(left.logp, old.logp)
    prompts = [GenerateRequest(prompt, number, 0) for number, prompt in enumerate(random_prompts(4))]
    for left, right in zip(engine.generate(prompts, sampling), fresh.generate(prompts, sampling), strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.logp, right.logp)
