"""RoPE by positions against Megatron-Core's own for packed sequences, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.data.context import context_parallel_tokens
from megatron_opd.model.rope import rotation

from megatron.core.models.common.embeddings import rope_utils  # isort: skip
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # isort: skip


class Group:
    """What Megatron-Core asks a process group."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def embedding(**options: Any) -> RotaryEmbedding:
    return RotaryEmbedding(64, rotary_percent=1.0, rotary_base=1_000_000, use_cpu_initialization=True, cp_group=Group(1, 0), **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"rope_scaling": True, "rope_scaling_factor": 8.0}], ids=["plain", "llama3"])
@pytest.mark.parametrize(("cp", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_the_same_bits_as_megatron(dtype: torch.dtype, options: dict[str, Any], cp: int, rank: int) -> None:
    lengths = [4, 1028, 8, 516, 12] if cp == 2 else [3, 1027, 1, 515, 11]
    bounds = np.cumsum([0, *lengths])
    mine = context_parallel_tokens(bounds, cp=cp, rank=rank) if cp > 1 else np.arange(bounds[-1])
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])[mine])
    rope = embedding(**options)
    x_SHD = torch.randn(len(mine), 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    made = rotation(positions, rope.inv_freq, dtype).apply(x_SHD)
    wanted = rope_utils._apply_rotary_pos_emb_thd(
        x_SHD,
        torch.from_numpy(bounds).int(),
        rope(max(lengths), packed_seq=True),
        cp_group=Group(cp, rank),  # pyright: ignore[reportArgumentType]
    )
    assert torch.equal(made, wanted)
    upstream = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = (torch.autograd.grad(value, x_SHD, upstream)[0] for value in (made, wanted))
    assert torch.equal(*gradients)


def test_numbers_of_another_position_differ() -> None:
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0))
    frequencies = embedding().inv_freq
    here, there = (rotation(torch.arange(4) + shift, frequencies, torch.float32).apply(x) for shift in (0, 1))
    assert not torch.allclose(here, there, atol=0.1)
