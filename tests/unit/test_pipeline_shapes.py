"""The order in which tensors arrive at the stages of a pipeline, against a simulation of all its stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.train import pipeline
from megatron_opd.train.pipeline import Shapes


def shapes_of(lengths: list[int], rank: int, size: int, chunks: int) -> Shapes:
    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False, hidden_size=8, microbatch_group_size_per_vp_stage=size)
    return Shapes(lengths, config, rank=rank, size=size, num_chunks=chunks)


@settings(deadline=None)
@given(size=st.integers(2, 4), chunks=st.integers(1, 3), groups=st.integers(1, 3))
def test_each_stage_expects_what_its_neighbour_sends(size: int, chunks: int, groups: int) -> None:
    lengths = [10 + number for number in range(size * groups)]
    ranks = [shapes_of(lengths, rank, size, chunks) for rank in range(size)]
    for rank in range(size):
        after = (rank + 1) % size
        sent, received = (list(ranks[number]._left[name]) for number, name in ((rank, "outputs sent"), (after, "outputs received")))
        assert sent == received
        assert len(sent) == len(lengths) * (chunks if after else chunks - 1)
        assert list(ranks[after]._left["gradients sent"]) == list(ranks[rank]._left["gradients received"])


def test_what_does_not_fit_the_plan_is_refused() -> None:
    shapes = shapes_of([4, 6], 0, 2, 1)
    assert shapes.answer(torch.empty(4, 1, 8), None, False, True) == ([0, 0, 0], [4, 1, 8])
    with pytest.raises(RuntimeError, match=r"outputs sent have shape \[4, 1, 8\] where the plan of the step has \[6, 1, 8\]"):
        shapes.answer(torch.empty(4, 1, 8), None, False, False)
    with pytest.raises(RuntimeError, match="more outputs received than a step has"):
        shapes.answer(None, None, True, False)
    shapes.finish(forward_only=True)
    shapes = shapes_of([4], 1, 2, 1)
    with pytest.raises(RuntimeError, match="1 tensors too few among the outputs received"):
        shapes.finish(forward_only=True)


def test_another_exchange_of_megatrons_stays_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipeline._is_known()

    def exchange(self: Any, tensors: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(pipeline.P2PCommunicator, "_communicate_shapes", exchange)
    with pytest.warns(UserWarning, match="which is slow: Megatron-Core's schedule is not the one that"):
        assert not pipeline._is_known()
