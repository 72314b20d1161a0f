"""Which tokens of a pack each context-parallel rank holds."""

from __future__ import annotations

import numpy as np


def context_parallel_tokens(bounds: np.ndarray, *, cp: int, rank: int) -> np.ndarray:
    """Indices into the pack, int64 [S/cp], of the tokens of `rank`, in its order; `bounds` [B+1] are the sequences' ends from 0.

    Each sequence is cut into 2 * cp pieces, and rank r has pieces r and 2 * cp - 1 - r, so that all ranks have the same causal work
    (as Megatron-Core and Transformer Engine cut). Raises ValueError if a length is not a multiple of 2 * cp.
    """
    lengths = np.diff(bounds)
    if (lengths % (2 * cp)).any():
        raise ValueError(f"lengths {lengths[lengths % (2 * cp) != 0].tolist()} are not multiples of {2 * cp}")
    pieces = []
    for start, length in zip(bounds[:-1], lengths, strict=True):
        size = length // (2 * cp)
        pieces += [np.arange(size) + start + piece * size for piece in (rank, 2 * cp - 1 - rank)]
    return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
