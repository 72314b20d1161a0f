"""Micro-batches on their way to a GPU, with streams and events that only keep an account."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.train import feed
from megatron_opd.train.batches import MicroBatch
from megatron_opd.train.feed import feeds
from megatron_opd.train.loss import pack_sums

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def batch_of(length: int) -> MicroBatch:
    rows = torch.arange(length - 1)
    values = torch.linspace(-2, -1, length - 1)
    return MicroBatch(
        tokens=torch.arange(length)[None], positions=torch.arange(length)[None], cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        rows=rows, labels=rows + 1, response_positions=rows, weights=torch.ones(length - 1), student_logp=values, teacher_logp=values,
        topk_ids=None, topk_logp=None, overlap_ids=None, denominator=length - 1, max_seqlen=length, num_sequences=1, num_tokens=length,
        sum_squared_lengths=length**2,
    )  # fmt: skip


class Account:
    """What happened, in order: ('copy', n), ('recorded', n), ('waited', n), ('held', n) of the n-th batch copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[tuple[str, int]] = []
        numbers = itertools.count()
        account = self

        class Event:
            def __init__(self) -> None:
                self.number = next(numbers)

            def record(self, stream: Any) -> None:
                account.log.append(("recorded", self.number))

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                account.log.append(("waited", event.number))

        self.copied = itertools.count()
        move = MicroBatch.to

        def to(batch: MicroBatch, device: torch.device) -> MicroBatch:
            account.log.append(("copy", next(account.copied)))
            return move(batch, device)

        held: dict[int, int] = {}

        def record_stream(tensor: torch.Tensor, stream: Any) -> None:
            held[id(tensor)] = held.get(id(tensor), 0) + 1

        self.held = held
        monkeypatch.setattr(MicroBatch, "to", to)
        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
        for name, value in {"Stream": Stream, "Event": Event, "current_stream": lambda device: Stream()}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        feed._copy_stream.cache_clear()


def test_what_is_there_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(monkeypatch)
    batches = [batch_of(3), batch_of(5)]
    first, second = feeds(batches, CPU, num_chunks=2)
    assert [id(batch) for batch in first] == [id(batch) for batch in second] == [id(batch) for batch in batches]
    assert account.log == []


def test_the_next_one_is_copied_before_this_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(monkeypatch)
    (batches,) = feeds([batch_of(n) for n in (3, 5, 4)], ELSEWHERE, num_chunks=1)
    first = [("copy", 0), ("recorded", 0)]
    assert account.log == first
    found = next(batches)
    assert account.log == [*first, ("copy", 1), ("recorded", 1), ("waited", 0)]
    assert found.tokens.device == found.counts.device == ELSEWHERE
    assert all(id(tensor) in account.held for tensor in found.tensors.values())
    assert [batch.tokens.shape[1] for batch in batches] == [5, 4]
    assert [what for what, _ in account.log].count("copy") == 3


def test_chunks_share_a_copy_that_lasts_until_the_last_has_taken_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of an interleaved pipeline over two ranks with four micro-batches."""
    account = Account(monkeypatch)
    source = feed.Feed([batch_of(n) for n in (3, 5, 4, 6)], ELSEWHERE, num_chunks=2)
    chunks = [source.read(), source.read()]
    taken: dict[int, list[MicroBatch]] = {0: [], 1: []}
    there = []
    for chunk in (0, 0, 1, 1, 0, 0, 1, 1):
        taken[chunk].append(next(chunks[chunk]))
        there.append(sorted(source._there))
    assert there == [[0, 1], [0, 1, 2], [1, 2], [2], [2, 3], [2, 3], [3], []]
    assert all(one is other for one, other in zip(taken[0], taken[1], strict=True))
    assert [what for what, _ in account.log].count("copy") == 4


def test_counts_travel_with_the_batch() -> None:
    batch = batch_of(6)
    assert batch.counts.tolist() == [5, 5, 1]
    moved = batch.to(ELSEWHERE)
    assert {name: tensor.device for name, tensor in moved.tensors.items()} == dict.fromkeys(batch.tensors, ELSEWHERE)
    logp = torch.full((5,), -1.0)
    sums = pack_sums(torch.tensor(2.0), logp, torch.ones(5), batch, {"clipped": torch.tensor(3)})
    assert sums[:4].tolist() == [2, 5, 5, 1]
    assert (sums[7], sums.dtype) == (3, torch.float64)
    sums = pack_sums(torch.empty((), device=ELSEWHERE), logp.to(ELSEWHERE), logp.to(ELSEWHERE), moved, {})
    assert sums.device == ELSEWHERE  # no operation joined a tensor of the host to it
