"""`vocab_parallel_stats` against float64 autograd of its definition, whole and split over gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import vocab_parallel_stats
from ranks import KERNEL_WORKER, run_ranks


def definition(
    logits: torch.Tensor, ids: torch.Tensor, vocab_size: int, temperature: float, row_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in float64 by plain autograd."""
    z = logits.double()[:, :vocab_size] / temperature
    if row_mask is not None:
        z = z.where(row_mask[:, None], 0.0)
    logp = torch.log_softmax(z, -1)
    chosen = logp.gather(1, ids.clamp(min=0)).where(ids >= 0, 0.0)
    entropy = -(logp.exp() * logp.where(logp > -torch.inf, 0.0)).sum(-1)
    if row_mask is not None:
        chosen, entropy = chosen.where(row_mask[:, None], 0.0), entropy.where(row_mask, 0.0)
    return chosen, entropy


def case(seed: int, n: int, vocab: int, k: int, *, scale: float = 5.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [n,vocab], ids [n,k] with repeats and negatives, and random gradients for both outputs."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocab, generator=generator)
    ids = torch.randint(-1, vocab, (n, k), generator=generator)
    return logits, ids, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)


def both(logits: torch.Tensor, ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor, **options: Any) -> None:
    vocab_size, temperature = options.get("vocab_size") or logits.shape[1], options.get("temperature", 1.0)
    truth = logits.double().clone().requires_grad_()
    ids_in_range = ids.where(ids < vocab_size, -1)
    expected = definition(truth, ids_in_range, vocab_size, temperature, options.get("row_mask"))
    (2 * (expected[0] * g_logp).sum() + (expected[1] * g_entropy).sum()).backward()
    given_logits = logits.clone().requires_grad_()
    logp, entropy = vocab_parallel_stats(given_logits, ids_in_range, **options)
    (2 * (logp * g_logp).sum() + (entropy * g_entropy).sum()).backward()
    assert logp.dtype == torch.float32 or logits.dtype == torch.float64
    tolerance = 2e-5 * (1 + logits[logits.isfinite()].abs().max().item() / temperature) if logits.numel() else 0
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=tolerance)
    assert given_logits.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(given_logits.grad.double(), truth.grad.nan_to_num(0.0), rtol=0, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 9),
    st.integers(1, 41),
    st.integers(0, 5),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.booleans(),
    st.data(),
)
def test_agrees_with_the_definition(seed: int, n: int, vocab: int, k: int, temperature: float, masked: bool, data: Any) -> None:
    logits, ids, g_logp, g_entropy = case(seed, n, vocab, k)
    vocab_size = data.draw(st.integers(1, vocab))
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    both(logits, ids, g_logp, g_entropy, vocab_size=vocab_size, temperature=temperature, row_mask=mask)


def test_large_and_minus_infinite_logits() -> None:
    logits, ids, g_logp, g_entropy = case(0, 8, 50, 3, scale=200.0)
    logits[:, 7] = -torch.inf
    both(logits, ids.where(ids != 7, -1), g_logp, g_entropy)


def test_a_nan_in_a_masked_row_does_not_spread() -> None:
    logits, ids, *_ = case(1, 4, 20, 2)
    logits[2] = torch.nan
    mask = torch.tensor([True, True, False, True])
    leaf = logits.clone().requires_grad_()
    logp, entropy = vocab_parallel_stats(leaf, ids, row_mask=mask)
    (logp.sum() + entropy.sum()).backward()
    assert leaf.grad is not None
    assert logp.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[2] == 0).all()
    assert (logp[2] == 0).all()


def test_bf16_logits_give_fp32_results_and_bf16_gradients() -> None:
    logits, ids, *_ = case(2, 6, 64, 1)
    leaf = logits.bfloat16().requires_grad_()
    logp, entropy = vocab_parallel_stats(leaf, ids)
    logp.sum().backward()
    assert leaf.grad is not None
    assert (logp.dtype, entropy.dtype, leaf.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    expected, _ = definition(leaf.detach().float(), ids, 64, 1.0, None)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-4)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="are expected"):
        vocab_parallel_stats(torch.zeros(3, 5), torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature"):
        vocab_parallel_stats(torch.zeros(3, 5), torch.zeros(3, 1, dtype=torch.long), temperature=0.0)


@pytest.mark.parametrize(("world", "vocab"), [(2, 37), (4, 37), (4, 29)])
def test_tensor_parallel_equals_whole(tmp_path: Path, world: int, vocab: int) -> None:
    """40 columns; with 29 real ones the last of four ranks holds padding alone."""
    worst = run_ranks("tensor_parallel", world, tmp_path, worker=KERNEL_WORKER, vocab=vocab, padded=40)
    assert len(worst) == 3
    assert max(worst.values()) < 1e-5, worst
