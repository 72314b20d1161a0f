"""`vocab_parallel_stats`: log-probabilities at chosen ids and the entropy, over a vocabulary split across tensor-parallel ranks.

Legend: N rows (tokens), V columns of this rank's vocabulary shard, K ids a row.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_kernels import reference
from opd_kernels.shards import RowGradients, Shard

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "triton", "torch")


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
    inplace_backward: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of given ids, and the entropy, under a softmax whose columns are split over `tp_group`.

    logits [N,V] fp32/bf16/fp16/fp64 (fp64: impl "torch" alone): columns `vocab_start` to `vocab_start + V` of the vocabulary; those
    at or beyond `vocab_size` (the real, unpadded one; by default all are real) count as -inf. ids [N,K] int64, global, repeats
    allowed; a negative id is ignored (0, no gradient), one at or beyond `vocab_size` has log-probability -inf. row_mask [N] bool:
    rows that are False are neither read nor trusted, give 0 and get no gradient. Returns logp [N,K] and entropy [N] (0 without
    `with_entropy`) in nats, fp32 (fp64 of fp64 logits).

    Differentiable once in `logits`; the backward pass needs no collective, as its inputs are the same on every rank of `tp_group`.
    `inplace_backward` writes the gradient over the logits, which must be nobody else's: a second backward raises, and so does any
    other use of them in a backward pass. `impl`: "triton" (a CUDA GPU, or TRITON_INTERPRET=1), "torch", or "auto", which chooses
    Triton for CUDA tensors and says so once in the log.
    Raises ValueError for shapes, dtypes and devices that do not fit. Formulas: `opd_kernels.reference`.
    """
    if logits.dim() != 2 or ids.dim() != 2 or len(ids) != len(logits):
        raise ValueError(f"logits [N,V] and ids [N,K] are expected, got {tuple(logits.shape)} and {tuple(ids.shape)}")
    if ids.dtype != torch.int64 or not logits.is_floating_point():
        raise ValueError(f"floating-point logits and int64 ids are expected, got {logits.dtype} and {ids.dtype}")
    if row_mask is not None and (row_mask.shape != logits.shape[:1] or row_mask.dtype != torch.bool):
        raise ValueError(f"row_mask must be bool [{len(logits)}], got {row_mask.dtype} {tuple(row_mask.shape)}")
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward would overwrite a leaf tensor; give it logits that were computed, or a clone")
    shard = make_shard(logits.shape[1], vocab_start, vocab_size, temperature, tp_group, with_entropy)
    return _VocabParallelStats.apply(logits, ids.contiguous(), row_mask, shard, tp_group, inplace_backward, choose(impl, logits))


def make_shard(
    width: int, vocab_start: int, vocab_size: int | None, temperature: float, tp_group: dist.ProcessGroup | None, with_entropy: bool
) -> Shard:
    """The shard of `width` columns from `vocab_start`; without `vocab_size` every column of equal shards is real. Raises ValueError."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    if vocab_size is not None and vocab_size <= 0:
        raise ValueError(f"vocab_size {vocab_size} is not positive")
    if vocab_size is None:
        vocab_size = max(vocab_start + width, width * (dist.get_world_size(tp_group) if tp_group is not None else 1))
    return Shard(vocab_start, max(0, min(width, vocab_size - vocab_start)), vocab_size, float(temperature), with_entropy)


def choose(impl: str, logits: torch.Tensor) -> ModuleType:
    """The module that computes: `reference` or `triton_kernels`. Raises ValueError for what can't run."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        impl = _automatic(logits.device.type, logits.dtype)
    if impl == "torch":
        return reference
    from opd_kernels import triton_kernels

    if logits.device.type != "cuda" and not triton_kernels.is_interpreted():
        raise ValueError(
            f"impl 'triton' needs a CUDA GPU (or TRITON_INTERPRET=1), the logits are on {logits.device}; use 'auto' or 'torch'"
        )
    if logits.dtype == torch.float64:
        raise ValueError("impl 'triton' computes in fp32; use 'torch' for fp64 logits")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"impl 'triton' needs logits whose columns are contiguous, got strides {logits.stride()}")
    return triton_kernels


