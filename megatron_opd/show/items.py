"""A rollout with all that is shown of it. Legend: T tokens, K teacher candidates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.rows import Row, SampleName
from megatron_opd.records import Finish

# |log pi_T - log pi_ref| in nats from which a token has level 1, 2, ...; doubling, as most tokens differ by little and few by much.
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
CANDIDATES = 5  # of the teacher's that are kept of a token, the most likely first; a store may hold many more
MARKED = 1.0  # nats from which a token is marked where there are no colours: the probabilities differ by a factor of e


@dataclass(frozen=True)
class Place:
    """Where a rollout is: `index` in the store, None for one that was excluded when the store was made; `excluded`: the reason why it has no scores."""

    name: SampleName
    index: int | None
    excluded: str | None = None


@dataclass(frozen=True)
class Item:
    """tokens int32 [T]; log-probabilities float32 [T], NaN where there are none; candidates int32 and float32 [T, K]. `verdict`: None, not known."""

    place: Place
    tokens: np.ndarray
    prompt_len: int
    finish: Finish | None
    ref_logp: np.ndarray
    teacher_logp: np.ndarray
    student_logp: np.ndarray
    candidates: np.ndarray
    candidate_logp: np.ndarray
    verdict: Row | None
    are_log_probs: bool = True  # the teacher's; derived scores may be none

    @property
    def gap(self) -> np.ndarray:
        """log pi_T - log pi_ref, float32 [T] in nats: the advantage of distillation on policy."""
        return self.teacher_logp - self.ref_logp

    @property
    def left(self) -> np.ndarray:
        """log pi_T - log pi_student of now, float32 [T] in nats."""
        return self.teacher_logp - self.student_logp

    @property
    def response_len(self) -> int:
        return len(self.tokens) - self.prompt_len


def level(gap: np.ndarray) -> np.ndarray:
    """int8, from -5 (the teacher finds the token much less likely) to 5; 0 for less than the first level and for NaN."""
    found = np.searchsorted(LEVELS, np.abs(np.nan_to_num(gap)), side="right")
    return (np.sign(np.nan_to_num(gap)) * found).astype(np.int8)


def disagreement(gap: np.ndarray) -> float:
    """Sum of |log pi_T - log pi_ref| in nats over the tokens that have scores."""
    return float(np.abs(np.nan_to_num(gap.astype(np.float64))).sum())


def load_item(reader: StoreReader, place: Place, teacher: str | None, verdict: Row | None) -> Item:
    """Read one rollout, with its teacher's scores where it has some. `reader` is one without `teacher`: it cuts nothing."""
    nothing = np.empty(0, np.float32)
    if place.index is None:
        return Item(place, np.empty(0, np.int32), 0, None, nothing, nothing, nothing, np.empty((0, 0), np.int32), np.empty((0, 0)), verdict)
    rollout = reader.rollout(place.index)
    T = len(rollout.tokens)
    teacher_logp, candidates, candidate_logp = np.full(T, np.nan, np.float32), np.empty((T, 0), np.int32), np.empty((T, 0), np.float32)
    are_log_probs = True
    record = None if teacher is None else reader.score_manifest(int(reader.part_ids[place.index]), teacher)
    if teacher is not None and record is not None and place.excluded is None:
        scores = reader.scores(place.index, teacher, topk=bool(record.top_k))
        scored = len(scores.logp)  # fewer than T where the teacher takes no more
        teacher_logp[:scored], are_log_probs = scores.logp, scores.are_log_probs
        if scores.topk_ids is not None and scores.topk_logp is not None:
            K = min(CANDIDATES, scores.topk_ids.shape[1])
            candidates, candidate_logp = np.full((T, K), -1, np.int32), np.full((T, K), np.nan, np.float32)
            candidates[:scored], candidate_logp[:scored] = scores.topk_ids[:, :K], scores.topk_logp[:, :K]
    return Item(
        place,
        rollout.tokens,
        rollout.prompt_len,
        rollout.finish,
        rollout.student_logp,
        teacher_logp,
        np.full(T, np.nan, np.float32),
        candidates,
        candidate_logp,
        verdict,
        are_log_probs,
    )
