"""Attention over packed sequences, against one sequence at a time; PyTorch's variable-length attention where a GPU has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.model.layers import packed_attention, varlen_attention

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip


def pack(lengths: list[int], *, heads: int, shared: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """query, key, value of random numbers and what Megatron tells attention of them; `shared` heads read one key."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total, bounds = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = [torch.randn(total, n, 16, generator=generator).to(device, dtype) for n in (heads, heads // shared, heads // shared)]
    bounds = bounds.to(device)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    return *(tensor.requires_grad_() for tensor in tensors), packed


def one_at_a_time(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    pieces = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(pieces)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), shared=st.sampled_from([1, 2, 4]))
def test_a_pack_is_its_sequences(lengths: list[int], shared: int) -> None:
    *leaves, packed = pack(lengths, heads=4, shared=shared)
    found, expected = packed_attention(*leaves, packed), one_at_a_time(*leaves, lengths)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for made, wanted in zip(
        torch.autograd.grad((found * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("shared", [1, 4])
def test_pytorch_takes_what_its_variable_length_attention_is_given(shared: int) -> None:
    """On the meta device, which checks arguments and shapes and computes nothing."""
    if varlen_attention() is None:
        pytest.skip(f"PyTorch {torch.__version__} has no variable-length attention")
    query, key, value, packed = pack([3, 5], heads=4, shared=shared, device="meta", dtype=torch.bfloat16)
    assert packed_attention(query, key, value, packed).shape == (8, 4, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [1, 4])
def test_variable_length_attention_agrees_with_one_sequence_at_a_time(shared: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    lengths = [37, 1, 256, 100]
    *leaves, packed = pack(lengths, heads=8, shared=shared, device="cuda", dtype=torch.bfloat16)
    found = packed_attention(*leaves, packed)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = one_at_a_time(*exact, lengths)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    for made, wanted in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(made.double(), wanted, rtol=5e-2, atol=5e-2)
