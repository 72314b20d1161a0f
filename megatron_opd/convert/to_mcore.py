"""Hugging Face weights into a live Megatron-Core model of any layout, and into a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_opd.convert.hf_files import HfTensors
from megatron_opd.convert.mapping import Entry, table
from megatron_opd.errors import UserError
from megatron_opd.model.architecture import Architecture
from megatron_opd.model.student import Student


def load_hf_weights(model: Student, arch: Architecture, directory: str | Path) -> None:
    """Fill this rank's parameters from a Hugging Face directory, in the parameters' dtype.

    The model's own sharded state dict says which piece of which tensor lies here, whatever the parallel layout and layer spec.
    Raises UserError for tensors that are missing, of another shape, or not understood; nothing is left unfilled.
    """
    source = HfTensors(directory)
    entries = {entry.mcore: entry for entry in table(arch)}
    _check_names(source, arch, entries)
    sharded = dict(model.sharded_state_dict(metadata={"singleton_local_shards": False}))
    apply_factories(sharded)
    filled = 0
    cache: dict[tuple[str, int | None], torch.Tensor] = {}
    for shard in sharded_tensors(sharded):
        layer = shard.global_offset[0] if shard.prepend_axis_num else None
        if (shard.key, layer) not in cache:
            cache = {(shard.key, layer): _global_tensor(source, entries[shard.key], arch, layer)}
        full = cache[shard.key, layer]
        skip = shard.prepend_axis_num
        _check_shape(full, tuple(shard.global_shape[skip:]), entries[shard.key], arch, directory, layer)
        assert shard.data is not None
        with torch.no_grad():
            piece = full[
                tuple(slice(offset, offset + size) for offset, size in zip(shard.global_offset[skip:], shard.data.shape, strict=True))
            ]
            shard.data.zero_()  # rows of a padded vocabulary that no token has
            shard.data[tuple(slice(size) for size in piece.shape)].copy_(piece)
        filled += shard.data.numel()
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert filled == expected, f"{filled} of {expected} parameters were filled"


def sharded_tensors(tree: object) -> list[ShardedTensor]:
    """All ShardedTensors in nested dicts and lists."""
    if isinstance(tree, ShardedTensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [shard for value in values for shard in sharded_tensors(value)]


def _global_tensor(source: HfTensors, entry: Entry, arch: Architecture, layer: int | None) -> torch.Tensor:
    return entry.to_mcore([source.read(name) for name in entry.hf_names(layer)], arch)


def _check_names(source: HfTensors, arch: Architecture, entries: dict[str, Entry]) -> None:
    expected = {
        name
        for entry in entries.values()
        for layer in (range(arch.num_layers) if entry.per_layer else [None])
        for name in entry.hf_names(layer)
    }
    ignorable = {name for name in source.names() if name.endswith("rotary_emb.inv_freq")} | (
        {"lm_head.weight"} if arch.tied_embeddings else set()
    )
    for names, what in (
        (expected - source.names(), "are missing"),
        (source.names() - expected - ignorable, f"are not part of a {arch.name}"),
    ):
        if names:
            raise UserError(f"{source.directory}: {len(names)} tensors {what}: {', '.join(sorted(names)[:5])}")


def _check_shape(
    full: torch.Tensor, wanted: tuple[int, ...], entry: Entry, arch: Architecture, directory: str | Path, layer: int | None
) -> None:
    rows_fit = full.shape[0] == wanted[0] or (full.shape[0] == arch.vocab_size and wanted[0] > full.shape[0])
    if not rows_fit or tuple(full.shape[1:]) != wanted[1:]:
        raise UserError(
            f"{directory}: {', '.join(entry.hf_names(layer))} make a tensor of shape {tuple(full.shape)}; config.json asks for {wanted}"
        )
