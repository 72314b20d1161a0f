"""What training reads: which rollouts are in which step, and how long. A function of (seed, step), so that a resume needs no state."""

from __future__ import annotations

import numpy as np

from megatron_opd.config import TrainerConfig
from megatron_opd.data.store import StoreReader


def num_steps(num_rollouts: int, *, global_batch: int, epochs: int) -> int:
    """Steps that see every rollout at least `epochs` times."""
    return -(-num_rollouts * epochs // global_batch)


def epoch_order(num_rollouts: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rollouts, int64 [num_rollouts]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rollouts)


def step_rollouts(step: int, num_rollouts: int, *, global_batch: int, seed: int) -> np.ndarray:
    """Rollouts of step `step` (from 0), int64 [global_batch]; epochs follow each other without a gap."""
    if num_rollouts == 0:
        raise ValueError("no rollouts")
    wanted = np.arange(step * global_batch, (step + 1) * global_batch)
    epochs = wanted // num_rollouts
    orders = {int(epoch): epoch_order(num_rollouts, seed=seed, epoch=int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(epoch)][index] for epoch, index in zip(epochs, wanted % num_rollouts, strict=True)], np.int64)


def cut_lengths(reader: StoreReader, config: TrainerConfig) -> np.ndarray:
    """Tokens of every rollout as training reads it, int64: responses cut at max_response_tokens, and by overlong = "cut"."""
    lengths = reader.lengths
    if config.max_response_tokens is not None:
        lengths = np.minimum(lengths, reader.prompt_lens.astype(np.int64) + config.max_response_tokens)
    return np.minimum(lengths, config.micro_batch_tokens) if config.overlong == "cut" else lengths
