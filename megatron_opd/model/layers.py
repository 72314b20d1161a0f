"""Layers for Megatron-Core's local spec, where Transformer Engine is not: RMSNorm, and attention over packed sequences.

Legend: S packed tokens, H heads of this rank, D head dimension, B sequences, L longest of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_opd.data.context import context_parallel_tokens


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism (Megatron-Core's wrapper of torch's norms refuses it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device="cuda" if torch.cuda.is_available() else "cpu")
        )
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedAttention(MegatronModule):
    """Causal attention by torch SDPA over sequences packed back to back (THD), exact on every device.

    Sequences are grouped by the next power of two of their length and padded within a group, so that a pack costs a few SDPA
    calls, not one a sequence. Right padding is never seen by a real token under a causal mask.

    Under context parallelism the whole pack is gathered and every rank keeps its rows: exact, but with no work saved, so it is for
    tests on CPUs (Transformer Engine's ring is for GPUs).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.heads_per_kv = config.num_attention_heads // config.num_query_groups
        assert config.num_query_groups % groups.tp.size() == 0

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S,H,D], key and value [S,H/g,D] -> [S,H*D]."""
        assert attention_bias is None
        assert packed_seq_params is not None
        assert packed_seq_params.qkv_format == "thd"
        assert query.dim() == 3, "the trainer packs every micro-batch"
        if self.heads_per_kv > 1 and key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(self.heads_per_kv, dim=1) for x in (key, value))
        cp, bounds = self.cp_group.size(), packed_seq_params.cu_seqlens_q
        mine: torch.Tensor | None = None
        if cp > 1:
            assert bounds is not None
            parts = [torch.from_numpy(context_parallel_tokens(bounds.numpy(), cp=cp, rank=rank)) for rank in range(cp)]
            mine, order = parts[self.cp_group.rank()], torch.argsort(torch.cat(parts))
            query, key, value = (_GatherTokens.apply(x, self.cp_group)[order] for x in (query, key, value))
        pieces: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for index_BL, real_BL in _length_groups(packed_seq_params):
            q, k, v = (x[index_BL].transpose(1, 2) for x in (query, key, value))  # [B,H,L,D]
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale).transpose(1, 2)  # [B,L,H,D]
            pieces.append(attended[real_BL])
            rows.append(index_BL[real_BL])
        attended_SH = torch.cat(pieces)[torch.argsort(torch.cat(rows))].reshape(len(query), -1)
        return attended_SH if mine is None else attended_SH[mine]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {}


class _GatherTokens(torch.autograd.Function):
    """[S/cp,...] of each rank -> [S,...] on every rank, one after another; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def _length_groups(packed: PackedSeqParams) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(index [B,L] into the pack, real [B,L])] over groups of sequences of similar length; kept on the pack, as every layer asks."""
    groups = getattr(packed, "length_groups", None)
    if groups is None:
        bounds = packed.cu_seqlens_q
        assert bounds is not None
        starts, lengths = bounds[:-1].long(), (bounds[1:] - bounds[:-1]).long()
        classes = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
        groups = []
        for size_class in classes[lengths > 0].unique().tolist():
            chosen = (classes == size_class) & (lengths > 0)
            offset_L = torch.arange(int(lengths[chosen].max()), device=bounds.device)
            real_BL = offset_L[None] < lengths[chosen][:, None]
            groups.append(((starts[chosen][:, None] + offset_L[None]).where(real_BL, starts[chosen][:, None]), real_BL))
        packed.length_groups = groups  # pyright: ignore[reportAttributeAccessIssue]
    return groups
