"""Sequences to data-parallel ranks and micro-batches, by length."""

from __future__ import annotations

from collections.abc import Sequence


def split_over_ranks(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions of the sequences for each rank, token counts balanced: longest first, to the rank with the fewest tokens.

    Raises ValueError if there are fewer sequences than ranks.
    """
    if len(lengths) < num_ranks:
        raise ValueError(f"{len(lengths)} sequences for {num_ranks} data-parallel ranks")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], len(ranks[r]), r))
        ranks[rank].append(position)
        loads[rank] += lengths[position]
    return ranks


def pack(lengths: Sequence[int], budget: int, *, packing: bool = True) -> list[list[int]]:
    """Positions of the sequences in bins of at most `budget` tokens, first fit by falling length; one a bin without `packing`.

    Raises ValueError if a sequence alone is over the budget.
    """
    order = sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
    if order and lengths[order[0]] > budget:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens does not fit {budget}")
    bins: list[list[int]] = []
    free: list[int] = []
    for position in order:
        fitting = next((number for number, room in enumerate(free) if room >= lengths[position]), None) if packing else None
        if fitting is None:
            bins.append([position])
            free.append(budget - lengths[position])
        else:
            bins[fitting].append(position)
            free[fitting] -= lengths[position]
    return bins
