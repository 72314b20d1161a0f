"""Curves of several seeds as one: a running mean of each, then mean, lowest and highest of them at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Rows = list[dict[str, Any]]


class Band(NamedTuple):
    """Steps int64 [S]; mean, low and high over the seeds that have a value there, float64 [S]."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def width_of(rows: Rows) -> int:
    """Steps that a running mean is taken over: a twentieth of the run, an odd number."""
    return 2 * (len(rows) // 40) + 1


def values_of(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have one: a skipped step has none."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None and not isinstance(row[key], list | str)]
    return np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of `width` values around each; at the ends of those that are there."""
    if width <= 1 or not len(values):
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band:
    """Of (steps, values) of each seed."""
    steps = np.unique(np.concatenate([step for step, _ in curves])) if curves else np.array([], np.int64)
    table = np.full((len(curves), len(steps)), np.nan)
    for row, (step, values) in zip(table, curves, strict=True):
        row[np.searchsorted(steps, step)] = values
    there = ~np.isnan(table)
    mean = np.nansum(table, 0) / np.maximum(there.sum(0), 1)
    return Band(steps, mean, np.where(there, table, np.inf).min(0, initial=np.inf), np.where(there, table, -np.inf).max(0, initial=-np.inf))


def thin(step: np.ndarray, *values: np.ndarray, most: int = 300) -> tuple[np.ndarray, ...]:
    """Every n-th point, so that at most about `most` are drawn; the last one always."""
    every = -(-len(step) // most)
    kept = np.unique(np.append(np.arange(0, len(step), max(1, every)), len(step) - 1)) if len(step) else np.array([], np.int64)
    return tuple(array[kept] for array in (step, *values))
