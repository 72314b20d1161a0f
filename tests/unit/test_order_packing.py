"""The order of training and the packing: nothing lost, nothing twice, nothing over the budget, and no state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.data.order import epoch_order, num_steps, step_rollouts
from megatron_opd.data.packing import pack, split_over_ranks

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(num=st.integers(1, 60), batch=st.integers(1, 100), epochs=st.integers(1, 4), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_each_epoch_sees_each_rollout_once(num: int, batch: int, epochs: int, seed: int) -> None:
    steps = num_steps(num, global_batch=batch, epochs=epochs)
    seen = np.concatenate([step_rollouts(step, num, global_batch=batch, seed=seed) for step in range(steps)])
    assert steps * batch >= num * epochs > (steps - 1) * batch
    for epoch in range(epochs):
        assert sorted(seen[epoch * num : (epoch + 1) * num].tolist()) == list(range(num))
        np.testing.assert_array_equal(seen[epoch * num : (epoch + 1) * num], epoch_order(num, seed=seed, epoch=epoch))


@given(num=st.integers(1, 200), batch=st.integers(1, 50), seed=st.integers(0, 100), start=st.integers(0, 20))
@settings(deadline=None)
def test_a_resume_is_the_same_as_going_on(num: int, batch: int, seed: int, start: int) -> None:
    """A step depends on its number alone: asked for in any order, from any step on."""
    steps = [step_rollouts(step, num, global_batch=batch, seed=seed) for step in range(start + 3)]
    for step in reversed(range(start, start + 3)):
        got = step_rollouts(step, num, global_batch=batch, seed=seed)
        np.testing.assert_array_equal(got, steps[step])
        assert got.dtype == np.int64


def test_seed_and_epoch_change_the_order() -> None:
    orders = {epoch_order(100, seed=seed, epoch=epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    with pytest.raises(ValueError, match="no rollouts"):
        step_rollouts(0, 0, global_batch=4, seed=0)


def test_the_order_is_the_same_in_every_version() -> None:
    """A run that goes on under another numpy must see the same order: these numbers may never change."""
    assert epoch_order(8, seed=7, epoch=3).tolist() == [4, 3, 5, 6, 0, 7, 1, 2]


@given(lengths=LENGTHS, slack=st.integers(0, 700), packing=st.booleans())
@settings(deadline=None)
def test_pack_loses_nothing_and_keeps_to_the_budget(lengths: list[int], slack: int, packing: bool) -> None:
    budget = max(lengths) + slack
    bins = pack(lengths, budget, packing=packing)
    assert sorted(position for bin_ in bins for position in bin_) == list(range(len(lengths)))
    loads = [sum(lengths[position] for position in bin_) for bin_ in bins]
    assert max(loads) <= budget
    assert all(bins)
    if not packing:
        assert [len(bin_) for bin_ in bins] == [1] * len(lengths)
        return
    # First fit: no two bins would fit in one, so at most twice the fewest bins that can hold the tokens.
    for number, load in enumerate(loads):
        assert all(load + other > budget for other in loads[number + 1 :])
    assert len(bins) <= max(1, 2 * sum(lengths) // budget + 1)


def test_pack_of_nothing_and_of_too_much() -> None:
    assert pack([], 10) == []
    assert pack([10], 10) == [[0]]
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit 10"):
        pack([3, 11], 10)


@given(lengths=LENGTHS, ranks=st.integers(1, 8))
@settings(deadline=None)
def test_split_is_complete_and_balanced(lengths: list[int], ranks: int) -> None:
    if len(lengths) < ranks:
        with pytest.raises(ValueError, match=f"{len(lengths)} sequences for {ranks} data-parallel ranks"):
            split_over_ranks(lengths, ranks)
        return
    split = split_over_ranks(lengths, ranks)
    assert len(split) == ranks
    assert Counter(position for rank in split for position in rank) == Counter(range(len(lengths)))
    assert all(split)
    loads = [sum(lengths[position] for position in rank) for rank in split]
    assert max(loads) - min(loads) <= max(lengths)
