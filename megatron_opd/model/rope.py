"""Rotary positions of packed sequences, by the position of each token, for layers without Transformer Engine.

Megatron-Core's own (`_apply_rotary_pos_emb_thd`) asks the GPU for the lengths of the sequences, and so waits for it, twice in each layer.
This one is told the positions and makes the same numbers, bit for bit: angle = position x frequency in float32, its cosine and sine
rounded to the type of the activations. They are made once a micro-batch, not once for queries and once for keys of each layer.

Legend: S packed tokens of this rank, H heads of this rank, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [S,1,D]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[S,H,D] -> [S,H,D]: dimension i is turned with dimension i + D/2."""
        first, second = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat((-second, first), -1) * self.sin.to(x.dtype)


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """positions int64 [S], each counted within its sequence; frequencies float32 [D/2] (`RotaryEmbedding.inv_freq`)."""
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    angles = torch.cat((angles, angles), -1)[:, None]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
