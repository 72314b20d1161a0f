"""Bytes and arithmetic of a step from first principles: what tensor, pipeline, data and expert parallelism send, and which products are made.

Legend: S tokens of a micro-batch on a rank, N of them with a loss, H hidden size, L layers of this rank, M micro-batches, P parameters of
this rank, a attention width (heads x head size). Bytes are of the whole buffer, as one rank holds it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from cases import Case

from megatron_opd.estimate.memory import Layout, layers_of_stage, rank_parameters

BF16, FP32 = 2, 4
PROMPT = 256  # tokens without a loss at the start of a sequence, as simulate_stage makes them


def lengths(case: Case) -> list[int]:
    """Sequences of a micro-batch: as many of the longest as fit, and the rest."""
    longest = min(4096 + PROMPT if case.stage == "train" else 16384, case.config.micro_batch_tokens)
    whole, rest = divmod(case.config.micro_batch_tokens, longest)
    return [longest] * whole + ([rest] if rest else [])


def layout_of(case: Case) -> Layout:
    return Layout.of(case.config, case.gpus)


class MadeAgain(NamedTuple):
    """What the backward pass runs again: the products of attention, its scores, the feed-forward or the experts."""

    attention: bool
    scores: bool
    feed_forward: bool


def made_again(case: Case) -> MadeAgain:
    full = case.config.recompute == "full"
    modules = set(case.config.recompute_modules) if case.config.recompute == "selective" else set()
    return MadeAgain(full, full or "core_attn" in modules, full or bool({"mlp", "moe"} & modules))


def bytes_by_group(case: Case) -> Counter[str]:
    """'operation kind' -> bytes of a step in bf16: all that grows with tokens or parameters. Sums, norms and statistics are none of them."""
    config, arch, layout = case.config, case.arch, layout_of(case)
    traffic: Counter[str] = Counter()
    parameters = rank_parameters(arch, layout, case.pipeline_stage)
    tokens = config.micro_batch_tokens // layout.cp
    whole = BF16 * tokens * arch.hidden_size  # the hidden states of a micro-batch
    layers = layers_of_stage(arch, layout, case.pipeline_stage)
    first, last = case.pipeline_stage == 0, case.pipeline_stage == layout.pp - 1
    again = made_again(case)
    # Attention and a dense feed-forward are cut over tp, experts are not: so many of a layer run forward, and so many backward.
    forwards = 1 + again.attention + (0 if arch.num_experts else 1 + again.feed_forward)
    backwards = 1 if arch.num_experts else 2

    if layout.tp > 1 and config.parallel.sequence_parallel:
        # Forward the input; backward the input again, and the gradient of the output. At the ends the embedding's gradient, the head's input.
        traffic["all-gather tp"] += case.micro_batches * whole * (layers * (forwards + 2 * backwards) + first + last)
        traffic["reduce-scatter tp"] += case.micro_batches * whole * (layers * (forwards + backwards) + first + last)
    elif layout.tp > 1:
        traffic["all-reduce tp"] += case.micro_batches * whole * (layers * (forwards + backwards) + first + last)

    if layout.cp > 1:  # the ring: forward keys and values to each other rank; backward these and their gradients
        keys_and_values = 2 * BF16 * tokens * arch.num_kv_heads * arch.head_dim // layout.tp
        around = (layout.cp - 1) * (1 + again.scores + 2)
        for operation in ("send", "receive"):
            traffic[f"{operation} cp"] += case.micro_batches * layers * around * keys_and_values

    if layout.pp > 1:
        sent = whole // (layout.tp if config.parallel.sequence_parallel else 1)
        chunks = layout.vpp
        forward = case.micro_batches * (chunks - last)
        backward = case.micro_batches * (chunks - first)
        traffic["send pp"] += (forward + backward) * sent
        traffic["receive pp"] += (forward + backward) * sent

    gradient = BF16 if config.main_grads_dtype == "bfloat16" else FP32
    for count, kind, ranks in (
        (parameters.dense, "dp-cp", layout.dp * layout.cp),
        (parameters.expert, "expert-dp", layout.expert_dp),
    ):
        if ranks > 1 and config.distributed_optimizer:
            traffic[f"reduce-scatter {kind}"] += gradient * count
            traffic[f"all-gather {kind}"] += BF16 * count
        elif ranks > 1:
            traffic[f"all-reduce {kind}"] += gradient * count

    if layout.ep > 1:
        routed = tokens // layout.tp * arch.experts_per_token
        exchange = BF16 * arch.hidden_size + FP32  # a token's hidden state and its probability
        back = BF16 * arch.hidden_size
        traffic["all-to-all ep"] += case.micro_batches * layers * routed * (2 + again.feed_forward) * (exchange + back)
    return Counter({kind: size for kind, size in traffic.items() if size})


def flops(case: Case) -> float:
    """Products and attention of a step on this rank. docs/training.md's model FLOPs, and besides them what is made again."""
    config, arch, layout = case.config, case.arch, layout_of(case)
    tokens = config.micro_batch_tokens // layout.cp
    layers = layers_of_stage(arch, layout, case.pipeline_stage)
    attention = arch.hidden_size * arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_heads) / layout.tp
    if arch.num_experts:  # a token's k experts are whole, and it is routed on the rank that has it
        spread = layout.tp if config.parallel.sequence_parallel else 1
        feed_forward = (arch.experts_per_token * 3 * arch.hidden_size * arch.ffn_size + arch.hidden_size * arch.num_experts) / spread
    else:
        feed_forward = 3 * arch.hidden_size * arch.ffn_size / layout.tp
    again = made_again(case)
    products = 2 * tokens * layers * ((3 + again.attention) * attention + (3 + again.feed_forward) * feed_forward)
    # Forward two products, backward five: FlashAttention makes the scores again. Half of each is above the diagonal.
    squares = sum(n * n for n in lengths(case)) / layout.cp
    scores = (2 + 5 + 2 * again.scores) * layers * arch.num_heads * arch.head_dim / layout.tp * squares
    head = 0.0
    if case.pipeline_stage == layout.pp - 1:
        rows = sum(max(1, n - PROMPT) for n in lengths(case)) // layout.cp
        head = 3 * 2 * rows * arch.padded_vocab(layout.tp) / layout.tp * arch.hidden_size
    return case.micro_batches * (products + scores + head)
