"""Means with 95 % intervals in which the prompts, not samples or tokens, are the independent units.

Everything is a ratio of totals over G prompts: score over samples, or nats over tokens. Its variance is that of the ratio
estimator of cluster sampling (Cochran 1977, Sampling Techniques, 9A).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Z95 = 1.96
# prompt (its index, or whatever tells prompts apart and has an order) -> (total of the figure, number of units it is a mean over)
Totals = Mapping[Any, tuple[float, float]]


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    def record(self) -> dict[str, float | None]:
        """For JSON, which has no infinities: None for the bounds of one prompt alone."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22). For independent trials."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def ratio_interval(totals: Totals, z: float = Z95) -> Interval:
    """Sum of totals over sum of units, with a normal interval. One prompt alone gives an infinite interval.

    Totals without any spread give a width of 0. Raises ValueError where there are no units.
    """
    mean, influence_G = _influence(totals, sorted(totals))
    half = z * _standard_error(influence_G)
    return Interval(mean, mean - half, mean + half)


def proportion_interval(totals: Totals, z: float = Z95) -> Interval:
    """`ratio_interval` of scores in [0, 1]; where every score is 0, or every one 1, Wilson's interval of the prompts."""
    mean, low, high = ratio_interval(totals, z)
    if mean in (0.0, 1.0):
        low, high = wilson_interval(mean * len(totals), len(totals), z)
    return Interval(mean, max(0.0, low), min(1.0, high))


def difference_interval(later: Totals, earlier: Totals, z: float = Z95) -> Interval:
    """Ratio of `later` minus ratio of `earlier` over the same prompts, paired by prompt: what both find hard cancels.

    Raises ValueError if the prompts are not the same.
    """
    if later.keys() != earlier.keys():
        raise ValueError(f"{len(later.keys() ^ earlier.keys())} prompts are in one of the two alone")
    prompts = sorted(later)
    (mean, influence_G), (mean_before, influence_before_G) = _influence(later, prompts), _influence(earlier, prompts)
    half = z * _standard_error(influence_G - influence_before_G)
    difference = mean - mean_before
    return Interval(difference, difference - half, difference + half)


def _influence(totals: Totals, prompts: list[Any]) -> tuple[float, np.ndarray]:
    """The ratio, and what each prompt adds to its error, float64 [G]."""
    total_G, units_G = (np.array([totals[prompt][column] for prompt in prompts], np.float64) for column in (0, 1))
    if not units_G.sum():
        raise ValueError("no scores")
    mean = math.fsum(total_G) / math.fsum(units_G)
    return mean, (total_G - mean * units_G) / units_G.sum()


def _standard_error(influence_G: np.ndarray) -> float:
    G = len(influence_G)
    return math.sqrt(G / (G - 1) * float((influence_G**2).sum())) if G > 1 else math.inf
