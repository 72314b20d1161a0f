"""Memory per GPU of a training stage before it runs, from a model of the arithmetic: docs/training.md has it.

Legend: H hidden size, F feed-forward size (an expert's, of a mixture), V padded vocabulary, L layers of a pipeline stage, S tokens of
a micro-batch on one rank. Sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_opd.config import TrainerConfig
from megatron_opd.errors import UserError

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

GIB = 2**30
# CUDA context, cuBLAS and NCCL buffers; and what the caching allocator can't use. Assumptions.
FIXED_BYTES = 3 * GIB
FRAGMENTATION = 0.05
MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank: `expert` ones have another data-parallel group; `matrix` are those FP8 keeps a copy of."""

    dense: int
    expert: int
    matrix: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    host: float  # not on the GPU: what optimizer_offload keeps in the node's memory for it

    @property
    def parts(self) -> dict[str, float]:
        """What lies on the GPU."""
        return {name: value for name, value in vars(self).items() if name != "host"}

    @property
    def total(self) -> float:
        return sum(self.parts.values()) * (1 + FRAGMENTATION) + FIXED_BYTES


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; data parallel is what is left of the GPUs. Raises UserError where it does not divide."""

    gpus: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int

    @staticmethod
    def of(config: TrainerConfig, gpus: int) -> Layout:
        sizes = {name: getattr(config.parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep")}
        return Layout(gpus, **sizes)

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Replicas of an expert: the experts of a layer lie on ep of the ranks of a stage, each expert whole."""
        return self.gpus // (self.pp * self.ep)

    def faults(self, config: TrainerConfig) -> list[str]:
        found = []
        if self.gpus % (self.tp * self.pp * self.cp):
            found.append(f"{self.gpus} GPUs are not a multiple of tp * pp * cp = {self.tp} * {self.pp} * {self.cp}")
        elif self.gpus % (self.pp * self.ep):
            found.append(f"{self.gpus} GPUs are not a multiple of pp * ep = {self.pp} * {self.ep}")
        elif config.global_batch < self.dp:
            found.append(f"global_batch = {config.global_batch} is smaller than {self.dp} data-parallel ranks")
        return found


def rank_parameters(arch: Architecture, layout: Layout, stage: int) -> Parameters:
    """Parameters of a rank of pipeline stage `stage` (from 0)."""
    H, F, D = arch.hidden_size, arch.ffn_size, arch.head_dim
    experts = arch.num_experts
    attention = H * D * (2 * arch.num_heads + 2 * arch.num_kv_heads) // layout.tp
    bias = D * (arch.num_heads + 2 * arch.num_kv_heads) // layout.tp if arch.qkv_bias else 0
    norms = 2 * H + (2 * D if arch.qk_norm else 0)
    mlp = experts * H if experts else 3 * H * F // layout.tp
    expert = experts // layout.ep * 3 * H * F
    layers = layers_of_stage(arch, layout, stage)
    vocabulary = arch.padded_vocab(layout.tp) // layout.tp * H
    first, last = stage == 0, stage == layout.pp - 1
    tables = int(first) + int(last and not (first and arch.tied_embeddings))
    dense = layers * (attention + bias + norms + mlp) + tables * vocabulary + (H if last else 0)
    return Parameters(dense, layers * expert, layers * (attention + (0 if experts else mlp) + expert))


def layers_of_stage(arch: Architecture, layout: Layout, stage: int) -> int:
    """Layers of all chunks of a rank of pipeline stage `stage`."""
    return sum(arch.stage_layers(layout.pp * layout.vpp)[stage :: layout.pp])


def activation_bytes(arch: Architecture, config: TrainerConfig, layout: Layout) -> tuple[float, float]:
    """(kept for the backward pass, at most, with no recomputation) bytes of a token in one layer, in bf16 with flash attention."""
    H, F, D, tp = arch.hidden_size, arch.ffn_size, arch.head_dim, layout.tp
    spread = tp if config.parallel.sequence_parallel else 1  # norms and residuals
    experts = arch.experts_per_token
    norms = 2 * 2 * 2 * H / spread  # input and output of both
    qkv = 2 * D * (arch.num_heads + 2 * arch.num_kv_heads) / tp
    core = qkv + (2 * D * (arch.num_heads + arch.num_kv_heads) / tp if arch.qk_norm else 0) + (2 * D + 4) * arch.num_heads / tp
    activation = 2 * F
    feed_forward = (4 * F + activation) / tp
    if experts:  # tokens are sent to the experts once each: input, both halves of the first product, the activation
        feed_forward = experts * (2 * 2 * H + 4 * F + activation) / spread + 4 * arch.num_experts / spread
    whole = norms + core + feed_forward
    if config.recompute == "full":
        return 2 * H / spread, whole
    saved = 0.0
    if config.recompute == "selective":
        modules = config.recompute_modules
        saved += norms / 2 if "layernorm" in modules else 0
        saved += feed_forward if {"mlp", "moe"} & set(modules) else 0
        saved += experts * activation / spread if "moe_act" in modules and "moe" not in modules else 0
    return whole - saved, whole


