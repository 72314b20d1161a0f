"""What recurs of a disagreement between a teacher and the policy that sampled: Lightning OPD 2.0, arXiv 2607.28449.

The disagreement of a token is d = log pi_T - log pi_ref. What is alike of it at coarse coordinates of tokens in unrelated responses, b, comes from
how the two models write, not from what the prompt asks; d - b is left. b is the mean of two tables of weighted means of d: by token id, and by bin
of position in the response x bin of pi_ref's surprisal. Each table of a fold is made of the prompts of the other folds.

Legend: N response tokens, F folds, G groups of a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd.errors import StoreError
from megatron_opd.records import Rollout, TeacherScores

_SURPRISAL_NATS = (0.01, 10.0)  # where the first bin ends and the last begins; the others are as wide as one another in log nats


@dataclass(frozen=True)
class ResponseTokens:
    """The scored response tokens of some rollouts, in order: ids, disagreement and their three coordinates."""

    ids_N: np.ndarray  # int64
    gap_N: np.ndarray  # float64: log pi_T - log pi_ref
    weight_N: np.ndarray  # float64: 1 / response tokens, so that every response weighs 1
    fold_N: np.ndarray  # int64
    context_N: np.ndarray  # int64: position bin * surprisal bins + surprisal bin


def fold_of(prompt: int, *, folds: int, seed: int) -> int:
    """The fold of a prompt with all its samples: a hash of its row and the seed, whatever part it lies in."""
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % folds


def surprisal_edges(bins: int) -> np.ndarray:
    """Where all bins but the first begin, nats; float64 [bins - 1]."""
    first, last = np.log10(_SURPRISAL_NATS)
    return 10.0 ** np.linspace(first, last, bins - 1)


def response_tokens(scored: Sequence[tuple[Rollout, TeacherScores]], settings: dict[str, Any]) -> ResponseTokens:
    """Response tokens of rollouts, each cut to what was scored of it."""
    lengths = np.array([rollout.response_len for rollout, _ in scored], np.int64)
    folds = np.array([fold_of(r.prompt_index, folds=settings["folds"], seed=settings["seed"]) for r, _ in scored], np.int64)
    ids, student, teacher = (
        np.concatenate([array[rollout.prompt_len :] for rollout, array in pairs]) if scored else np.empty(0)
        for pairs in (
            [(rollout, rollout.tokens) for rollout, _ in scored],
            [(rollout, rollout.student_logp) for rollout, _ in scored],
            [(rollout, scores.logp) for rollout, scores in scored],
        )
    )
    student_N, lengths_N = student.astype(np.float64), np.repeat(lengths, lengths)
    place_N = np.arange(len(lengths_N)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    position_N = place_N * settings["position_bins"] // np.maximum(lengths_N, 1)
    surprisal_N = np.searchsorted(surprisal_edges(settings["surprisal_bins"]), -student_N, side="right")
    return ResponseTokens(
        ids_N=ids.astype(np.int64),
        gap_N=teacher.astype(np.float64) - student_N,
        weight_N=1.0 / lengths_N,
        fold_N=np.repeat(folds, lengths),
        context_N=position_N * settings["surprisal_bins"] + surprisal_N,
    )


class RecurringPart:
    """The tables: `add` every response of a store, `fit`, then `of` gives b for any of its tokens. Memory is a few float64 [F, G] a table.

    Sums are made token by token in the order in which they are added, so that they don't depend on how a store is divided into parts.
    """

    def __init__(self, settings: dict[str, Any], vocab_size: int):
        self.folds, self.smoothing = int(settings["folds"]), float(settings["smoothing"])
        sizes = (vocab_size, settings["position_bins"] * settings["surprisal_bins"])
        self._weights = [np.zeros((self.folds, size)) for size in sizes]
        self._sums = [np.zeros((self.folds, size)) for size in sizes]
        self._tokens_F = np.zeros(self.folds, np.int64)
        self.tables: list[np.ndarray] = []  # float64 [F, G], of token ids and of contexts

    def add(self, tokens: ResponseTokens) -> None:
        for weights, sums, group_N in zip(self._weights, self._sums, (tokens.ids_N, tokens.context_N), strict=True):
            np.add.at(weights, (tokens.fold_N, group_N), tokens.weight_N)
            np.add.at(sums, (tokens.fold_N, group_N), tokens.weight_N * tokens.gap_N)
        self._tokens_F += np.bincount(tokens.fold_N, minlength=self.folds)

    def fit(self) -> None:
        """Make the tables: for each fold the means of the others, drawn towards their global mean. Raises StoreError where there are no others."""
        self.tables = [np.empty_like(sums) for sums in self._sums]
        for fold in np.flatnonzero(self._tokens_F):
            others = np.flatnonzero(np.arange(self.folds) != fold)
            if not (num_tokens := int(self._tokens_F[others].sum())):
                raise StoreError(
                    f"all prompts that have scores fall into one of {self.folds} folds, so that nothing is left to fit on; it takes more prompts, or more folds"
                )
            for table, weights, sums in zip(self.tables, self._weights, self._sums, strict=True):
                weight_G, sum_G = weights[others].sum(0), sums[others].sum(0)
                mean = sum_G.sum() / weight_G.sum()
                prior = self.smoothing * weight_G.sum() / num_tokens  # the weight of so many tokens
                seen_G = weight_G > 0
                table[fold] = mean
                table[fold, seen_G] = (sum_G[seen_G] + prior * mean) / (weight_G[seen_G] + prior)

    @property
    def mean(self) -> float:
        """Of d over all folds, each response with weight 1."""
        return float(self._sums[0].sum() / self._weights[0].sum())

    def of(self, tokens: ResponseTokens) -> np.ndarray:
        """b, float64 [N]."""
        by_token, by_context = self.tables
        return 0.5 * by_token[tokens.fold_N, tokens.ids_N] + 0.5 * by_context[tokens.fold_N, tokens.context_N]
