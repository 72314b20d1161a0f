"""Definitions in float64 by plain autograd, which the kernels are held against, and random cases for them."""

from __future__ import annotations

import torch


def definition(
    logits: torch.Tensor, ids: torch.Tensor, *, vocab_size: int, temperature: float = 1.0, row_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp [N,K] and entropy [N] of the whole vocabulary, in the precision of `logits`."""
    z = logits[:, :vocab_size] / temperature
    if row_mask is not None:
        z = z.where(row_mask[:, None], 0.0)
    logp = torch.log_softmax(z, -1)
    chosen = logp.gather(1, ids.clamp(min=0)).where(ids >= 0, 0.0)
    entropy = -(logp.exp() * logp.where(logp > -torch.inf, 0.0)).sum(-1)
    if row_mask is not None:
        chosen, entropy = chosen.where(row_mask[:, None], 0.0), entropy.where(row_mask, 0.0)
    return chosen, entropy


def random_case(
    seed: int, n: int, vocab: int, k: int, *, scale: float = 5.0, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [n,vocab], ids [n,k] below `vocab_size` with repeats and negatives, and random gradients of logp and entropy."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocab, generator=generator)
    ids = torch.randint(-1, vocab_size or vocab, (n, k), generator=generator)
    if k > 1:
        ids[:, 1] = ids[:, 0]
    return logits, ids, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)


def tolerance(eager: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, *, logits_scale: float) -> float:
    """Twice eager's own largest error, one unit of `dtype` in the last place (the interpreter truncates to bf16), and what fp32 logits cost."""
    if not truth.numel():
        return 0.0
    own = (eager.double() - truth).abs().max().item()
    largest = truth[truth.isfinite()].abs().max().item()
    return 2 * own + torch.finfo(dtype).eps * largest + 2.5e-7 * (1 + logits_scale) * max(1.0, largest)
