"""What one rank sends and receives, by operation and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from megatron_opd.simulate.devices import GPUS_PER_NODE

# c10d's operations, by how their names begin.
_OPERATIONS = {
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "receive",
    "barrier": "barrier",
}
# Megatron-Core's descriptions of its groups.
_KINDS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_DATA_PARALLEL_GROUP": "expert-dp",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert-tp",
    "MODEL_PARALLEL_GROUP": "tp-pp",
    "EMBEDDING_GROUP": "embedding",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp-cp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",  # all ranks, but for several instances of the optimizer
    "default_pg": "world",
}


@dataclass(frozen=True)
class Group:
    """A process group: what it is for, its size, and whether its ranks are on several nodes of 8 GPUs."""

    kind: str
    ranks: int
    spans_nodes: bool


class Messages:
    """Calls and bytes by operation and group; `groups` are those that were used, by kind."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.groups: dict[str, Group] = {}
        self._known: dict[str, Group] = {}

    def note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A c10d operation: its larger side, input or output, counts."""
        group = self._group(args, kwargs)
        operation = _operation(func._opname)
        if group.kind == "world" and operation in ("send", "receive"):
            group = _between_stages(peer=args[2])
        if group.ranks == 1:
            return
        size = max((_bytes(value) for value in (*args, *kwargs.values())), default=0)
        entry = self.counts.setdefault(f"{operation} over {group.kind} ({group.ranks})", [0, 0])
        entry[0] += 1
        entry[1] += size
        self.groups[group.kind] = group

    def _group(self, args: Any, kwargs: dict[str, Any]) -> Group:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in value._type().qualified_name():
                process_group: Any = dist.ProcessGroup.unbox(value)  # pyright: ignore[reportAttributeAccessIssue]
                name = process_group.group_name
                if name not in self._known:
                    self._known[name] = _describe(process_group)
                return self._known[name]
        raise NotImplementedError(f"a collective without a process group: {args}")


def _describe(process_group: Any) -> Group:
    description = process_group.group_desc
    gloo = description.endswith("_GLOO")
    kind: str = _KINDS.get(description.removesuffix("_GLOO")) or description.removesuffix("_GROUP").lower()
    nodes = {rank // GPUS_PER_NODE for rank in dist.get_process_group_ranks(process_group)}
    return Group(f"{kind} on the host" if gloo else kind, process_group.size(), len(nodes) > 1)


def _between_stages(*, peer: int) -> Group:
    """Of a pipeline of two stages, whose one direction Megatron-Core sends through the group of all ranks, so that both ways overlap."""
    return Group("pp", 2, peer // GPUS_PER_NODE != dist.get_rank() // GPUS_PER_NODE)


def _operation(name: str) -> str:
    plain = name.strip("_")
    return next((said for start, said in _OPERATIONS.items() if plain.startswith(start)), plain)


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
