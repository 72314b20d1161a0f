"""What one rank computes and sends in a training step: FLOPs, and bytes by group of ranks, in closed form.

Legend: H hidden size, F feed-forward size of an expert, D head size, L layers, T tokens of a step on one data- and context-parallel rank.
Checked against the simulated step (tests/unit/test_step_time.py has its figures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_opd.estimate.memory import MOMENT_BYTES, Layout, layers_of_stage, rank_parameters
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

BF16 = 2  # bytes
GPUS_PER_NODE = 8  # of the nodes that groups are laid over
# Collectives of a half of a layer (attention, feed-forward), each of a micro-batch's hidden states. With sequence parallelism: gather and
# scatter in the forward pass; in the backward pass the input is gathered again, the output's gradient gathered, the input's scattered.
_FORWARD, _BACKWARD = 2, 3
# Without, an all-reduce each way, which sends twice what a gather does.
_REDUCED = 2
# FP8 gathers what a product reads as FP8 numbers with their scales: bytes of (inputs, gradients of outputs) over those of bf16. Scales of
# blocks of 32 (one byte) and of 128 values (four bytes) are 1/32 of a value; gradients of the block recipes go scaled by rows and by columns.
_BLOCKS = (1 + 1 / 32) / BF16
GATHERED_FP8 = {
    "delayed": (1 / BF16, 1 / BF16),
    "tensorwise": (1 / BF16, 1 / BF16),
    "blockwise": (_BLOCKS, 2 * _BLOCKS),
    "mxfp8": (_BLOCKS, 2 * _BLOCKS),
}
# What a parameter's update reads and writes of the GPU's memory beside its moments: gradient (read twice: norm, update), main weight, weight.
_UPDATE_BYTES = 4 + 4 + 2 * 4 + 2
_GRADIENT_BYTES = 4  # of all parameters: set to zero before the step


@dataclass(frozen=True)
class StepWork:
    """One rank's work in one step, on the pipeline stage that has most.

    `flops`: with what is made again. `sent`: bytes that leave the GPU, by kind of group (tp, cp, ep, pp, dp, expert-dp), of groups with more
    than one rank. `calls`: collectives or sends, by kind. `over_nodes`: kinds whose ranks are on several nodes. `updated`: bytes of the GPU's
    memory that the optimizer reads and writes. `offloaded`: parameters that the CPU updates for this rank.
    """

    flops: float
    sent: dict[str, float]
    calls: dict[str, float]
    over_nodes: frozenset[str]
    updated: float
    offloaded: float
    micro_batches: float


def sent_bytes(operation: str, size: float, ranks: int) -> float:
    """Bytes that leave one rank for a collective whose larger side, input or output, has `size` bytes, in NCCL's ring.

    `operation`: 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', and others, which send all of it.
    """
    if ranks <= 1:
        return 0.0
    share = (ranks - 1) / ranks
    return size * {"all-gather": share, "reduce-scatter": share, "all-reduce": 2 * share, "all-to-all": share}.get(operation, 1.0)


def step_work(arch: Architecture, config: TrainerConfig, layout: Layout, *, tokens: float, squared: float) -> StepWork:
    """Work of a step over `tokens` tokens in all, whose sequences' squared lengths add up to `squared`."""
    mine = tokens / (layout.dp * layout.cp)
    micro_batches = max(1.0, mine * layout.cp / config.micro_batch_tokens)
    layers = max(layers_of_stage(arch, layout, stage) for stage in range(layout.pp))
    sent: dict[str, float] = {}
    calls: dict[str, float] = {}
    for kind, (size, number) in {
        "tp": _tensor(arch, config, layout, mine, layers),
        "cp": _context(arch, config, layout, mine, layers),
        "ep": _experts(arch, config, layout, mine, layers),
        "pp": _pipeline(arch, config, layout, mine),
    }.items():
        if size:
            sent[kind], calls[kind] = size, number * micro_batches
    parameters = max((rank_parameters(arch, layout, stage) for stage in range(layout.pp)), key=lambda found: found.total)
    replicas = {"dp": (parameters.dense, layout.dp * layout.cp), "expert-dp": (parameters.expert, layout.expert_dp)}
    updated = offloaded = 0.0
    for kind, (count, ranks) in replicas.items():
        if count and ranks > 1:
            sent[kind] = _replicas(config, count, parameters.matrix if kind == "dp" else 0, ranks)
            calls[kind] = 2 * max(1.0, count / (40e6 + 1e6 * ranks))  # Megatron-Core's buckets
        share = count / (ranks if config.distributed_optimizer else 1)
        state = _UPDATE_BYTES + 4 * MOMENT_BYTES[config.moments_dtype]  # both moments, read and written
        updated += share * (1 - config.optimizer_offload) * state + _GRADIENT_BYTES * count
        offloaded += share * config.optimizer_offload
    flops = _stage_flops(arch, config, layout, tokens, squared, layers)
    return StepWork(flops, sent, calls, over_nodes(layout), updated, offloaded, micro_batches)


def over_nodes(layout: Layout) -> frozenset[str]:
    """Kinds of groups that reach over a node of 8 GPUs. Ranks are in Megatron-Core's order: tp, cp, ep within dp, dp, pp."""
    reach = {
        "tp": layout.tp,
        "cp": layout.tp * layout.cp,
        "ep": layout.ep,  # experts lie on neighbouring ranks, whatever tp is
        "dp": layout.gpus // layout.pp,
        "expert-dp": layout.gpus // layout.pp,
        "pp": layout.gpus,
    }
    return frozenset(kind for kind, ranks in reach.items() if ranks > GPUS_PER_NODE)


