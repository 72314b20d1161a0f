"""The shapes that stages of a pipeline send each other, from the step's plan instead of an exchange.

Micro-batches have different lengths. Megatron lets each receiver ask for a tensor's shape first: a message, a wait of the host for the
device and a read, at every tensor. But all stages of a data-parallel rank have made the same micro-batches, and tensors between two
stages arrive in the order of the schedule. So what comes next is known.

Legend: n micro-batches, v chunks of the model a rank (one, but for an interleaved pipeline).
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

# Parts of the names of what these two of Megatron's functions take.
_EXCHANGE = ["self", "send_next", "send_prev", "recv_prev", "recv_next"]
_TABLE = ["num_microbatches", "num_model_chunks", "microbatch_group_size"]


class Shapes:
    """Answers in place of Megatron's `P2PCommunicator._communicate_shapes` for one step, and checks each tensor that is sent."""

    def __init__(self, lengths: Sequence[int], config: Any, *, rank: int, size: int, num_chunks: int):
        """lengths: tokens of each micro-batch on this rank. rank, size: of the pipeline."""
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [[length // split, 1, config.hidden_size] for length in lengths]
        group = config.microbatch_group_size_per_vp_stage if num_chunks > 1 else len(lengths)
        # Every rank goes forward and back through this list, chunks in turn; the last chunk's output goes nowhere.
        table = schedules.get_schedule_table(len(lengths), num_chunks, group)
        everything = [shapes[batch] for batch, _ in table]
        around = [shapes[batch] for batch, chunk in table if chunk < num_chunks - 1]  # between the last rank and the first
        before, after = around if rank == 0 else everything, around if rank == size - 1 else everything
        self._left = {name: iter(shapes) for name, shapes in _directions(before, after)}

    def answer(
        self, tensor_send_next: torch.Tensor | None, tensor_send_prev: torch.Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Shapes of what comes from the stage before and from the stage after, [0, 0, 0] of nothing. Raises RuntimeError out of order."""
        for name, tensor in (("outputs sent", tensor_send_next), ("gradients sent", tensor_send_prev)):
            if tensor is not None and list(tensor.shape) != (planned := self._next(name)):
                raise RuntimeError(f"pipeline: {name} have shape {list(tensor.shape)} where the plan of the step has {planned}; {_REMEDY}")
        return (
            self._next("outputs received") if recv_prev else [0, 0, 0],
            self._next("gradients received") if recv_next else [0, 0, 0],
        )

    def finish(self, *, forward_only: bool) -> None:
        """Raises RuntimeError unless everything that was planned went by."""
        for name, shapes in self._left.items():
            left = len(list(shapes))
            if left and not (forward_only and name.startswith("gradients")):
                raise RuntimeError(f"pipeline: {left} tensors too few among the {name} of a step; {_REMEDY}")

    def _next(self, name: str) -> list[int]:
        shape = next(self._left[name], None)
        if shape is None:
            raise RuntimeError(f"pipeline: more {name} than a step has; {_REMEDY}")
        return shape


_REMEDY = "Megatron-Core's schedule is not the one that train/pipeline.py knows (0.16.1, 0.19.2): install one of these"


def _directions(before: list[list[int]], after: list[list[int]]) -> list[tuple[str, list[list[int]]]]:
    return [("outputs received", before), ("gradients sent", before), ("outputs sent", after), ("gradients received", after)]


@contextlib.contextmanager
def known_shapes(lengths: Sequence[int], config: Any, *, num_chunks: int, forward_only: bool) -> Iterator[None]:
    """While this lasts stages ask each other for no shapes. Raises RuntimeError if they have other micro-batches.

    With a Megatron-Core that does this in a way not known here the exchange stays, with a warning.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1 or not _is_known():
        yield
        return
    _check_agreement(lengths, group)
    shapes = Shapes(lengths, config, rank=group.rank(), size=group.size(), num_chunks=num_chunks)
    exchange = P2PCommunicator._communicate_shapes
    P2PCommunicator._communicate_shapes = lambda self, *args, **kwargs: shapes.answer(*args, **kwargs)
    try:
        yield
    finally:
        P2PCommunicator._communicate_shapes = exchange
    shapes.finish(forward_only=forward_only)


def _is_known() -> bool:
    if _takes(P2PCommunicator, "_communicate_shapes", _EXCHANGE) and _takes(schedules, "get_schedule_table", _TABLE):
        return True
    warnings.warn(f"pipeline stages ask each other for the shape of each tensor, which is slow: {_REMEDY}", stacklevel=2)
    return False


def _takes(owner: Any, function: str, wanted: list[str]) -> bool:
    found = list(inspect.signature(getattr(owner, function)).parameters) if hasattr(owner, function) else []
    return len(found) == len(wanted) and all(part in name for part, name in zip(wanted, found, strict=True))


def _check_agreement(lengths: Sequence[int], group: Any) -> None:
    """One message of the hosts: with different plans tensors of one length would be received as another's."""
    number = zlib.crc32(repr(list(lengths)).encode())
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        raise RuntimeError("pipeline: the stages have made different micro-batches of this step: do all nodes read the same store?")
