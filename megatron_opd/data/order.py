"""What training reads: which rollouts are in which step, and how long. A function of (seed, step), so that a resume needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.recipe.training_stages import TrainerConfig

# Settings that decide which rollouts are in which step; `order_settings` has what follows from others.
ORDER_FIELDS = ("seed", "global_batch", "global_batch_tokens", "max_response_tokens")


def order_settings(config: TrainerConfig) -> dict[str, Any]:
    """What decides, of given rollouts, which are in which step. Where steps are of tokens that is also where long ones are cut: by overlong =
    "cut", and by the loss's horizon."""
    found = {key: getattr(config, key) for key in ORDER_FIELDS}
    if config.global_batch_tokens is None:
        return found
    return found | {"cut_at": config.micro_batch_tokens if config.overlong == "cut" else None, "longest_response": config.longest_response}


def num_steps(epoch: int, *, step: int, epochs: int) -> int:
    """Steps that see everything at least `epochs` times; sizes of an epoch and of a step in rollouts or in tokens."""
    return -(-epoch * epochs // step)


def epoch_order(num_rollouts: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rollouts, int64 [num_rollouts]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rollouts)


@dataclass(frozen=True)
class TrainingOrder:
    """The rollouts, one epoch after the other without a gap, cut into steps: of `batch` rollouts, or of `batch_tokens` tokens.

    lengths: tokens of every rollout as training reads it, int64 [num_rollouts], each at least 1. In tokens, step s is the tokens from
    s * batch_tokens to (s + 1) * batch_tokens of all epochs laid end to end, and has the rollouts that begin there: so steps are full on
    average, where each begins follows from its number, and none is empty unless a rollout is longer than it.
    """

    lengths: np.ndarray
    seed: int
    batch: int | None
    batch_tokens: int | None = None

    @classmethod
    def of(cls, reader: StoreReader, config: TrainerConfig) -> TrainingOrder:
        return cls(cut_lengths(reader, config), config.seed, config.global_batch, config.global_batch_tokens)

    @property
    def _epoch_size(self) -> int:
        return len(self.lengths) if self.batch_tokens is None else int(self.lengths.sum())

    @property
    def _step_size(self) -> int:
        size = self.batch if self.batch_tokens is None else self.batch_tokens
        assert size is not None
        return size

    def num_steps(self, epochs: int) -> int:
        """Steps that see every rollout at least `epochs` times."""
        return num_steps(self._epoch_size, step=self._step_size, epochs=epochs)

    def epochs(self, steps: int) -> float:
        """How often `steps` steps see each rollout, on average."""
        return steps * self._step_size / self._epoch_size

    def repeats(self) -> bool:
        """Whether a step would have a rollout twice."""
        return self._step_size > self._epoch_size

    def rollouts(self, step: int) -> np.ndarray:
        """Rollouts of step `step` (from 0), in their order, int64 [n]. Raises ValueError where there are none at all."""
        if not len(self.lengths):
            raise ValueError("no rollouts")
        first, size = step * self._step_size, self._epoch_size
        pieces = []
        for epoch in range(first // size, (first + self._step_size - 1) // size + 1):
            order = epoch_order(len(self.lengths), seed=self.seed, epoch=epoch)
            begin, end = first - epoch * size, first - epoch * size + self._step_size
            if self.batch_tokens is not None:  # from tokens to places in the order
                lengths = self.lengths[order]
                starts = np.cumsum(lengths) - lengths
                begin, end = np.searchsorted(starts, [begin, end]).tolist()
            pieces.append(order[max(begin, 0) : end])
        return np.concatenate(pieces).astype(np.int64)


def cut_lengths(reader: StoreReader, config: TrainerConfig) -> np.ndarray:
    """Tokens of every rollout as training reads it at most, int64: responses cut at max_response_tokens and the loss's horizon, and by overlong = "cut"."""
    lengths = reader.lengths
    if config.longest_response is not None:
        lengths = np.minimum(lengths, reader.prompt_lens.astype(np.int64) + config.longest_response)
    return np.minimum(lengths, config.micro_batch_tokens) if config.overlong == "cut" else lengths
