"""Matrix products and attention of PyTorch's operations, FLOPs. Those of Transformer Engine count themselves (te_functions.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

# Lengths of the pack of the current micro-batch: an operation's shapes do not say where one sequence ends.
SEQUENCES: list[int] = []
_PRODUCTS = {"_varlen_attn": 2, "_varlen_attn_backward": 5}  # the backward pass makes the scores again


def attention_flops(query: torch.Tensor, keys: int, sequences: Sequence[int], *, products: int, causal: bool) -> float:
    """Of `products` matrix products a sequence; query [T,heads,D]. With context parallelism a call sees a part of the pack's queries and keys."""
    tokens = sum(sequences)
    if not tokens:
        return 0.0
    share = query.shape[0] / tokens * (keys / tokens)
    squares = sum(length * length for length in sequences)
    return products * 2 * query.shape[-2] * query.shape[-1] * (0.5 if causal else 1.0) * share * squares


def flops_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> float:
    """0 of an operation that is neither a product nor attention."""
    name = func._opname
    if func.namespace == "torch_attn" and name in _PRODUCTS:
        query, key = args[1:3] if name.endswith("backward") else args[:2]
        bound = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        causal = bool(bound.get("is_causal")) or list(bound.get("window_size") or ()) == [-1, 0]
        return attention_flops(query, key.shape[0], SEQUENCES, products=_PRODUCTS[name], causal=causal)
    packet = func.overloadpacket
    if packet not in flop_registry and func.namespace == "aten" and name.endswith("_"):
        packet = getattr(torch.ops.aten, name[:-1], packet)  # in place
    if packet not in flop_registry:
        return 0.0
    plain = [value for value in args if not isinstance(value, torch.dtype)]
    options = {key: value for key, value in kwargs.items() if not key.startswith("out")}
    return flop_registry[packet](*plain, **options, out_val=out)