def stage_memory(arch: Architecture, config: TrainerConfig, layout: Layout, stage: int, *, micro_batches: int) -> Memory:
    """Bytes on a GPU of pipeline stage `stage`, training in bf16. `micro_batches` of a step, on one rank."""
    parameters = rank_parameters(arch, layout, stage)
    fp8 = config.fp8
    gradient = 2 if config.main_grads_dtype == "bfloat16" else 4
    moment = MOMENT_BYTES[config.moments_dtype]
    state = 4 + 2 * moment  # main weights and Adam's two moments
    shards = (layout.dp * layout.cp, layout.expert_dp) if config.distributed_optimizer else (1, 1)
    optimizer = state * (parameters.dense / shards[0] + parameters.expert / shards[1])
    fp8_copies = 2 * parameters.matrix if fp8 else 0  # one for each of the two products that read a matrix
    bf16 = parameters.total - (parameters.matrix if fp8 and fp8.parameters else 0)

    tokens = config.micro_batch_tokens / layout.cp
    kept, whole = activation_bytes(arch, config, layout)
    in_flight = min(layout.pp - stage, micro_batches)
    if layout.vpp > 1:
        in_flight = layout.pp * (1 + (layout.pp - 1) / (layout.pp * layout.vpp))
    activations = tokens * kept * layers_of_stage(arch, layout, stage) * in_flight
    # The layer whose backward pass runs: what is made again, its gradients (as large as the largest activation), gathered inputs.
    activations += tokens * ((whole - kept) + 2 * 2 * arch.hidden_size + 4 * arch.ffn_size / layout.tp)
    logits = 0.0
    if stage == layout.pp - 1:
        rows = min(tokens, config.chunk_tokens or tokens)
        # bf16 logits that become their own gradient; the whole micro-batch's hidden states, their gradient; a product's output.
        logits = 2 * rows * arch.padded_vocab(layout.tp) / layout.tp + 3 * 2 * tokens * arch.hidden_size
    offload = config.optimizer_offload
    return Memory(
        parameters=2 * bf16 + fp8_copies,
        gradients=gradient * parameters.total,
        optimizer=optimizer * (1 - offload),
        activations=activations,
        logits=logits,
        host=offload * 16 * optimizer / state,  # main weights, two moments and gradients of this rank's shard, all fp32
    )


def fullest_stage(arch: Architecture, config: TrainerConfig, layout: Layout, *, mean_tokens: float) -> Memory:
    """Memory of the pipeline stage that needs most."""
    micro_batches = max(1, round(config.global_batch * mean_tokens / layout.dp / config.micro_batch_tokens))
    stages = [stage_memory(arch, config, layout, stage, micro_batches=micro_batches) for stage in range(layout.pp)]
    return max(stages, key=lambda memory: memory.total)


def check_fits(arch: Architecture, name: str, config: TrainerConfig, gpus: int, gpu_gib: float, *, mean_tokens: float) -> Memory:
    """Memory of the fullest GPU. Raises UserError for a recipe that does not divide or fit, with single changes that would do."""
    layout = Layout.of(config, gpus)
    arch.check_stage(config, name)
    if faults := layout.faults(config):
        raise UserError(f"{name}: {'; '.join(faults)}; change {name}.parallel, {name}.global_batch or --gpus")
    memory = fullest_stage(arch, config, layout, mean_tokens=mean_tokens)
    if memory.total > gpu_gib * GIB:
        fitting = [text for text, changed in _changes(config) if _fits(arch, changed, gpus, gpu_gib, mean_tokens)]
        hint = (
            f"any of these alone would fit: {', '.join(f'{name}.{text}' for text in fitting)}"
            if fitting
            else ("no single change of recompute, micro_batch_tokens, tp, pp or offload is enough: use more GPUs or several changes")
        )
        raise UserError(f"{name}: needs about {memory.total / GIB:.0f} GiB on a GPU, which has {gpu_gib:g}; {describe(memory)}; {hint}")
    return memory


def _fits(arch: Architecture, config: TrainerConfig, gpus: int, gpu_gib: float, mean_tokens: float) -> bool:
    layout = Layout.of(config, gpus)
    faults = arch.layout_faults(config.parallel, config.fp8) + layout.faults(config)
    return not faults and fullest_stage(arch, config, layout, mean_tokens=mean_tokens).total <= gpu_gib * GIB


def _changes(config: TrainerConfig) -> Iterator[tuple[str, TrainerConfig]]:
    """Single changes of a recipe that need less memory."""

    def changed(**update: Any) -> TrainerConfig:
        return config.model_copy(update=update)

    if config.recompute != "full":
        yield "recompute = 'full'", changed(recompute="full")
    if not config.distributed_optimizer:
        yield "distributed_optimizer = true", changed(distributed_optimizer=True)
    half = config.micro_batch_tokens // 2
    if half > (config.max_response_tokens or 0):
        yield f"micro_batch_tokens = {half}", changed(micro_batch_tokens=half)
    for size in ("tp", "pp"):
        for factor in (2, 4, 8):
            value = getattr(config.parallel, size) * factor
            yield f"parallel.{size} = {value}", changed(parallel=config.parallel.model_copy(update={size: value}))
    if hasattr(config, "optimizer_offload"):
        yield "optimizer_offload = 1.0", changed(optimizer_offload=1.0)


def describe(memory: Memory) -> str:
    """The parts in GiB, on one line."""
    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in memory.parts.items())
    return f"{parts}, fixed {FIXED_BYTES / GIB:.0f}, fragmentation {FRAGMENTATION:.0%}"
