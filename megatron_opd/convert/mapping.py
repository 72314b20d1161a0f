"""One table, read in both directions: Hugging Face tensor names and layouts <-> Megatron-Core checkpoint keys and layouts.

Megatron-Core's distributed checkpoints hold each tensor whole (its *global* shape), layers stacked on a first axis, independent of
tensor and pipeline parallelism. So conversion is between Hugging Face tensors and global tensors of one layer, and a live model is
filled by cutting what its own sharded state dict asks for.

Legend: H hidden, G key-value heads, R query heads a key-value head, D head dimension, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_opd.model.architecture import Architecture

LAYER_PREFIX = "decoder.layers."


@dataclass(frozen=True)
class Entry:
    """A Megatron key (without layer number), the Hugging Face names that make it ({layer} filled in), and both directions."""

    mcore: str
    hf: tuple[str, ...]
    to_mcore: Callable[[list[torch.Tensor], Architecture], torch.Tensor]
    to_hf: Callable[[torch.Tensor, Architecture], list[torch.Tensor]]

    @property
    def per_layer(self) -> bool:
        return self.mcore.startswith(LAYER_PREFIX)

    def hf_names(self, layer: int | None) -> list[str]:
        return [name.format(layer=layer) for name in self.hf]


def _same(mcore: str, hf: str) -> Entry:
    return Entry(mcore, (hf,), lambda tensors, arch: tensors[0], lambda tensor, arch: [tensor])


def _vocab(mcore: str, hf: str) -> Entry:
    """Rows beyond the real vocabulary are padding: zeros on the way in, cut on the way out."""
    return Entry(mcore, (hf,), lambda tensors, arch: tensors[0], lambda tensor, arch: [tensor[: arch.vocab_size]])


def _join_qkv(tensors: list[torch.Tensor], arch: Architecture) -> torch.Tensor:
    """q [G*R*D,...], k [G*D,...], v [G*D,...] -> [G*(R+2)*D,...], per key-value head: its queries, its key, its value."""
    groups = [tensor.reshape(arch.num_kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(groups, 1).reshape(-1, *tensors[0].shape[1:])


def _split_qkv(tensor: torch.Tensor, arch: Architecture) -> list[torch.Tensor]:
    per_group = arch.num_heads // arch.num_kv_heads
    grouped = tensor.reshape(arch.num_kv_heads, (per_group + 2) * arch.head_dim, *tensor.shape[1:])
    parts = grouped.split([per_group * arch.head_dim, arch.head_dim, arch.head_dim], 1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def table(arch: Architecture) -> list[Entry]:
    """Every tensor of a model of this architecture."""
    hf_layer, hf_attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    attention = LAYER_PREFIX + "self_attention."
    qkv = tuple(hf_attention + name for name in ("q_proj", "k_proj", "v_proj"))
    gate_up = (hf_layer + "mlp.gate_proj.weight", hf_layer + "mlp.up_proj.weight")
    entries = [
        _vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        _same("decoder.final_layernorm.weight", "model.norm.weight"),
        _same(attention + "linear_qkv.layer_norm_weight", hf_layer + "input_layernorm.weight"),
        Entry(attention + "linear_qkv.weight", tuple(name + ".weight" for name in qkv), _join_qkv, _split_qkv),
        _same(attention + "linear_proj.weight", hf_attention + "o_proj.weight"),
        _same(LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight", hf_layer + "post_attention_layernorm.weight"),
        Entry(
            LAYER_PREFIX + "mlp.linear_fc1.weight",
            gate_up,
            lambda tensors, arch: torch.cat(tensors),
            lambda tensor, arch: list(tensor.chunk(2)),
        ),
        _same(LAYER_PREFIX + "mlp.linear_fc2.weight", hf_layer + "mlp.down_proj.weight"),
    ]
    if arch.qkv_bias:
        entries.append(Entry(attention + "linear_qkv.bias", tuple(name + ".bias" for name in qkv), _join_qkv, _split_qkv))
    if arch.qk_norm:
        entries += [_same(f"{attention}{x}_layernorm.weight", f"{hf_attention}{x}_norm.weight") for x in ("q", "k")]
    if not arch.tied_embeddings:
        entries.append(_vocab("output_layer.weight", "lm_head.weight"))
    return entries
