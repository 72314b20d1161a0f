"""The distributed optimizer's state in a checkpoint: each rank writes and reads its own part of it, and nothing is gathered.

A data-parallel rank owns a contiguous range of each bucket, so of a parameter (the part of it that its tensor-parallel rank holds) a
contiguous range of its flattened elements: usually all or nothing. In a matrix such a range is three boxes at most: the end of a row,
whole rows, the beginning of a row. torch_dist stores boxes of any size under one name and puts together whatever boxes a load asks
for, so the state can be loaded into any layout. Names and numbers are those of Megatron-Core's 'fully_reshardable', which gathers the
state of a data-parallel group on each of its ranks (or on its first): both read what the other has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KEYS = ("param", "exp_avg", "exp_avg_sq")  # main weights and Adam's moments, as Megatron-Core calls them
_PREFIX = "optimizer.state"

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of a tensor of `shape` that are together its flattened elements from `start` to `stop`, in their order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], number: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (number, *offsets), (1, *sizes)


def attach(optimizer: Any) -> None:
    """Let one of Megatron-Core's optimizers save and load so, if it is a distributed one."""
    if isinstance(optimizer, DistributedOptimizer):
        optimizer.sharded_param_state_fully_reshardable = MethodType(_sharded_state, optimizer)
        optimizer.load_parameter_state_from_fully_reshardable = MethodType(_load_state, optimizer)


def _sharded_state(
    self: DistributedOptimizer, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
) -> dict[int, dict[str, dict[int, ShardedTensor]]]:
    """{number of the parameter: {key: {number of the box: its tensor}}} of what this rank owns; for a load with new tensors to read into."""
    described, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_model = {sharded.data: sharded for sharded in nested_values(described)}
    state: dict[int, dict[str, dict[int, ShardedTensor]]] = {}
    for number, (parameter, start, stop) in enumerate(_owned(self)):
        pieces = list(_pieces(of_model[parameter], parameter, start, stop))
        own = {} if is_loading else self._get_main_param_and_optimizer_states(parameter)
        state[number] = {}
        for key in KEYS:
            flat = torch.empty(stop - start, dtype=torch.float32) if is_loading else _flat(self, own.pop(key))
            state[number][key] = {
                index: replace(
                    piece,
                    key=f"{_PREFIX}.{key}.{piece.key}",
                    data=flat[begin : begin + math.prod(piece.local_shape)].view(piece.local_shape),
                    dtype=torch.float32,
                )
                for index, (begin, piece) in enumerate(pieces)
            }
    return state


def _flat(optimizer: DistributedOptimizer, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    # Moments in fewer bits are handed out as float32 copies: at once to the host, or they would all be on the GPU together.
    return (tensor.cpu() if optimizer.config.use_precision_aware_optimizer else tensor).float().flatten()


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """(parameter, start, stop) of the flattened elements that are this rank's."""
    for maps in optimizer.gbuf_ranges:
        for buckets in maps.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(
    sharded: ShardedTensor | ShardedTensorFactory, parameter: torch.Tensor, start: int, stop: int
) -> Iterator[tuple[int, ShardedTensor]]:
    """(where its elements begin, counted from `start`; box of the whole tensor, without data) of all boxes of that range of the parameter.

    Of a parameter that is stored in several parts (gate and up of a feed-forward layer) each part has its own.
    """
    outline = torch.empty(parameter.shape, device="meta")
    described = replace(sharded, data=outline, **({} if isinstance(sharded, ShardedTensorFactory) else {"dtype": outline.dtype}))
    parts = nested_values(described.build()) if isinstance(described, ShardedTensorFactory) else [described]
    # Each rank's part is another: none is a replica of one on another rank of the data-parallel group.
    replica_id = (*sharded.replica_id[:2], 0)
    for part in sorted(parts, key=lambda part: part.data.storage_offset()):
        assert part.data.is_contiguous(), f"{part.key} is no contiguous part of its parameter"
        begin = part.data.storage_offset()
        inside = (max(start, begin) - begin, min(stop, begin + part.data.numel()) - begin)
        at = begin + inside[0] - start
        ahead = part.prepend_axis_num
        for offsets, sizes in boxes(part.local_shape, *inside):
            place = (*part.global_offset[:ahead], *(a + b for a, b in zip(part.global_offset[ahead:], offsets, strict=True)))
            yield (
                at,
                replace(
                    part,
                    data=None,
                    local_shape=((1,) * ahead) + sizes,
                    global_offset=place,
                    prepend_axis_num=0,
                    axis_fragmentations=None,  # no regular grid
                    replica_id=replica_id,
                ),
            )
            at += math.prod(sizes)


@torch.no_grad()
def _load_state(self: DistributedOptimizer, state_dict: Mapping[int, Mapping[str, Mapping[int, torch.Tensor]]]) -> None:
    """Take over what was read into the tensors of `_sharded_state`."""
    for number, (parameter, _, _) in enumerate(_owned(self)):
        read = {key: _joined(found) for key, found in state_dict[number].items()}
        # torch's AdamW has a 'step' in each state too; its number comes with the settings.
        self._set_main_param_and_optimizer_states(parameter, self._get_main_param_and_optimizer_states(parameter) | read)
    if isinstance(self.optimizer, HybridDeviceOptimizer):
        self.optimizer._sync_hdo_state_to_sub_optimizers()


def _joined(found: Mapping[int, torch.Tensor]) -> torch.Tensor:
    parts = [found[index].flatten() for index in sorted(found)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
