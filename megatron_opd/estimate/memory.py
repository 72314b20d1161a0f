"""Memory per GPU of a training stage before it runs, from a model of the arithmetic: docs/training.md has it.

Legend: H hidden size, F feed-forward size (an expert's, of a mixture), D head size. Sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from megatron_opd.errors import UserError
from megatron_opd.estimate.activations import SCALED_MOMENTS, WORKSPACE_BYTES, activations
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

GIB = 2**30
# CUDA context, cuBLAS and NCCL buffers; and what the caching allocator can't use. Assumptions.
FIXED_BYTES = 3 * GIB
FRAGMENTATION = 0.05
MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 2}  # Transformer Engine keeps FP8 numbers transposed too


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
    """Bytes on the fullest GPU at the busiest moment of a step."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass
    working: float  # of the busiest moment: a layer's backward pass, the LM head and loss, or Adam
    buffers: float
    building: float  # at most in all, before the first step
    host: float  # not on the GPU: what optimizer_offload keeps in the node's memory for it

    @property
    def parts(self) -> dict[str, float]:
        """What lies on the GPU in a step."""
        return {name: value for name, value in vars(self).items() if name not in ("building", "host")}

    @property
    def total(self) -> float:
        return max(sum(self.parts.values()), self.building) * (1 + FRAGMENTATION) + FIXED_BYTES


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
        elif fault := config.batch_fault(self.dp):
            found.append(fault)
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


def stage_memory(
    arch: Architecture, config: TrainerConfig, layout: Layout, stage: int, *, micro_batches: int, megatron_core: str | None = None
) -> Memory:
    """Bytes on a GPU of pipeline stage `stage`, training in bf16 with Transformer Engine. `micro_batches` of a step, on one rank.

    megatron_core: its version (default: of the installed one; the newest, if none is).
    """
    parameters = rank_parameters(arch, layout, stage)
    fp8 = config.fp8
    gradient = 2 if config.main_grads_dtype == "bfloat16" else 4
    moment = MOMENT_BYTES[config.moments_dtype]
    state = 4 + 2 * moment  # main weights and Adam's two moments
    shards = (layout.dp * layout.cp, layout.expert_dp) if config.distributed_optimizer else (1, 1)
    own = parameters.dense / shards[0] + parameters.expert / shards[1]
    offload = config.optimizer_offload
    fp8_copies = 2 * parameters.matrix if fp8 else 0  # one for each of the two products that read a matrix
    bf16 = parameters.total - (parameters.matrix if fp8 and fp8.parameters else 0)
    # Where mxfp8 weights are gathered through the gradients' memory, 0.16 does so with no weight in place, and the others lie there twice.
    twice = bool(fp8 and fp8.parameters and fp8.recipe == "mxfp8") and _before_0_17(megatron_core or _installed_megatron_core())

    layers = layers_of_stage(arch, layout, stage)
    held = activations(arch, config, layout, stage, layers=layers, micro_batches=micro_batches)
    # Adam makes float32 numbers of moments that have a scale, of all at once; no activations are there then.
    unscaled = own * 8 * (1 - offload) if config.moments_dtype in SCALED_MOMENTS else 0
    # Products add weight gradients to those above, and hand on one stand-in for each shape of a matrix; experts share theirs.
    stand_ins = 2 * (parameters.matrix - parameters.expert + parameters.expert / max(1, arch.num_experts // layout.ep)) / max(1, layers)
    # An optimizer that has a part on the GPU and one on the host makes float32 gradients of its own, and keeps them.
    gradients_again = 4 * own * (1 - offload) if 0 < offload < 1 and gradient == 2 else 0
    return Memory(
        parameters=2 * bf16 * (1 + twice) + fp8_copies,
        gradients=gradient * parameters.total + gradients_again,
        optimizer=own * state * (1 - offload),
        activations=held.kept,
        working=max(held.working, unscaled - held.kept),
        buffers=WORKSPACE_BYTES * (5 if arch.num_experts else 1) + stand_ins,
        # While Megatron-Core's buffers for weights and gradients are filled, the weights lie there a second time.
        building=(2 + 2 + gradient) * parameters.total,
        host=offload * 16 * own,  # main weights, two moments and gradients of this rank's shard, all fp32
    )


@cache
def _installed_megatron_core() -> str | None:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return None


def _before_0_17(version: str | None) -> bool:
    return version is not None and tuple(int(part) for part in version.split(".")[:2]) < (0, 17)


def fullest_stage(arch: Architecture, config: TrainerConfig, layout: Layout, *, mean_tokens: float) -> Memory:
    """Memory of the pipeline stage that needs most."""
    micro_batches = max(1, round(config.step_tokens(mean_tokens) / layout.dp / config.micro_batch_tokens))
    stages = [stage_memory(arch, config, layout, stage, micro_batches=micro_batches) for stage in range(layout.pp)]
    return max(stages, key=lambda memory: memory.total)


def check_fits(arch: Architecture, name: str, config: TrainerConfig, gpus: int, gpu_gib: float, *, mean_tokens: float) -> Memory:
    """Memory of the fullest GPU. Raises UserError for a recipe that does not divide or fit, with single changes that would do."""
    layout = Layout.of(config, gpus)
    arch.check_stage(config, name)
    if faults := layout.faults(config):
        raise UserError(f"{name}: {'; '.join(faults)}; change {name}.parallel, the batch or --gpus")
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
    if half > (config.longest_response or 0):
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
    parts += f"; while it is built {memory.building / GIB:.1f}" if memory.building > sum(memory.parts.values()) else ""
    return f"{parts}, fixed {FIXED_BYTES / GIB:.0f}, fragmentation {FRAGMENTATION:.0%}"
