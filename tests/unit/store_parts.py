"""Parts of a store for the unit tests: made-up fingerprints, random rollouts and scores, written by the real writer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_opd.data.location import Location
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.records import Finish, Lineage, ModelFingerprint, PromptFile, Rollout, SamplingParams, TeacherScores, TokenizerFingerprint
from megatron_opd.store_records import ScoreManifest, StoreManifest

VOCAB = 64
SMALL_ARRAYS = ("offsets", "prompt_len", "prompt_index", "sample_index", "finish")
PART_ARRAYS = ("tokens", *SMALL_ARRAYS, "student_logp")


def fake_fingerprint(
    name: str = "student", *, weights: str | None = None, tokens: str = "tokens", vocab_size: int = VOCAB
) -> ModelFingerprint:
    """A fingerprint of a model that does not exist; equal `weights` or `tokens` make equal hashes."""
    tokenizer = TokenizerFingerprint(vocab_sha256=_sha256(tokens), num_tokens=vocab_size, eos_token_id=1)
    return ModelFingerprint(
        name=name, config_sha256=_sha256("config"), weights_sha256=_sha256(weights or name), vocab_size=vocab_size, tokenizer=tokenizer
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_manifest(*, num_prompts: int = 10, samples: int = 2, per_part: int = 4, **changes: Any) -> StoreManifest:
    student, teacher = fake_fingerprint("student"), fake_fingerprint("teacher")
    fields = {
        "sampler_role": "student",
        "sampler": student,
        "lineage": Lineage(base=student, sft_teacher=teacher),
        "prompts": PromptFile(name="prompts.jsonl", sha256="0" * 64, num_prompts=num_prompts),
        "prompts_per_part": per_part,
        "sampling": SamplingParams(samples_per_prompt=samples, max_new_tokens=60),
    }
    return StoreManifest(**(fields | changes))


def make_rollout(rng: np.random.Generator, prompt: int, sample: int, *, longest: int = 40) -> Rollout:
    prompt_len, response_len = int(rng.integers(1, longest)), int(rng.integers(1, longest))
    tokens = rng.integers(0, VOCAB, prompt_len + response_len).astype(np.int32)
    finish = Finish.STOP if rng.random() < 0.5 else Finish.LENGTH
    return Rollout(tokens, prompt_len, prompt, sample, finish, random_logp(rng, prompt_len, response_len))


def random_logp(rng: np.random.Generator, prompt_len: int, response_len: int) -> np.ndarray:
    """float32 [T], NaN at the prompt."""
    logp = np.full(prompt_len + response_len, np.nan, np.float32)
    logp[prompt_len:] = -rng.exponential(2.0, response_len)
    return logp


def make_rollouts(manifest: StoreManifest, part: int, *, seed: int = 0, longest: int = 40) -> list[Rollout]:
    """All rollouts of a part; the same for the same seed, whatever was made before."""
    rng = np.random.default_rng([seed, part])
    samples = range(manifest.sampling.samples_per_prompt)
    return [make_rollout(rng, prompt, sample, longest=longest) for prompt in manifest.prompt_range(part) for sample in samples]


def make_scores(rollouts: Iterable[Rollout], *, seed: int = 0, top_k: int = 0) -> list[TeacherScores]:
    rng = np.random.default_rng(seed)
    scores = []
    for rollout in rollouts:
        start, T = rollout.prompt_len, len(rollout.tokens)
        logp = random_logp(rng, start, T - start)
        if not top_k:
            scores.append(TeacherScores(logp))
            continue
        ids = np.full((T, top_k), -1, np.int32)
        values = np.full((T, top_k), np.nan, np.float32)
        ids[start:] = np.argsort(rng.random((T - start, VOCAB)), axis=1)[:, :top_k]
        values[start:] = -rng.integers(1, 40, (T - start, top_k)) / 8  # exact in float16
        scores.append(TeacherScores(logp, ids, values))
    return scores


def fill(url: str, manifest: StoreManifest, *, parts: Iterable[int] | None = None, seed: int = 0, longest: int = 40) -> Location:
    """Create (or join) a store and write `parts`, all by default."""
    location = create_store(url, manifest)
    for part in range(manifest.num_parts) if parts is None else parts:
        write_part(location, part, make_rollouts(manifest, part, seed=seed, longest=longest), [], {})
    return location


def score(
    url: str,
    *,
    teacher: str = "teacher",
    model: ModelFingerprint | None = None,
    parts: Iterable[int] | None = None,
    top_k: int = 0,
    topk_dtype: str = "float32",
) -> None:
    """Random scores for `parts`, by default for all that are sealed."""
    reader = StoreReader(url)
    for part in list(reader.parts) if parts is None else parts:
        rollouts = reader.part_rollouts(part)
        record = ScoreManifest(
            part=part, teacher=model or fake_fingerprint("teacher"), top_k=top_k, part_crc32c=reader.parts[part].crc32c, crc32c={}
        )
        write_scores(reader.location, teacher, record, rollouts, make_scores(rollouts, seed=part, top_k=top_k), topk_dtype=topk_dtype)


def scored_store(url: str, **changes: Any) -> StoreManifest:
    """A whole store with scores of 'teacher'."""
    manifest = make_manifest(**changes)
    fill(url, manifest)
    score(url)
    return manifest


def same_rollout(left: Rollout, right: Rollout) -> None:
    assert (left.prompt_index, left.sample_index, left.prompt_len, left.finish) == (
        right.prompt_index,
        right.sample_index,
        right.prompt_len,
        right.finish,
    )
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_array_equal(left.student_logp, right.student_logp)
    assert left.tokens.dtype == right.tokens.dtype
    assert left.student_logp.dtype == right.student_logp.dtype


def same_scores(left: TeacherScores, right: TeacherScores) -> None:
    for name in ("logp", "topk_ids", "topk_logp"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
