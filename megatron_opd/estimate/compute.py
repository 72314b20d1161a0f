"""Time of training, sampling and scoring from the arithmetic of the model, each from a best to a worst case.

Legend: H hidden size, F feed-forward size of an expert, V vocabulary, L layers, B sequences decoded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_opd.cost.gpus import Gpu
from megatron_opd.estimate.memory import GIB, Layout
from megatron_opd.estimate.ranges import Range, between
from megatron_opd.estimate.step_time import StepTime, predict_work
from megatron_opd.estimate.traffic import step_work
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

# Assumptions, each (worst, best); those of a training step are in step_time.py. Share of the bf16 peak that a prefill reaches; a mixture's small
# products reach less.
PREFILL_UTILISATION = {"dense": (0.25, 0.60), "mixture": (0.10, 0.35)}
BANDWIDTH_UTILISATION = (0.40, 0.75)  # of the memory's bandwidth, while decoding
STEP_OVERHEAD = (5e-3, 1e-3)  # seconds of a decoding step that are neither: launches, sampling, messages between GPUs
START_SECONDS = Range(60.0, 600.0)  # until servers, or the ranks of a training, have loaded a model
MOST_SEQUENCES = 256  # decoded together by one copy of a model
LEAST_SEQUENCES = 16  # of the longest, for which a copy should have room: fewer leave its GPUs idle
MOST_GPUS_A_COPY = 1024
SERVING_SHARE = 0.85  # of a GPU's memory, for weights and KV cache
BF16 = 2  # bytes


@dataclass(frozen=True)
class Speed:
    """Tokens (prompt and response) a second of all GPUs, seconds a step, GPU hours of the run, and what a step's time goes into."""

    tokens_per_second: Range
    step_seconds: Range
    gpu_hours: Range
    steps: int
    step: StepTime


def predict_speed(arch: Architecture, config: TrainerConfig, layout: Layout, *, tokens: Range, steps: int, gpu: Gpu) -> Speed:
    """Speed of a training. `tokens`: of a rollout on average, prompt and response, as training reads it."""

    def time_of(mean: float) -> StepTime:
        tokens = config.step_tokens(mean)
        work = step_work(arch, config, layout, tokens=tokens, squared=tokens * mean)
        kind, fp8 = bool(arch.num_experts), config.fp8 is not None
        return predict_work(work, gpu=gpu, mixture=kind, fp8=fp8, pp=layout.pp, vpp=layout.vpp)

    time = time_of(tokens.low).until(time_of(tokens.high))
    step = time.total
    rates = sorted(config.step_tokens(mean) / seconds for mean, seconds in ((tokens.low, step.low), (tokens.high, step.high)))
    return Speed(Range(*rates), step, step * (steps * layout.gpus / 3600), steps, time)


@dataclass(frozen=True)
class Serving:
    """Copies of a model, each on `tp` GPUs, that answer together; `gpus` are those that are paid for meanwhile."""

    tp: int
    copies: int
    gpus: int


@dataclass(frozen=True)
class Sampling:
    """`prompts` answered `samples` times each. Tokens: of a prompt and a response on average, and of the longest response."""

    prompts: int
    samples: int
    prompt_tokens: float
    response_tokens: Range
    longest: int


def sampling_hours(arch: Architecture, gpu: Gpu, serving: Serving, work: Sampling) -> Range:
    """GPU hours of sampling, without the start of the servers. A copy decodes as many responses together as its memory holds, on average."""

    def seconds(worst: bool) -> float:
        response = work.response_tokens.high if worst else work.response_tokens.low
        requests = work.prompts * work.samples / serving.copies
        batch = max(1.0, min(requests, MOST_SEQUENCES, sequences_that_fit(arch, gpu, serving.tp, work.prompt_tokens + response)))
        step = decode_seconds(arch, gpu, serving.tp, batch=batch, context=work.prompt_tokens + response / 2, worst=worst)
        decoding = max(1.0, requests / batch) * response * step
        # The prompt's cache may serve all its samples. At the end the longest response may be left alone.
        prefills = work.prompts * (work.samples if worst else 1) / serving.copies
        prefill = prefills * prefill_seconds(arch, gpu, serving.tp, work.prompt_tokens, worst=worst)
        alone = decode_seconds(arch, gpu, serving.tp, batch=1, context=work.prompt_tokens + work.longest / 2, worst=worst)
        return decoding + prefill + (work.longest * alone if worst else 0.0)

    return between(seconds) * (serving.gpus / 3600)


