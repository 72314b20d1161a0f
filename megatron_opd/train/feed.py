"""The micro-batches of a step on their way to the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from megatron_opd.train.batches import MicroBatch


def feeds(batches: Sequence[MicroBatch], device: torch.device, *, num_chunks: int) -> list[Iterator[MicroBatch]]:
    """For each chunk of an interleaved pipeline (one, without) an iterator over the micro-batches on the device.

    Those that are elsewhere are copied to the GPU as they are needed, see `Feed`.
    """
    if all(batch.tokens.device == device for batch in batches):
        return [iter(batches) for _ in range(num_chunks)]
    feed = Feed(batches, device, num_chunks=num_chunks)
    return [feed.read() for _ in range(num_chunks)]


class Feed:
    """Copies each micro-batch once, whatever the number of chunks that read it, while the one before it computes.

    The copies are in a stream of their own, from pinned memory. On the device are those that not all chunks have taken, and the next one.
    """

    def __init__(self, batches: Sequence[MicroBatch], device: torch.device, *, num_chunks: int):
        self._batches, self._device = batches, device
        self._readers = [num_chunks] * len(batches)  # that have not taken it yet
        self._copied = 0
        self._there: dict[int, tuple[MicroBatch, torch.cuda.Event]] = {}
        self._stream = _copy_stream(device)
        self._copy()

    def read(self) -> Iterator[MicroBatch]:
        for number in range(len(self._batches)):
            if number + 1 == self._copied:  # ahead of the kernels that use this one
                self._copy()
            yield self._take(number)

    def _copy(self) -> None:
        if self._copied == len(self._batches):
            return
        with torch.cuda.stream(self._stream):
            batch, done = self._batches[self._copied].to(self._device), torch.cuda.Event()
            done.record(self._stream)
        self._there[self._copied] = batch, done
        self._copied += 1

    def _take(self, number: int) -> MicroBatch:
        batch, done = self._there[number]
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in batch.tensors.values():  # its memory is the copy stream's, which could give it to a later batch too soon
            tensor.record_stream(current)
        self._readers[number] -= 1
        if not self._readers[number]:
            del self._there[number]
        return batch


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
