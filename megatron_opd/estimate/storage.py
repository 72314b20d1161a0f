"""What a run takes on disk, and of the nodes' memory beside the GPUs'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.estimate.allocation import Allocation
from megatron_opd.estimate.compute import BF16
from megatron_opd.estimate.memory import GIB
from megatron_opd.estimate.ranges import Range, exactly
from megatron_opd.estimate.workload import Model
from megatron_opd.recipe.config import ScoreStage
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

# Measured (docs/results/bench_store.json): bytes a token of a scored store, of 12 before compression: id, sampler's and teacher's log-prob.
STORE_BYTES = 7.689
RAW_BYTES = 12
STATE_BYTES = 12  # of a parameter in a checkpoint: main weight and Adam's two moments
SHARD_BYTES = 5 * GIB  # of a converted model's files, at most


def store_bytes(tokens: Range, arrays: int) -> Range:
    """Of a store, or of what scoring adds: `arrays` numbers of 4 bytes a token, which compress as the measured ones do together."""
    return tokens * (STORE_BYTES * 4 * arrays / RAW_BYTES)


def candidate_bytes(stage: ScoreStage, response_tokens: Range) -> Range:
    """Of the teacher's top-k: from as compressible as the rest of a store to not at all."""
    raw = response_tokens * (stage.top_k * (4 + (2 if stage.topk_dtype == "float16" else 4)))
    return Range(raw.low * STORE_BYTES / RAW_BYTES, raw.high)


def model_bytes(model: Model) -> float | None:
    """Of a Hugging Face directory: its weight files where it is there, else bf16; None where its size is not known."""
    files = list(Path(model.directory).glob("*.safetensors"))
    if files:
        return float(sum(file.stat().st_size for file in files))
    return None if model.arch is None else float(BF16 * model.arch.num_parameters)


def checkpoint_bytes(arch: Architecture, config: TrainerConfig) -> float:
    """Of one checkpoint: weights, main weights and Adam's two moments, these always in float32."""
    return float(arch.num_parameters * (_weight_bytes(config) + STATE_BYTES))


def _weight_bytes(config: TrainerConfig) -> int:
    return 4 if config.dtype == "float32" else BF16


def num_checkpoints(config: TrainerConfig, steps: int) -> int:
    """As many as may lie there at once: the newest, one that is being written, and those kept for good."""
    saves = -(-steps // config.save_every)
    kept = 0 if config.keep_every is None else steps // config.keep_every
    return min(saves, config.keep_last + 1 + kept)


def save_memory(arch: Architecture, config: TrainerConfig, allocation: Allocation) -> float:
    """Bytes of the fullest node's memory that a save takes until it is written, and a load about as much.

    Each rank holds a copy of its own part of the optimizer's state (of a state that is on the host anyway: of what changes meanwhile); the
    first data-parallel rank of each tensor-parallel and pipeline rank one of the weights, and these may be on one node.
    """
    parallel = config.parallel
    share = 1 / allocation.nodes
    weights = min(1.0, allocation.per_node / (parallel.tp * parallel.pp))
    return arch.num_parameters * (STATE_BYTES * share + _weight_bytes(config) * max(share, weights))


def conversion_memory(arch: Architecture) -> Range:
    """Bytes that `convert` holds: a file of the result and a layer, and at most both twice (as read, and as written)."""
    experts = max(1, arch.num_experts)
    layer = 3 * arch.hidden_size * arch.ffn_size * experts + 2 * arch.hidden_size * arch.head_dim * (arch.num_heads + arch.num_kv_heads)
    file = min(SHARD_BYTES, BF16 * arch.num_parameters)
    held = file + BF16 * max(layer, arch.vocab_size * arch.hidden_size)
    return exactly(held) + Range(0, held)
