"""How many of a teacher's candidates are among the student's own most probable tokens, over a vocabulary split across ranks.

Legend: N rows (tokens), V columns of this rank's vocabulary shard, K candidates a row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd_kernels.stats import make_shard

_BLOCK_BYTES = 64 << 20


def topk_overlap(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Share of each row's K `ids` that are among the K largest logits of the row, float32 [N]; a tie with the last of these counts.

    logits [N,V] and the options as in `vocab_parallel_stats`, ids int64 [N,K]; the result is the same on every rank of `tp_group`.
    Source: the overlap ratio of "Rethinking On-Policy Distillation", arXiv 2604.13016.
    """
    shard = make_shard(logits.shape[1], vocab_start, vocab_size, 1.0, tp_group, with_entropy=False)
    k = ids.shape[1]
    real_NV = logits.detach()[:, : shard.num_real]
    top_NK = _largest(real_NV, k)
    columns_NK, own_NK = shard.local_ids(ids)
    at_ids_NK = real_NV.gather(1, columns_NK).masked_fill(~own_NK, -torch.inf) if shard.num_real else torch.full_like(top_NK, -torch.inf)
    if tp_group is not None and dist.get_world_size(tp_group) > 1:
        everybody = [torch.empty_like(top_NK) for _ in range(dist.get_world_size(tp_group))]
        dist.all_gather(everybody, top_NK, group=tp_group)
        top_NK = torch.cat(everybody, 1).topk(k, dim=1).values
        dist.all_reduce(at_ids_NK, op=dist.ReduceOp.MAX, group=tp_group)
    return (at_ids_NK >= top_NK[:, -1:]).float().mean(1)


def _largest(z_NV: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row in falling order, [N,k]; -inf after the last column of rows that are shorter."""
    here = min(k, z_NV.shape[1])
    top_NK = z_NV.new_full((len(z_NV), k), -torch.inf)
    # On a GPU topk copies what is not contiguous (a shard with padding), so that is done in blocks of rows.
    row_bytes = max(1, z_NV.shape[1] * z_NV.element_size())
    size = max(1, len(z_NV) if z_NV.is_contiguous() else _BLOCK_BYTES // row_bytes)
    for start in range(0, len(z_NV), size):
        rows = slice(start, start + size)
        top_NK[rows, :here] = z_NV[rows].topk(here, dim=1).values
    return top_NK
