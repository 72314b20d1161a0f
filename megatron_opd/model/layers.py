"""RMSNorm and attention over packed sequences for Megatron-Core's local spec, where Transformer Engine is not.

Attention serves in Transformer Engine's layers, too, where these would hold all S x S scores (`attention.choose_attention`).

Legend: S packed tokens, H heads of this rank, D head dimension, B sequences, L longest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_opd.data.context import context_parallel_tokens
from megatron_opd.model.rope import Rotation


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
    """Causal attention over sequences packed back to back (THD): see `packed_attention`.

    Queries and keys are turned by `packed_seq_params.rotation` first, where the student has put one there (`rope.Rotation`).
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
        assert softmax_scale is None, "scores are divided by the square root of the head dimension"
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
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
        turn: Rotation | None = getattr(packed_seq_params, "rotation", None)
        if turn is not None:
            query, key = turn.apply(query), turn.apply(key)
        cp, bounds = self.cp_group.size(), packed_seq_params.cu_seqlens_q
        mine: torch.Tensor | None = None
        if cp > 1:
            assert bounds is not None
            parts = [torch.from_numpy(context_parallel_tokens(bounds.numpy(), cp=cp, rank=rank)) for rank in range(cp)]
            mine, order = parts[self.cp_group.rank()], torch.argsort(torch.cat(parts))
            query, key, value = (_GatherTokens.apply(x, self.cp_group)[order] for x in (query, key, value))
        attended_SH = packed_attention(query, key, value, packed_seq_params).flatten(1)
        return attended_SH if mine is None else attended_SH[mine]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {}


def varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's attention for packed sequences (FlashAttention), which it has from 2.10 on; None where it has not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def packed_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams) -> torch.Tensor:
    """Causal attention within each sequence: query [S,H,D], key and value [S,H/g,D] -> [S,H,D].

    On a GPU in 16 bits by PyTorch's variable-length attention, where it has it; else, and always on a CPU, by its SDPA, exactly.
    """
    attend = varlen_attention()
    if query.device.type != "cpu" and query.dtype in (torch.bfloat16, torch.float16) and attend is not None:
        return _attend_varlen(attend, query, key, value, packed)
    return _attend_in_groups(query, key, value, packed)


def _attend_varlen(
    attend: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
) -> torch.Tensor:
    known = signature(attend).parameters  # 2.10 has is_causal; 2.11 has window_size in its place; 2.12 wants to be told of shared keys
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        key, value = _for_every_head(key, value, query.shape[1])
    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    attended = attend(query, key, value, bounds, bounds, longest, longest, **options)
    if torch.are_deterministic_algorithms_enabled() and attended.grad_fn is not None:
        order_strictly(attended.grad_fn)
    return attended


def order_strictly(node: Any) -> None:
    """Let this node of the backward pass run under the strict setting of deterministic algorithms, and the others as they were set.

    PyTorch's FlashAttention adds in a fixed order under the strict setting alone (`attention_backward.cu`), which refuses other operations.
    """
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    node.register_prehook(lambda gradients: torch.use_deterministic_algorithms(True))
    node.register_hook(lambda gradients, upstream: torch.use_deterministic_algorithms(True, warn_only=before))


def _attend_in_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams) -> torch.Tensor:
    """Sequences are grouped by the next power of two of their length and padded within a group, so that a pack costs a few SDPA calls.

    Right padding is never seen by a real token under a causal mask.
    """
    key, value = _for_every_head(key, value, query.shape[1])
    pieces: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for index_BL, real_BL in _length_groups(packed):
        q, k, v = (x[index_BL].transpose(1, 2) for x in (query, key, value))  # [B,H,L,D]
        attended_BLHD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        pieces.append(attended_BLHD[real_BL])
        rows.append(index_BL[real_BL])
    return torch.cat(pieces)[torch.argsort(torch.cat(rows))]


def _for_every_head(key: torch.Tensor, value: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    times = num_heads // key.shape[1]
    return (key, value) if times == 1 else (key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1))


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
