"""Micro-batches of sequences of given lengths, made by train/batches.py from rollouts that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch.utils._python_dispatch import _disable_current_modes

from megatron_opd.data.vocabulary import Vocabulary
from megatron_opd.estimate.workload import PROMPT_TOKENS
from megatron_opd.model.architecture import Architecture
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.records import Finish, Rollout, TeacherScores
from megatron_opd.train.batches import BatchSource, MicroBatch


class _Rollouts:
    """What BatchSource asks of a store: one rollout for each length, K teacher candidates a response token."""

    def __init__(self, lengths: Sequence[int], top_k: int):
        self.location = SimpleNamespace(url="simulated rollouts")
        self.lengths = np.array(lengths, np.int64)
        self.prompt_lens = np.minimum(self.lengths - 1, PROMPT_TOKENS)
        self.top_k = top_k

    def __len__(self) -> int:
        return len(self.lengths)

    def rollout(self, index: int) -> Rollout:
        length, start = int(self.lengths[index]), int(self.prompt_lens[index])
        logp = np.where(np.arange(length) < start, np.nan, -1.0).astype(np.float32)
        return Rollout(np.zeros(length, np.int32), start, index, 0, Finish.STOP, logp)

    def scores(self, index: int, teacher: str, *, topk: bool) -> TeacherScores:
        rollout = self.rollout(index)
        if not (topk and self.top_k):
            return TeacherScores(rollout.student_logp)
        given = (np.arange(len(rollout.tokens)) >= rollout.prompt_len)[:, None]
        ids = np.where(given, np.arange(self.top_k), -1).astype(np.int32)
        return TeacherScores(rollout.student_logp, ids, np.where(given, -5.0, np.nan).astype(np.float32).repeat(self.top_k, 1))


def make_source(recipe: Recipe, stage: str, arch: Architecture, lengths: Sequence[int], *, cp_rank: int) -> BatchSource:
    """Of the stage's micro-batches; as train/loop.py makes it from a store. Raises UserError for a sequence longer than a micro-batch."""
    config: TrainerConfig = getattr(recipe, stage)
    distils = stage == "train"
    reader: Any = _Rollouts(lengths, recipe.score.top_k if distils else 0)
    source = BatchSource(
        reader=reader,
        config=config,
        teacher=recipe.train.teacher if distils else None,
        sequence_mean=distils and recipe.train.loss.normalization == "sequence",
        dp_rank=0,
        dp_size=1,
        pad_multiple=config.token_multiple,
        topk=distils and recipe.train.loss.needs_topk,
        cp_rank=cp_rank,
    )
    vars(source).update(num_candidates=reader.top_k, vocabulary=Vocabulary("the simulated student", arch.vocab_size))  # no files to read
    return source


def make_batch(source: BatchSource) -> MicroBatch:
    """One micro-batch of all the rollouts, real numbers in the host's memory."""
    with _disable_current_modes():
        return source.build(range(len(source.reader)))
