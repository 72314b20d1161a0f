"""Definitions in float64 by plain autograd, which the kernels are held against, and random cases for them."""

from __future__ import annotations

import torch
from opd_kernels import ChunkLoss


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


def tolerance(eager: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, *, logits_scale: float, upstream: float = 0.0) -> float:
    """Twice eager's own largest error, one unit of `dtype` in the last place (the interpreter truncates to bf16), and what fp32 logits cost.

    `upstream`: for a gradient, the largest that it is multiplied with; its parts may cancel to far less, their errors don't.
    """
    if not truth.numel():
        return 0.0
    own = (eager.double() - truth).abs().max().item()
    largest = truth[truth.isfinite()].abs().max().item()
    return 2 * own + torch.finfo(dtype).eps * largest + 2.5e-7 * (1 + logits_scale) * max(1.0, largest, upstream)


def head_case(
    seed: int, tokens: int, chosen: int, vocab: int, *, width: int = 16, vocab_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, ChunkLoss]:
    """hidden [tokens,width], weight [vocab,width], `chosen` different rows, ids [chosen,3], and a loss of all its inputs."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    rows = torch.randperm(tokens, generator=generator)[:chosen]
    ids = torch.randint(vocab_size or vocab, (chosen, 3), generator=generator)
    share = torch.randn(chosen, 3, generator=generator)

    def loss(logp: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
        return (logp * share[part].to(logp.dtype)).sum() + (logp.exp()[:, 1] * logp[:, 2]).sum() - 0.3 * (entropy * share[part, 0]).sum()

    return hidden, weight, rows, ids, loss


def head_definition(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    loss: ChunkLoss,
    *,
    vocab_size: int,
    scale: float = 1.0,
) -> list[torch.Tensor]:
    """Loss, logp, entropy, and the gradients of hidden and weight of scale x loss, by autograd through all logits."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = hidden[rows] @ weight.t()
    logp, entropy = definition(logits if logits.dtype == torch.float64 else logits.float(), ids, vocab_size=vocab_size)
    total = loss(logp, entropy, slice(0, len(rows)))
    grads = torch.autograd.grad(total * scale, (hidden, weight))
    return [total.detach(), logp.detach(), entropy.detach(), *grads]
