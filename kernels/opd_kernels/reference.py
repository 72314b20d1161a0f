"""The definition of `vocab_parallel_stats` in plain PyTorch: any device, fp32 arithmetic (fp64 for fp64 logits).

Legend: N rows (tokens), V columns of this rank's vocabulary shard, K ids a row.

    logp_k = z_k/T - lse            entropy = lse - sum_j p_j z_j/T
    dz_j   = (1/T) * ( sum_k g_k [j == id_k] - p_j * (sum_k g_k + g_entropy * (z_j/T - lse + entropy)) )
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def vocab_parallel_stats(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    row_mask: torch.Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of given ids, and the entropy, under a softmax whose columns are split over `tp_group`.

    logits [N,V] fp32/bf16/fp64: columns `vocab_start` to `vocab_start + V` of the vocabulary; columns at or beyond `vocab_size`
    (the real, unpadded one) count as -inf. ids [N,K] int64, global; a negative id is ignored (0, no gradient). row_mask [N] bool:
    rows that are False are not trusted, give 0 and get no gradient. Returns logp [N,K] and entropy [N] (0 without
    `with_entropy`) in nats. Differentiable in `logits`; the backward pass needs no collective, as its inputs are the same on every
    rank of `tp_group`. Raises ValueError for shapes that do not fit.
    """
    if logits.dim() != 2 or ids.dim() != 2 or len(ids) != len(logits):
        raise ValueError(f"logits [N,V] and ids [N,K] are expected, got {tuple(logits.shape)} and {tuple(ids.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive")
    num_valid = logits.shape[1] if vocab_size is None else max(0, min(logits.shape[1], vocab_size - vocab_start))
    return _VocabParallelStats.apply(logits, ids, row_mask, vocab_start, num_valid, float(temperature), tp_group, with_entropy)


def _exp_shifted(values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """exp(values - shift) with exp(-inf - -inf) = 0."""
    return torch.where(values == -torch.inf, 0.0, (values - torch.where(shift == -torch.inf, 0.0, shift)).exp())


class _VocabParallelStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        ids: torch.Tensor,
        row_mask: torch.Tensor | None,
        vocab_start: int,
        num_valid: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z_NV = _scaled(logits, row_mask, num_valid, temperature)
        parallel = tp_group is not None and dist.get_world_size(tp_group) > 1
        max_N = z_NV.amax(1) if num_valid else z_NV.new_full((len(z_NV),), -torch.inf)
        if parallel:
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=tp_group)
        exp_NV = _exp_shifted(z_NV, max_N[:, None])
        local_NK = ids - vocab_start
        own_NK = (ids >= 0) & (local_NK >= 0) & (local_NK < num_valid)
        z_ids_NK = z_NV.gather(1, local_NK.where(own_NK, 0)) if num_valid else z_NV.new_zeros(ids.shape)
        weighted_N = (exp_NV * z_NV.where(exp_NV > 0, 0.0)).sum(1) if with_entropy else torch.zeros_like(max_N)
        packed = torch.cat([exp_NV.sum(1)[None], weighted_N[None], z_ids_NK.where(own_NK, 0.0).t()])
        if parallel:
            dist.all_reduce(packed, group=tp_group)
        lse_N = max_N + packed[0].log()
        entropy_N = lse_N - packed[1] / packed[0] if with_entropy else torch.zeros_like(lse_N)
        live_N = row_mask if row_mask is not None else torch.ones_like(lse_N, dtype=torch.bool)
        logp_NK = (packed[2:].t() - lse_N[:, None]).where((ids >= 0) & live_N[:, None], 0.0)
        entropy_N = entropy_N.where(live_N, 0.0)
        ctx.save_for_backward(logits, ids, row_mask, lse_N, entropy_N)
        ctx.settings = (vocab_start, num_valid, temperature, with_entropy)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logp_NK, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logp: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, ids, row_mask, lse_N, entropy_N = ctx.saved_tensors
        vocab_start, num_valid, temperature, with_entropy = ctx.settings
        z_NV = _scaled(logits, row_mask, num_valid, temperature)
        live_N = row_mask if row_mask is not None else torch.ones_like(lse_N, dtype=torch.bool)
        g_NK = grad_logp.where((ids >= 0) & live_N[:, None], 0.0)
        logp_NV = z_NV - lse_N[:, None]
        scale_NV = g_NK.sum(1, keepdim=True)
        if with_entropy:
            centred_NV = (logp_NV + entropy_N[:, None]).where(logp_NV > -torch.inf, 0.0)
            scale_NV = scale_NV + grad_entropy.where(live_N, 0.0)[:, None] * centred_NV
        dz_NV = -logp_NV.exp() * scale_NV
        local_NK = ids - vocab_start
        own_NK = (ids >= 0) & (local_NK >= 0) & (local_NK < num_valid)
        if num_valid:
            dz_NV.scatter_add_(1, local_NK.where(own_NK, 0), g_NK.where(own_NK, 0.0))
        grad = torch.zeros_like(logits)
        grad[:, :num_valid] = (dz_NV / temperature).where(live_N[:, None], 0.0).to(logits.dtype)
        return grad, None, None, None, None, None, None, None


def _scaled(logits: torch.Tensor, row_mask: torch.Tensor | None, num_valid: int, temperature: float) -> torch.Tensor:
    """Real columns as fp32 (or fp64) divided by the temperature; masked rows as zeros, whatever they hold."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z_NV = logits[:, :num_valid].to(dtype) / temperature
    return z_NV if row_mask is None else z_NV.where(row_mask[:, None], 0.0)
