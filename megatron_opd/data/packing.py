"""Sequences to data-parallel ranks and micro-batches: full bins, equal work.

The cost of a sequence of n tokens is n + quadratic * n^2: the matrices take the same time for every token, causal attention takes
time in proportion to the length for each.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def costs_of(lengths: np.ndarray, quadratic: float) -> np.ndarray:
    """Cost of each sequence in tokens' worth of matrix work, float64."""
    n = np.asarray(lengths, np.float64)
    return n + quadratic * n * n


def plan_micro_batches(
    lengths: np.ndarray,
    *,
    num_ranks: int,
    budget: int,
    quadratic: float = 0.0,
    packing: bool = True,
    equal_counts: bool = False,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Positions of the sequences for each rank and each of its micro-batches, none over `budget` tokens.

    Ranks get equal cost, and so do the micro-batches of a rank. With `equal_counts` every rank has the same number of
    micro-batches, and each number is a multiple of `multiple`; a rank that has too few sequences for that gets empty ones. Raises
    ValueError if there are fewer sequences than ranks, or one alone is over the budget.
    """
    lengths = np.asarray(lengths)
    costs = costs_of(lengths, quadratic)
    ranks = [np.array(mine, np.int64) for mine in split_over_ranks(costs, num_ranks)]
    bins = [pack(lengths[mine], budget, packing=packing) for mine in ranks]
    wanted = max(map(len, bins)) if equal_counts else 0
    plan = []
    for mine, packed in zip(ranks, bins, strict=True):
        count = -(-max(len(packed), wanted) // multiple) * multiple
        spread = _spread(lengths[mine], costs[mine], count, budget) if packing else None
        chosen = spread if spread is not None else _divide(packed, count)
        plan.append([[int(mine[position]) for position in bin_] for bin_ in chosen])
    return plan


def split_over_ranks(costs: Sequence[float] | np.ndarray, num_ranks: int) -> list[list[int]]:
    """Positions of the sequences for each rank: the costliest first, to the rank with the least so far.

    Raises ValueError if there are fewer sequences than ranks.
    """
    if len(costs) < num_ranks:
        raise ValueError(f"{len(costs)} sequences for {num_ranks} data-parallel ranks")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for position in _falling(costs):
        load, count, rank = loads[0]
        ranks[rank].append(position)
        heapq.heapreplace(loads, (load + float(costs[position]), count + 1, rank))
    return ranks


def pack(lengths: Sequence[int] | np.ndarray, budget: int, *, packing: bool = True) -> list[list[int]]:
    """Positions of the sequences in bins of at most `budget` tokens; one a bin without `packing`.

    Best fit by falling length: each goes to the fullest bin that has room. Raises ValueError if one alone is over the budget.
    """
    order = _falling(lengths)
    if order and lengths[order[0]] > budget:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens does not fit {budget}")
    if not packing:
        return [[position] for position in order]
    budget = min(budget, int(np.sum(lengths)))  # more room than for all of them changes nothing, and there is a list for each room
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]  # bins that have exactly so much room
    rooms = 0  # bit r is set where by_room[r] holds a bin: the fullest bin with room for n is the lowest bit from n on
    for position in order:
        length = int(lengths[position])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[number].append(position)
        else:
            room, number = budget, len(bins)
            bins.append([position])
        room -= length
        by_room[room].append(number)
        rooms |= 1 << room
    return bins


def _falling(values: Sequence[float] | np.ndarray) -> list[int]:
    """Positions by falling value, equal ones in their order."""
    return np.argsort(-np.asarray(values), kind="stable").tolist()


def _spread(lengths: np.ndarray, costs: np.ndarray, count: int, budget: int) -> list[list[int]] | None:
    """Bins of equal cost: the costliest sequence first, to the bin with the least cost that has room. None where that fails."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, rooms = [0.0] * count, [budget] * count
    for position in _falling(costs):
        length = int(lengths[position])
        fitting = [number for number in range(count) if rooms[number] >= length]
        if not fitting:
            return None
        number = min(fitting, key=loads.__getitem__)
        bins[number].append(position)
        loads[number] += float(costs[position])
        rooms[number] -= length
    return bins


def _divide(bins: list[list[int]], count: int) -> list[list[int]]:
    """The same sequences in `count` bins: the bin of most sequences is halved until there are enough; then empty ones."""
    bins = [list(bin_) for bin_ in bins]
    while len(bins) < count:
        largest = max(bins, key=len)
        half = len(largest) // 2
        bins.append(largest[:half])  # nothing, if no bin has more than one
        del largest[:half]
    return bins
