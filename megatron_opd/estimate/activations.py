"""Bytes of activations in bf16 training: what a layer keeps for its backward pass, and the moments of a step that need most.

Counted from what Transformer Engine and Megatron-Core keep (a simulation lists it by place: docs/training.md). Legend: H hidden size, F
feed-forward size (an expert's, of a mixture), D head size, V padded vocabulary, t tensor-parallel size. 'hidden' is a token's hidden
state on one rank: 2 H bytes, or 2 H / t with sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.estimate.memory import Layout
    from megatron_opd.model.architecture import Architecture

MIB = 2**20
WORKSPACE_BYTES = 32 * MIB  # of cuBLAS, which Transformer Engine allocates on Hopper; its grouped products take four besides
SCALED_MOMENTS = ("float16", "fp8")


@dataclass(frozen=True)
class LayerBytes:
    """Of one token in one layer: `kept` for the backward pass, its result included; `again`: made again there; `working`: more at its peak."""

    kept: float
    again: float
    working: float


@dataclass(frozen=True)
class Activations:
    """Bytes on one GPU: `kept` until the backward pass, of all micro-batches in flight, and what the busiest moment needs besides."""

    kept: float
    working: float


def hidden_bytes(arch: Architecture, config: TrainerConfig, layout: Layout) -> float:
    return 2 * arch.hidden_size / (layout.tp if config.parallel.sequence_parallel else 1)


def layer_bytes(arch: Architecture, config: TrainerConfig, layout: Layout) -> LayerBytes:
    """With the recipe's recomputation, and attention that keeps no scores."""
    H, D, h, k, tp = arch.hidden_size, arch.head_dim, arch.num_heads, arch.num_kv_heads, layout.tp
    hidden = hidden_bytes(arch, config, layout)
    half = 0.5 if config.fp8 else 1.0  # of what a product keeps of its input: FP8 numbers
    normed = D * 2 * (h + k) / tp if arch.qk_norm else 0  # before their norm, and after it and RoPE
    attention = half * hidden + 2 * D * (h + 2 * k) / tp + normed + (2 * D + 4) * h / tp
    streams = 2 * hidden  # after attention, and the layer's result
    if arch.num_experts:
        spread = 2 * H / hidden  # ranks that a micro-batch's tokens are divided among
        copies, F = arch.experts_per_token / spread, arch.ffn_size
        sent = 2 * H * copies  # a token's hidden state, once for each of its experts
        norm, active = hidden, half * 2 * F * copies
        feed_forward = half * sent + 4 * F * copies + active + 4 * arch.num_experts / spread
        # In the forward pass: sorted by expert, received, and the results before and after they are sorted back. Its own result is not yet.
        working = 4 * sent - hidden
    else:
        F = arch.ffn_size / tp
        norm, active = half * hidden, half * 2 * F
        feed_forward = 4 * F + active
        # In the backward pass: gradients of the activation (2 F) and of its input (4 F), whose two halves are made first; it is free itself.
        working = 10 * F - active
    whole = attention + streams + norm + feed_forward
    if config.recompute == "full":
        return LayerBytes(hidden, whole, working)
    dropped = 0.0
    if config.recompute == "selective":
        modules = set(config.recompute_modules)
        if arch.num_experts:
            dropped += norm if "layernorm" in modules else 0
            dropped += feed_forward if "moe" in modules else active if "moe_act" in modules else 0
        else:  # Transformer Engine makes norm and product one, and recomputes the first with the second alone
            dropped += norm + feed_forward if "mlp" in modules else 0
    return LayerBytes(whole - dropped, dropped, working)


def activations(arch: Architecture, config: TrainerConfig, layout: Layout, stage: int, *, layers: int, micro_batches: int) -> Activations:
    """On a GPU of pipeline stage `stage`, which has `layers` layers in all its chunks."""
    tokens, hidden, layer = config.micro_batch_tokens / layout.cp, hidden_bytes(arch, config, layout), layer_bytes(arch, config, layout)
    chunks = _chunks_in_flight(layout, stage, micro_batches)
    last, interleaved = stage == layout.pp - 1, layout.vpp > 1
    # What a chunk receives (of the first: what is embedded) is the input of its first layer, which full recomputation counts already.
    received = 0 if config.recompute == "full" else hidden
    # Its result is freed when it is sent; full recomputation counts none.
    sent = hidden if config.recompute != "full" and (interleaved or not last) else 0
    kept = tokens * chunks * (layers / layout.vpp * layer.kept + received - sent)
    # Of the layer's result; and of the stage's, which its schedule holds. The last one's end with the loss, if it has one chunk.
    gradient = hidden + (0 if last and not interleaved else hidden)
    messages = 2 * hidden * (1 + _inputs_left(layout, stage)) if interleaved else 0  # one is received ahead, one is being sent
    working = tokens * (layer.again + layer.working + gradient + messages)
    if arch.tied_embeddings and layout.pp == 1:  # what stands for the head's gradient of the weight waits for the embedding's
        working += 2 * arch.padded_vocab(layout.tp) / layout.tp * arch.hidden_size
    if last:
        working = max(working, _head(arch, config, layout, tokens, hidden))
    return Activations(kept, working)


def _chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Forward passes whose backward pass has not begun, at most: of a schedule of one forward, one backward pass (Megatron-Core's)."""
    after = layout.pp - 1 - stage
    if layout.vpp == 1:
        return min(after + 1, micro_batches)
    return min(2 * after + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)


def _inputs_left(layout: Layout, stage: int) -> int:
    """Inputs of chunks that stay with their gradients after the backward pass, as a chunk keeps its last one until its next forward pass.

    In units of pp passes, chunk c's last backward pass of a round is done 2 vpp - 1 - c + 2 after / pp after the round's start, and its next
    forward pass comes after vpp + c. The last stage has one more (simulated).
    """
    after = layout.pp - 1 - stage
    waiting = sum(2 * chunk > layout.vpp - 1 + 2 * after / layout.pp for chunk in range(layout.vpp))
    return waiting + (after == 0)


def _head(arch: Architecture, config: TrainerConfig, layout: Layout, tokens: float, hidden: float) -> float:
    """LM head and loss: hidden states of the rows, which become their gradients, the norm's result or its gradient; and the largest of
    logits, the sum of gradients over ranks, and the zeros that stand for the weight's gradient."""
    vocabulary = arch.padded_vocab(layout.tp) / layout.tp
    rows = min(tokens, config.chunk_tokens or tokens)
    whole = 2 * tokens * arch.hidden_size
    return whole + tokens * hidden + max(2 * rows * vocabulary, whole if layout.tp > 1 else 0, 2 * vocabulary * arch.hidden_size)
