"""Figures between a best and a worst case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; sums add both ends, as all may go well or all badly."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)

    def text(self, scale: float = 1.0) -> str:
        """'3 to 12', in units of `scale`, with two significant digits; one figure where both are the same."""
        low, high = (_digits(value / scale) for value in (self.low, self.high))
        return low if low == high else f"{low} to {high}"


NOTHING = Range(0.0, 0.0)


def exactly(value: float) -> Range:
    return Range(value, value)


def between(model: Callable[[bool], float]) -> Range:
    """The model's figure in its best and its worst case; `model` is given whether it is the worst."""
    return Range(model(False), model(True))


def _digits(value: float) -> str:
    """Two significant digits, no exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.1e}")
    return (
        f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.1f}" if rounded >= 1 else f"{rounded:.2g}" if rounded >= 0.01 else "under 0.01"
    )