def _stage_flops(arch: Architecture, config: TrainerConfig, layout: Layout, tokens: float, squared: float, layers: int) -> float:
    """Of one rank of the last stage, or of one with more layers: forward, backward and what is made again."""
    head = 6.0 * arch.vocab_size * arch.hidden_size * tokens
    attention = 6.0 * arch.num_layers * arch.num_heads * arch.head_dim * squared
    whole = arch.train_flops(1, 0) * tokens + attention
    products = whole - head - attention
    experts = max(1, arch.experts_per_token)
    feed_forward = 6.0 * arch.num_layers * 3 * arch.hidden_size * arch.ffn_size * experts * tokens
    again = 0.0
    if config.recompute == "full":
        again = (products + attention) / 3
    elif config.recompute == "selective":
        again += feed_forward / 3 if {"mlp", "moe"} & set(config.recompute_modules) else 0.0
        again += attention / 3 if "core_attn" in config.recompute_modules else 0.0
    ranks = layout.gpus / layout.pp
    last = layers_of_stage(arch, layout, layout.pp - 1)
    # Of attention's six products (model FLOPs) FlashAttention's backward pass makes one more: the scores again.
    per_layer = (products + attention * 7 / 6 + again) / arch.num_layers
    return max(layers * per_layer, last * per_layer + head) / ranks


def _tensor(arch: Architecture, config: TrainerConfig, layout: Layout, mine: float, layers: int) -> tuple[float, float]:
    """(bytes of a step, collectives of a micro-batch)"""
    if layout.tp == 1:
        return 0.0, 0.0
    halves = 1 if arch.num_experts else 2  # tokens go to experts by another group
    again = 0
    if config.recompute == "full":
        again = halves
    elif config.recompute == "selective" and "mlp" in config.recompute_modules and not arch.num_experts:
        again = 1
    ends = 2 if layout.pp > 1 else 4  # the embedding's scatter, the head's gather, and both again for their gradients
    if config.parallel.sequence_parallel:
        number = layers * (halves * (_FORWARD + _BACKWARD) + again * _FORWARD) + ends
        one = sent_bytes("all-gather", BF16 * arch.hidden_size * mine, layout.tp)
        return (number - _saved_by_fp8(config, layout, layers, halves, again)) * one, number
    number = layers * (halves * _REDUCED + again) + ends / 2
    return number * sent_bytes("all-reduce", BF16 * arch.hidden_size * mine, layout.tp), number


def _saved_by_fp8(config: TrainerConfig, layout: Layout, layers: int, halves: int, again: int) -> float:
    """Gathers in bf16 whose bytes a micro-batch saves, on a stage of `layers` layers with as few of the bf16 ones as a stage has."""
    fp8 = config.fp8
    if fp8 is None:
        return 0.0
    inputs, gradients = GATHERED_FP8[fp8.recipe]
    edges = (fp8.bf16_first_layers, fp8.bf16_last_layers)
    in_bf16 = sum(edges) if layout.pp == 1 else min(edges) if layout.pp == 2 else 0
    a_layer = (2 * halves + again) * (1 - inputs) + halves * (1 - gradients)
    return max(0, layers - in_bf16) * a_layer


def _context(arch: Architecture, config: TrainerConfig, layout: Layout, mine: float, layers: int) -> tuple[float, float]:
    """Keys and values go round the ring once forward; backward so do they and their gradients."""
    if layout.cp == 1:
        return 0.0, 0.0
    rounds = 3 + (config.recompute == "full" or (config.recompute == "selective" and "core_attn" in config.recompute_modules))
    keys = 2 * BF16 * arch.num_kv_heads * arch.head_dim / layout.tp * mine
    number = layers * rounds * (layout.cp - 1)
    return number * keys, number


def _experts(arch: Architecture, config: TrainerConfig, layout: Layout, mine: float, layers: int) -> tuple[float, float]:
    """Each token goes to its experts and comes back, and so do the gradients."""
    if layout.ep == 1 or not arch.num_experts:
        return 0.0, 0.0
    again = config.recompute == "full" or (config.recompute == "selective" and "moe" in config.recompute_modules)
    spread = layout.tp if config.parallel.sequence_parallel else 1
    one = sent_bytes("all-to-all", BF16 * arch.hidden_size * arch.experts_per_token * mine / spread, layout.ep)
    number = layers * (4 + 2 * again)
    return number * one, number


def _pipeline(arch: Architecture, config: TrainerConfig, layout: Layout, mine: float) -> tuple[float, float]:
    """Hidden states to the next stage and gradients to the one before; the two stages of pp = 2 without chunks send one of them."""
    if layout.pp == 1:
        return 0.0, 0.0
    spread = layout.tp if config.parallel.sequence_parallel else 1
    number = 2 * layout.vpp - (layout.pp == 2)
    return number * BF16 * arch.hidden_size * mine / spread, number


def _replicas(config: TrainerConfig, count: int, matrices: int, ranks: int) -> float:
    """Gradients are reduced and weights gathered, or gradients reduced to all. `matrices`: parameters of `count` that may be kept in FP8."""
    gradient = 2 if config.main_grads_dtype == "bfloat16" else 4
    if not config.distributed_optimizer:
        return sent_bytes("all-reduce", gradient * count, ranks)
    in_fp8 = matrices if config.fp8 and config.fp8.parameters and config.fp8.recipe != "mxfp8" else 0  # mxfp8's are gathered in bf16
    return sent_bytes("reduce-scatter", gradient * count, ranks) + sent_bytes("all-gather", BF16 * count - in_fp8, ranks)
