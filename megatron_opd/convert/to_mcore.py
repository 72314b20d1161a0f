"""Hugging Face weights into a live Megatron-Core model of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_opd.convert.mapping import Index, table
from megatron_opd.convert.source import global_tensor, open_source
from megatron_opd.model.architecture import Architecture
from megatron_opd.model.student import Student


def load_hf_weights(model: Student, arch: Architecture, directory: str | Path) -> None:
    """Fill this rank's parameters from a Hugging Face directory, in the parameters' dtype.

    The model's own sharded state dict says which piece of which tensor lies here, whatever the parallel layout and layer spec.
    FP8 parameters are rounded, and what the optimizer will make its main weights of is not. Raises UserError for tensors that are
    missing, of another shape, or not understood; nothing is left unfilled.
    """
    source = open_source(directory, arch)
    entries = {entry.mcore: entry for entry in table(arch)}
    sharded = dict(model.sharded_state_dict(metadata={"singleton_local_shards": False}))
    quantized = _stand_in_(sharded)
    apply_factories(sharded)
    filled = 0
    last: tuple[tuple[str, Index], torch.Tensor] | None = None
    for shard in sharded_tensors(sharded):
        skip = shard.prepend_axis_num
        wanted = (shard.key, tuple(shard.global_offset[:skip]))
        if last is None or last[0] != wanted:  # gate and up are two shards of one tensor
            last = (wanted, global_tensor(source, entries[shard.key], arch, wanted[1]))
        assert shard.data is not None
        with torch.no_grad():
            piece = last[1][
                tuple(slice(offset, offset + size) for offset, size in zip(shard.global_offset[skip:], shard.data.shape, strict=True))
            ]
            shard.data.zero_()  # rows of a padded vocabulary that no token has
            shard.data[tuple(slice(size) for size in piece.shape)].copy_(piece)
        filled += shard.data.numel()
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert filled == expected, f"{filled} of {expected} parameters were filled"
    with torch.no_grad():
        for parameter, plain in quantized:
            parameter.copy_(plain)
            parameter.get_high_precision_init_val().copy_(plain)


def _stand_in_(sharded: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
    """Put a plain tensor in the place of each FP8 parameter, whose views are no part of it; returns (parameter, its stand-in)."""
    pairs = []
    for entry in nested_values(sharded):
        data: Any = getattr(entry, "data", None)
        if fp8_utils.is_float8tensor(data):
            entry.data = torch.empty(data.shape, dtype=data.dtype, device=data.device)
            pairs.append((data, entry.data))
    return pairs


def sharded_tensors(tree: object) -> list[ShardedTensor]:
    """All ShardedTensors in nested dicts and lists."""
    if isinstance(tree, ShardedTensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [shard for value in values for shard in sharded_tensors(value)]
