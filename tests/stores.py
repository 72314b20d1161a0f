"""Small stores of random rollouts and scores, written through the real writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.records import Finish, Lineage, ModelFingerprint, PromptFile, Rollout, SamplingParams, TeacherScores
from megatron_opd.store_records import ScoreManifest, StoreManifest


def random_rollout(
    rng: np.random.Generator, prompt: int, sample: int, *, vocab: int, max_prompt: int = 20, max_response: int = 60
) -> Rollout:
    prompt_len, response_len = int(rng.integers(1, max_prompt + 1)), int(rng.integers(1, max_response + 1))
    logp = np.full(prompt_len + response_len, np.nan, np.float32)
    logp[prompt_len:] = -rng.exponential(2.0, response_len)
    tokens = rng.integers(3, vocab, prompt_len + response_len).astype(np.int32)  # no padding: transformers gives its row no gradient
    return Rollout(tokens, prompt_len, prompt, sample, Finish.STOP, logp)


def random_candidates(rng: np.random.Generator, rollout: Rollout, vocab: int, top_k: int) -> tuple[np.ndarray, np.ndarray] | tuple[()]:
    """Different ids at each response token, and log-probabilities whose sum leaves something to the tail; nothing for top_k 0."""
    if not top_k:
        return ()
    shape = (len(rollout.tokens), top_k)
    ids, logp = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float32)
    for t in range(rollout.prompt_len, len(rollout.tokens)):
        ids[t] = rng.permutation(vocab)[:top_k]
        logp[t] = np.log(np.sort(rng.dirichlet(np.ones(top_k + 1))[:top_k])[::-1] + 1e-6)
    return ids, logp


def make_scored_store(
    path: Path,
    *,
    sampler: ModelFingerprint | Path,
    teacher: ModelFingerprint | Path,
    prompts: int = 10,
    samples: int = 2,
    seed: int = 0,
    top_k: int = 0,
    sampler_role: str = "student",
    lineage: Lineage | None = None,
) -> StoreReader:
    """A whole store, scored by `teacher` under the name 'teacher', with its `top_k` candidates a token."""
    student_fp = sampler if isinstance(sampler, ModelFingerprint) else fingerprint_model(sampler)
    teacher_fp = teacher if isinstance(teacher, ModelFingerprint) else fingerprint_model(teacher)
    rng = np.random.default_rng(seed)
    manifest = StoreManifest(
        sampler_role=sampler_role,
        sampler=student_fp,
        lineage=lineage or Lineage(base=student_fp, sft_teacher=teacher_fp),
        prompts=PromptFile(name="prompts.jsonl", sha256="0" * 64, num_prompts=prompts),
        prompts_per_part=4,
        sampling=SamplingParams(samples_per_prompt=samples, max_new_tokens=60),
    )
    location = create_store(str(path), manifest)
    for part in range(manifest.num_parts):
        rollouts = [random_rollout(rng, p, s, vocab=student_fp.vocab_size) for p in manifest.prompt_range(part) for s in range(samples)]
        write_part(location, part, rollouts, [], {})
        record = StoreReader(str(path)).parts[part]
        scores = []
        for rollout in rollouts:
            logp = rollout.student_logp.copy()
            logp[rollout.prompt_len :] = -rng.exponential(2.0, rollout.response_len)
            scores.append(TeacherScores(logp, *random_candidates(rng, rollout, student_fp.vocab_size, top_k)))
        write_scores(
            location,
            "teacher",
            ScoreManifest(part=part, teacher=teacher_fp, top_k=top_k, part_crc32c=record.crc32c, crc32c={}),
            rollouts,
            scores,
        )
    return StoreReader(str(path))
