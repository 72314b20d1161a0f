"""The order of training and the packing: nothing lost, nothing twice, nothing over the budget, and no state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.data.order import TrainingOrder, epoch_order
from megatron_opd.data.packing import costs_of, pack, plan_micro_batches, split_over_ranks

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(num=st.integers(1, 60), batch=st.integers(1, 100), epochs=st.integers(1, 4), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_each_epoch_sees_each_rollout_once(num: int, batch: int, epochs: int, seed: int) -> None:
    order = TrainingOrder(np.ones(num, np.int64), seed, batch)
    steps = order.num_steps(epochs)
    seen = np.concatenate([order.rollouts(step) for step in range(steps)])
    assert steps * batch >= num * epochs > (steps - 1) * batch
    assert order.repeats() == (batch > num)
    for epoch in range(epochs):
        assert sorted(seen[epoch * num : (epoch + 1) * num].tolist()) == list(range(num))
        np.testing.assert_array_equal(seen[epoch * num : (epoch + 1) * num], epoch_order(num, seed=seed, epoch=epoch))


@given(lengths=LENGTHS, tokens=st.integers(1, 3000), epochs=st.integers(1, 3), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_steps_of_tokens(lengths: list[int], tokens: int, epochs: int, seed: int) -> None:
    """The epochs' orders one after the other; after each step there are as many tokens as its budgets, but for the rollout at their edge."""
    order = TrainingOrder(np.array(lengths), seed, None, tokens)
    steps = order.num_steps(epochs)
    chosen = [order.rollouts(step) for step in range(steps)]
    assert steps * tokens >= sum(lengths) * epochs > (steps - 1) * tokens
    assert order.repeats() == (tokens > sum(lengths))
    seen, num = np.concatenate(chosen), len(lengths)
    for epoch in range(epochs):
        np.testing.assert_array_equal(seen[epoch * num : (epoch + 1) * num], epoch_order(num, seed=seed, epoch=epoch))
    trained = 0
    for number, rollouts in enumerate(chosen, start=1):
        assert len(rollouts) >= tokens // max(lengths), "a rank that has a longest rollout's share of the budget has a rollout"
        trained += sum(lengths[index] for index in rollouts)
        assert number * tokens <= trained < number * tokens + max(lengths)
    assert order.epochs(steps) == pytest.approx(steps * tokens / sum(lengths))


@given(lengths=LENGTHS, batch=st.integers(1, 50), in_tokens=st.booleans(), seed=st.integers(0, 100), start=st.integers(0, 20))
@settings(deadline=None)
def test_a_resume_is_the_same_as_going_on(lengths: list[int], batch: int, in_tokens: bool, seed: int, start: int) -> None:
    """A step depends on its number alone: asked for in any order, from any step on."""
    sizes = (None, 20 * batch) if in_tokens else (batch, None)
    order = TrainingOrder(np.array(lengths), seed, *sizes)
    steps = [order.rollouts(step) for step in range(start + 3)]
    for step in reversed(range(start, start + 3)):
        got = TrainingOrder(np.array(lengths), seed, *sizes).rollouts(step)
        np.testing.assert_array_equal(got, steps[step])
        assert got.dtype == np.int64


def test_seed_and_epoch_change_the_order() -> None:
    orders = {epoch_order(100, seed=seed, epoch=epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    with pytest.raises(ValueError, match="no rollouts"):
        TrainingOrder(np.array([], np.int64), 0, 4).rollouts(0)


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
    # A bin is opened only where none has room: no two bins would fit in one, so at most twice the fewest bins that can hold the tokens.
    for number, load in enumerate(loads):
        assert all(load + other > budget for other in loads[number + 1 :])
    assert len(bins) <= max(1, 2 * sum(lengths) // budget + 1)


@given(lengths=LENGTHS, slack=st.integers(0, 10**15), ranks=st.integers(1, 3))
@settings(deadline=None)
def test_room_for_more_than_all_changes_nothing_and_takes_no_memory(lengths: list[int], slack: int, ranks: int) -> None:
    total = sum(lengths)
    assert pack(lengths, total + slack) == pack(lengths, total) == [sorted(range(len(lengths)), key=lambda position: -lengths[position])]
    if len(lengths) >= ranks:
        roomy, tight = (plan_micro_batches(np.array(lengths), num_ranks=ranks, budget=budget) for budget in (total + slack, total))
        assert roomy == tight


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


def dapo_math_like(num: int, seed: int = 0) -> np.ndarray:
    """Prompt and response lengths: responses log-normal (median 1100 tokens), cut at 4096."""
    rng = np.random.default_rng(seed)
    return np.minimum(np.exp(rng.normal(np.log(1100), 0.8, num)), 4096).astype(np.int64) + rng.integers(60, 400, num)


@pytest.mark.parametrize("budget", [4496, 8192, 16384])
def test_bins_are_full(budget: int) -> None:
    lengths = dapo_math_like(20_000)
    bins = pack(lengths, budget)
    assert lengths.sum() >= 0.97 * len(bins) * budget


@given(
    lengths=LENGTHS,
    ranks=st.integers(1, 5),
    slack=st.integers(0, 700),
    quadratic=st.floats(0, 1),
    packing=st.booleans(),
    equal=st.booleans(),
    multiple=st.integers(1, 3),
)
@settings(deadline=None)
def test_a_plan_is_complete_and_keeps_to_the_budget(
    lengths: list[int], ranks: int, slack: int, quadratic: float, packing: bool, equal: bool, multiple: int
) -> None:
    if len(lengths) < ranks:
        return
    budget = max(lengths) + slack
    plan = plan_micro_batches(
        np.array(lengths), num_ranks=ranks, budget=budget, quadratic=quadratic, packing=packing, equal_counts=equal, multiple=multiple
    )
    assert len(plan) == ranks
    assert sorted(position for rank in plan for bin_ in rank for position in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[position] for position in bin_) <= budget for rank in plan for bin_ in rank)
    costs = costs_of(np.array(lengths), quadratic)
    loads = [sum(costs[position] for bin_ in rank for position in bin_) for rank in plan]
    assert max(loads) - min(loads) <= costs.max() * (1 + 1e-9)
    if equal:
        assert len({len(rank) for rank in plan}) == 1
    assert all(len(rank) % multiple == 0 for rank in plan)
    if not equal and multiple == 1:
        assert all(bin_ for rank in plan for bin_ in rank)


def test_the_work_of_a_step_is_balanced_by_what_attention_costs() -> None:
    """Three long sequences among many short ones: equal tokens would be unequal work."""
    lengths, quadratic = np.array([16000] * 3 + [500] * 400), 1 / 12288
    costs = costs_of(lengths, quadratic)

    def imbalance(plan: list[list[list[int]]]) -> float:
        loads = [sum(costs[position] for bin_ in rank for position in bin_) for rank in plan]
        return max(loads) / (sum(loads) / len(loads)) - 1

    by_cost = plan_micro_batches(lengths, num_ranks=8, budget=16384, quadratic=quadratic)
    by_tokens = plan_micro_batches(lengths, num_ranks=8, budget=16384)
    assert imbalance(by_cost) < 0.02
    assert imbalance(by_tokens) > 0.2


def test_the_micro_batches_of_a_step_are_alike() -> None:
    """A pipeline waits for its slowest micro-batch."""
    lengths, quadratic = dapo_math_like(256), 1 / 12288
    costs = costs_of(lengths, quadratic)
    for rank in plan_micro_batches(lengths, num_ranks=2, budget=16384, quadratic=quadratic):
        loads = [sum(costs[position] for position in bin_) for bin_ in rank]
        assert max(loads) < 1.05 * min(loads)