@cache
def _automatic(device: str, dtype: torch.dtype) -> str:
    impl = "triton" if device == "cuda" and dtype != torch.float64 else "torch"
    logger.info("vocab_parallel_stats: %s for %s logits on %s", impl, dtype, device)
    return impl


def forward_stats(
    logits: torch.Tensor,
    ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    shard: Shard,
    tp_group: dist.ProcessGroup | None,
    backend: ModuleType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp [N,K], entropy [N], and what the gradient needs of the forward: log-sum-exp [N] and logits at ids [N,K], all global."""
    stats = backend.local_stats(logits, ids, row_mask, shard)
    stats.reduce_(tp_group)
    log_sum_N = stats.sum_N.log()
    lse_N = stats.max_N + log_sum_N
    ignored_NK = ids < 0 if row_mask is None else (ids < 0) | ~row_mask[:, None]
    logp_NK = (stats.z_ids_NK - lse_N[:, None]).masked_fill(ids >= shard.vocab_size, -torch.inf).masked_fill(ignored_NK, 0.0)
    entropy_N = log_sum_N - stats.weighted_N / stats.sum_N if shard.with_entropy else torch.zeros_like(lse_N)
    if row_mask is not None:
        entropy_N = entropy_N.where(row_mask, 0.0)
    return logp_NK.contiguous(), entropy_N, lse_N, stats.z_ids_NK


def row_gradients(
    ids: torch.Tensor,
    row_mask: torch.Tensor | None,
    shard: Shard,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    g_logp: torch.Tensor,
    g_entropy: torch.Tensor,
) -> RowGradients:
    """Upstream gradients with 0 where an id or a row is ignored; `saved` is (log-sum-exp, entropy, logits at ids)."""
    lse_N, entropy_N, z_ids_NK = saved
    ignored_NK = (ids < 0) | (ids >= shard.vocab_size)
    if row_mask is not None:
        ignored_NK = ignored_NK | ~row_mask[:, None]
        g_entropy = g_entropy.where(row_mask, 0.0)
    g_logp = g_logp.to(lse_N.dtype).masked_fill(ignored_NK, 0.0).contiguous()
    return RowGradients(lse_N, entropy_N, z_ids_NK, g_logp, g_entropy.to(lse_N.dtype).contiguous())


class _VocabParallelStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        ids: torch.Tensor,
        row_mask: torch.Tensor | None,
        shard: Shard,
        tp_group: dist.ProcessGroup | None,
        inplace_backward: bool,
        backend: ModuleType,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp_NK, entropy_N, lse_N, z_ids_NK = forward_stats(logits, ids, row_mask, shard, tp_group, backend)
        ctx.save_for_backward(logits, ids, row_mask, lse_N, entropy_N, z_ids_NK)
        ctx.shard, ctx.backend, ctx.inplace_backward, ctx.spent = shard, backend, inplace_backward, False
        if not shard.with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logp_NK, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: torch.Tensor, g_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "vocab_parallel_stats: a second backward, but the first has written its gradient over the logits (inplace_backward)"
            )
        logits, ids, row_mask, *saved = ctx.saved_tensors
        rows = row_gradients(ids, row_mask, ctx.shard, tuple(saved), g_logp, g_entropy)
        logits = logits.detach()
        out = logits if ctx.inplace_backward else torch.empty_like(logits)
        ctx.backend.write_gradient_(out, logits, ids, row_mask, ctx.shard, rows)
        if ctx.inplace_backward:
            ctx.spent = True
            torch.autograd.graph.increment_version(logits)  # whoever else saved the logits for a backward pass hears of it
        return out, None, None, None, None, None, None