def scoring_hours(arch: Architecture, gpu: Gpu, serving: Serving, *, rollouts: int, tokens: Range) -> Range:
    """GPU hours of scoring rollouts of so many tokens each (prompt and response): one prefill a rollout."""

    def seconds(worst: bool) -> float:
        length = tokens.high if worst else tokens.low
        return max(1.0, rollouts / serving.copies) * prefill_seconds(arch, gpu, serving.tp, length, worst=worst)

    return between(seconds) * (serving.gpus / 3600)


def prefill_seconds(arch: Architecture, gpu: Gpu, tp: int, tokens: float, *, worst: bool) -> float:
    """A forward pass over a sequence: bound by arithmetic."""
    flops = arch.train_flops(1, 0) / 3 * tokens + arch.train_flops(0, 1) / 3 * tokens**2
    return flops / (tp * gpu.bf16_flops * PREFILL_UTILISATION[_kind(arch)][not worst])


def decode_seconds(arch: Architecture, gpu: Gpu, tp: int, *, batch: float, context: float, worst: bool) -> float:
    """One token more for each of `batch` sequences of `context` tokens: weights and KV cache are read once, or arithmetic takes longer."""
    read = BF16 * weights_read(arch, batch) + batch * context * cache_bytes(arch, tp)
    transfer = read / (tp * gpu.bytes_per_second * BANDWIDTH_UTILISATION[not worst])
    flops = batch * (arch.train_flops(1, 0) / 3 + 2 * arch.train_flops(0, 1) / 3 * context)  # a token attends to all before it
    arithmetic = flops / (tp * gpu.bf16_flops * PREFILL_UTILISATION[_kind(arch)][not worst])
    return max(transfer, arithmetic) + STEP_OVERHEAD[not worst]


def weights_read(arch: Architecture, batch: float) -> float:
    """Parameters that a decoding step of `batch` tokens meets: of a mixture the experts that at least one of them is routed to, on average."""
    looked_up = 0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size
    if not arch.num_experts:
        return arch.num_parameters - looked_up
    expert = arch.num_layers * 3 * arch.hidden_size * arch.ffn_size
    met = arch.num_experts * (1 - (1 - arch.experts_per_token / arch.num_experts) ** batch)
    return arch.num_active_parameters - looked_up + (met - arch.experts_per_token) * expert


def cache_bytes(arch: Architecture, tp: int) -> float:
    """KV cache of a token on the GPUs of a copy together; with more GPUs than key-value heads these are held more than once."""
    return 2 * BF16 * arch.num_layers * arch.head_dim * max(arch.num_kv_heads, tp)


def sequences_that_fit(arch: Architecture, gpu: Gpu, tp: int, tokens: float) -> float:
    """Sequences of `tokens` whose cache has room beside the weights; below 0 if these alone don't fit."""
    room = SERVING_SHARE * tp * gpu.memory_gib * GIB - BF16 * arch.num_parameters
    return room / (tokens * cache_bytes(arch, tp))


def smallest_copy(arch: Architecture, gpu: Gpu, tokens: float, *, sequences: int = 1) -> int | None:
    """GPUs (a power of two) that one copy of a model needs, with room for so many sequences of `tokens`.

    None where no number suffices: with more GPUs than key-value heads each holds the cache of as many tokens as before.
    """
    tp = 1
    while sequences_that_fit(arch, gpu, tp, tokens) < sequences:
        tp *= 2
        if tp > MOST_GPUS_A_COPY:
            return None
    return tp


def _kind(arch: Architecture) -> str:
    return "mixture" if arch.num_experts else "dense"
