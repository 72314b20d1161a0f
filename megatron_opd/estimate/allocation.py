"""The GPUs that a run gets: do its groups of ranks and its servers fit them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_opd.cost.gpus import Gpu
from megatron_opd.errors import ConfigError, UserError
from megatron_opd.estimate.compute import LEAST_SEQUENCES, Serving, sequences_that_fit, smallest_copy
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.inference import EngineConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

GPUS_PER_NODE = 8
Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Allocation:
    """`nodes` nodes of `per_node` GPUs, and what memory each has beside theirs, if that is known."""

    nodes: int
    per_node: int
    memory_gib: float | None = None

    @property
    def gpus(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.gpus} GPUs ({self.nodes} nodes of {self.per_node})" if self.nodes > 1 else f"{self.gpus} GPUs"


def allocation_of(gpus: int | None, nodes: int | None, memory_gib: float | None = None) -> Allocation:
    """`gpus` in all, on `nodes`; one of them may be None: nodes have 8 GPUs, fewer where there are fewer in all. Raises UserError."""
    assert gpus is not None or nodes is not None
    if gpus is None:
        return Allocation(nodes or 1, GPUS_PER_NODE, memory_gib)
    if nodes is None:
        nodes = gpus // GPUS_PER_NODE if gpus % GPUS_PER_NODE == 0 else 1
    if gpus % nodes:
        raise UserError(f"--gpus {gpus} is the number in all, and not a multiple of --nodes {nodes}; give nodes of the same number of GPUs")
    return Allocation(nodes, gpus // nodes, memory_gib)


def check_allocation(recipe: Recipe, allocation: Allocation) -> list[str]:
    """Raise ConfigError for all that can't be placed on these nodes, each with its field; returns what is possible and slow."""
    faults: list[str] = []
    notes: list[str] = []
    for name in ("sft", "train"):
        found, said = _training(recipe, name, allocation)
        faults += found
        notes += said
    roles: list[Role] = [] if recipe.engine.launch is None else ["teacher", "student"]
    for role in roles:
        faults += [fault for fault in _servers(recipe.engine, role, allocation.per_node) if fault not in faults]
    if faults:
        raise ConfigError(f"the recipe does not fit {allocation}: {'; '.join(faults)}")
    return notes


def _training(recipe: Recipe, name: str, allocation: Allocation) -> tuple[list[str], list[str]]:
    config = getattr(recipe, name)
    parallel, per_node, faults, notes = config.parallel, allocation.per_node, [], []
    tp = parallel.tp
    if tp > per_node and tp % per_node == 0:
        notes.append(f"WARNING: {name}.parallel.tp = {tp} is over nodes of {per_node} GPUs: its messages are many, and go over the network")
    elif tp > per_node or per_node % tp:
        fitting = ", ".join(str(n) for n in range(1, per_node + 1) if per_node % n == 0)
        faults.append(
            f"{name}.parallel.tp = {tp} would cut groups of ranks at the edge of nodes of {per_node} GPUs; take one of {fitting}, or other nodes"
        )
    try:
        parallel.check_ranks(allocation.gpus)
    except ConfigError as error:
        faults.append(f"{name}.parallel: {error}")
    else:
        if fault := config.batch_fault(allocation.gpus // (tp * parallel.pp * parallel.cp)):
            faults.append(f"{name}.{fault}; raise it, or take fewer GPUs")
    return faults, notes


def _servers(engine: EngineConfig, role: Role, per_node: int) -> list[str]:
    """Servers run on one node each, and a stage starts all of its own on every node."""
    sizes = {key: launched(engine, role, key) for key in ("servers", "tp", "dp")}
    where = {key: f"{field} = {value}" for key, (field, value) in sizes.items()}
    servers, tp, dp = (value for _, value in sizes.values())
    if tp > per_node:
        return [f"{where['tp']}, but a server runs on one node, which has {per_node} GPUs; lower it, or take a smaller {role}"]
    if servers * tp * dp > per_node:
        return [
            f"{where['servers']} servers, {where['tp']} and {where['dp']} take {servers * tp * dp} GPUs of a node, which has {per_node}; "
            f"servers * tp * dp may be at most {per_node}"
        ]
    return []


def launched(engine: EngineConfig, role: Role, key: str) -> tuple[str, int]:
    """(name of the field, value) of engine.launch's `key` for the servers of one model, whose own section goes first."""
    own: Any = getattr(engine.launch, role, None)
    value = getattr(own, key, None)
    return (f"engine.launch.{key}", getattr(engine.launch, key)) if value is None else (f"engine.launch.{role}.{key}", value)


def plan_serving(
    engine: EngineConfig, role: Role, arch: Architecture, allocation: Allocation, gpu: Gpu, *, tokens: float, stage: str
) -> Serving:
    """How a stage's model lies on the GPUs: as engine.launch says, otherwise as many copies as fit, of as few GPUs as have room for 16 sequences.

    `tokens`: of the longest sequence. Raises UserError where not even one has room.
    """
    if engine.launch is not None:
        (field, tp), (_, servers), (_, dp) = (launched(engine, role, key) for key in ("tp", "servers", "dp"))
        if sequences_that_fit(arch, gpu, tp, tokens) < 1:
            raise UserError(f"{stage}: {field} = {tp}, but {_needed(arch, gpu, tokens, role)}; raise it, or shorten the responses")
        return Serving(tp, servers * dp * allocation.nodes, allocation.gpus)
    tp = smallest_copy(arch, gpu, tokens)
    if tp is None or tp > allocation.per_node:
        raise UserError(
            f"{stage}: {_needed(arch, gpu, tokens, role)}, and a node has {allocation.per_node}; "
            "a server runs on one node: take larger GPUs (--gpu, --gpu-memory) or nodes, shorter responses, or a smaller model"
        )
    roomy = smallest_copy(arch, gpu, tokens, sequences=LEAST_SEQUENCES) or allocation.per_node
    while tp < roomy and 2 * tp <= allocation.per_node:
        tp *= 2
    return Serving(tp, allocation.nodes * (allocation.per_node // tp), allocation.gpus)


def _needed(arch: Architecture, gpu: Gpu, tokens: float, role: Role) -> str:
    tp = smallest_copy(arch, gpu, tokens)
    if tp is None:
        return f"no number of GPUs of {gpu.memory_gib:g} GiB suffices for the {role} and one sequence of {tokens:,.0f} tokens"
    return f"the {role} and one response need about {tp} GPUs of {gpu.memory_gib:g} GiB"
