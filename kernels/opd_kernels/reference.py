"""The definition of `vocab_parallel_stats` in plain PyTorch: any device, fp32 arithmetic (fp64 for fp64 logits).

Legend: N rows (tokens), V columns of this rank's vocabulary shard, R of them real, K ids a row.

    logp_k = z_k/T - lse            entropy = lse - sum_j p_j z_j/T
    dz_j   = (1/T) * ( sum_k g_k [j == id_k] - p_j * (sum_k g_k + g_entropy * (z_j/T - lse + entropy)) )

Rows are worked on in blocks, so that an fp32 copy of all logits is never held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from opd_kernels.shards import LocalStats, RowGradients, Shard

_BLOCK_ELEMENTS = 1 << 22  # 16 MiB in fp32


def local_stats(logits: torch.Tensor, ids: torch.Tensor, row_mask: torch.Tensor | None, shard: Shard) -> LocalStats:
    """Maximum, sum of exponentials, their weighted sum and the logits at `ids` of this rank's columns."""
    stats = LocalStats.empty(len(logits), ids.shape[1], dtype=shard.dtype(logits), device=logits.device)
    local_NK, own_NK = shard.local_ids(ids)
    for rows in _row_blocks(logits):
        z_NR = _scaled(logits[rows], None if row_mask is None else row_mask[rows], shard)
        max_N = z_NR.amax(1) if shard.num_real else z_NR.new_full((len(z_NR),), -torch.inf)
        shifted_NR = z_NR - max_N.where(max_N > -torch.inf, 0.0)[:, None]
        exp_NR = shifted_NR.exp()
        stats.max_N[rows] = max_N
        stats.sum_N[rows] = exp_NR.sum(1)
        stats.weighted_N[rows] = (exp_NR * shifted_NR.where(exp_NR > 0, 0.0)).sum(1) if shard.with_entropy else 0.0
        own = own_NK[rows]
        stats.z_ids_NK[rows] = z_NR.gather(1, local_NK[rows]).where(own, 0.0) if shard.num_real else 0.0
    return stats


def write_gradient_(
    out: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, row_mask: torch.Tensor | None, shard: Shard, rows: RowGradients
) -> None:
    """Write the gradient of the logits into `out`, which may be `logits` itself."""
    local_NK, own_NK = shard.local_ids(ids)
    for block in _row_blocks(logits):
        mask = None if row_mask is None else row_mask[block]
        logp_NR = _scaled(logits[block], mask, shard) - rows.lse_N[block, None]
        scale_NR = rows.g_logp_NK[block].sum(1, keepdim=True)
        if shard.with_entropy:
            centred_NR = (logp_NR + rows.entropy_N[block, None]).where(logp_NR > -torch.inf, 0.0)
            scale_NR = scale_NR + rows.g_entropy_N[block, None] * centred_NR
        dz_NR = -logp_NR.exp() * scale_NR
        if shard.num_real:
            dz_NR.scatter_add_(1, local_NK[block], rows.g_logp_NK[block].where(own_NK[block], 0.0))
        dz_NR /= shard.temperature
        out[block, shard.num_real :].zero_()
        out[block, : shard.num_real] = (dz_NR if mask is None else dz_NR.where(mask[:, None], 0.0)).to(out.dtype)


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return (slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size))


def _scaled(logits: torch.Tensor, row_mask: torch.Tensor | None, shard: Shard) -> torch.Tensor:
    """Real columns in the working precision, divided by the temperature; masked rows as zeros, whatever they hold."""
    z_NR = logits[:, : shard.num_real].to(shard.dtype(logits)) / shard.temperature
    return z_NR if row_mask is None else z_NR.where(row_mask[:, None], 0.0)
