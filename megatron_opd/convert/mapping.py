"""One table, read in both directions: Hugging Face tensor names and layouts <-> Megatron-Core checkpoint keys and layouts.

Megatron-Core's distributed checkpoints hold each tensor whole (its *global* shape), layers stacked on a first axis and experts on a
second, independent of every kind of parallelism. So conversion is between Hugging Face tensors and global tensors of one layer (and
expert), named by their index on the stacked axes: (), (layer,) or (layer, expert). A live model is filled by cutting what its own
sharded state dict asks for.

Legend: H hidden, G key-value heads, R query heads a key-value head, D head dimension, F feed-forward, V vocabulary, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_opd.model.architecture import Architecture

LAYER_PREFIX = "decoder.layers."
Index = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A Megatron key, the Hugging Face names that make one of its tensors ({layer}, {expert} filled in), its shape, both directions.

    The shape is without the stacked axes, and of a vocabulary without padding.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    to_mcore: Callable[[list[torch.Tensor], Architecture], torch.Tensor]
    to_hf: Callable[[torch.Tensor, Architecture], list[torch.Tensor]]

    def stacked(self, arch: Architecture) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        layers = (arch.num_layers,) if "{layer}" in self.hf[0] else ()
        return (*layers, arch.num_experts) if "{expert}" in self.hf[0] else layers

    def count(self, arch: Architecture) -> int:
        """How many of it a model has."""
        return math.prod(self.stacked(arch))

    def indices(self, arch: Architecture) -> list[Index]:
        """Every index on the stacked axes, in the order of a checkpoint."""
        return list(itertools.product(*map(range, self.stacked(arch))))

    def hf_names(self, index: Index) -> list[str]:
        names = dict(zip(("layer", "expert"), index, strict=False))
        return [name.format(**names) for name in self.hf]


def _same(mcore: str, hf: str, *shape: int) -> Entry:
    return Entry(mcore, (hf,), shape, lambda tensors, arch: tensors[0], lambda tensor, arch: [tensor])


def _vocab(mcore: str, hf: str, *shape: int) -> Entry:
    """Rows beyond the real vocabulary are padding: zeros on the way in, cut on the way out."""
    return Entry(mcore, (hf,), shape, lambda tensors, arch: tensors[0], lambda tensor, arch: [tensor[: arch.vocab_size]])


def _gate_up(mcore: str, hf_mlp: str, *shape: int) -> Entry:
    names = (hf_mlp + "gate_proj.weight", hf_mlp + "up_proj.weight")
    return Entry(mcore, names, shape, lambda tensors, arch: torch.cat(tensors), lambda tensor, arch: list(tensor.chunk(2)))


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
    H, F, V, D, E = arch.hidden_size, arch.ffn_size, arch.vocab_size, arch.head_dim, arch.num_experts
    qkv_rows = D * (arch.num_heads + 2 * arch.num_kv_heads)
    hf_layer, hf_attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    attention, mlp = LAYER_PREFIX + "self_attention.", LAYER_PREFIX + "mlp."
    qkv = tuple(hf_attention + name for name in ("q_proj", "k_proj", "v_proj"))
    entries = [
        _vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", V, H),
        _same(attention + "linear_qkv.layer_norm_weight", hf_layer + "input_layernorm.weight", H),
        Entry(attention + "linear_qkv.weight", tuple(name + ".weight" for name in qkv), (qkv_rows, H), _join_qkv, _split_qkv),
        _same(attention + "linear_proj.weight", hf_attention + "o_proj.weight", H, D * arch.num_heads),
    ]
    if arch.qkv_bias:
        entries.append(Entry(attention + "linear_qkv.bias", tuple(name + ".bias" for name in qkv), (qkv_rows,), _join_qkv, _split_qkv))
    if arch.qk_norm:
        entries += [_same(f"{attention}{x}_layernorm.weight", f"{hf_attention}{x}_norm.weight", D) for x in ("q", "k")]
    if E:
        hf_expert = hf_layer + "mlp.experts.{expert}."
        entries += [
            _same(LAYER_PREFIX + "pre_mlp_layernorm.weight", hf_layer + "post_attention_layernorm.weight", H),
            _same(mlp + "router.weight", hf_layer + "mlp.gate.weight", E, H),
            _gate_up(mlp + "experts.experts.linear_fc1.weight", hf_expert, 2 * F, H),
            _same(mlp + "experts.experts.linear_fc2.weight", hf_expert + "down_proj.weight", H, F),
        ]
    else:
        entries += [
            _same(mlp + "linear_fc1.layer_norm_weight", hf_layer + "post_attention_layernorm.weight", H),
            _gate_up(mlp + "linear_fc1.weight", hf_layer + "mlp.", 2 * F, H),
            _same(mlp + "linear_fc2.weight", hf_layer + "mlp.down_proj.weight", H, F),
        ]
    entries.append(_same("decoder.final_layernorm.weight", "model.norm.weight", H))
    if not arch.tied_embeddings:
        entries.append(_vocab("output_layer.weight", "lm_head.weight", V, H))
    return entries
