"""Means over seeds with 95 % intervals, and paired differences.

A seed is a replicate of everything: initial student, the teacher's answers, the order of SFT, prompts, rollouts, the order of training, and
the prompts of the evaluation. Its figure is one draw from all of that, so Student's interval over seeds covers seeds and prompts. With one
seed alone the interval is that of its prompts, and covers nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_opd.evaluate.intervals import Interval, Totals, difference_interval, wilson_interval
from megatron_opd.report.estimates import student_half


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. prompts: half the width that the prompts alone would give it, the students being what they are."""

    mean: float
    low: float
    high: float
    prompts: float
    seeds: int
    covers: Literal["seeds and prompts", "prompts"]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def over_seeds(intervals: Sequence[Interval], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """From a figure of each seed with the interval of its prompts; bounds beyond `least` and `most`, where there is nothing, are moved there.

    Student's interval over the seeds, or that of the prompts where it is the wider: seeds that happen to agree say no more than their
    prompts can. Each side of the prompts' interval is made of that side's in the seeds (Zou and Donner 2008, Statistics in Medicine 27).
    """
    n = len(intervals)
    mean = math.fsum(interval.mean for interval in intervals) / n
    below = math.hypot(*(interval.mean - interval.low for interval in intervals)) / n
    above = math.hypot(*(interval.high - interval.mean for interval in intervals)) / n
    half = student_half([interval.mean for interval in intervals]) if n > 1 else 0.0
    low, high = max(least, mean - max(half, below)), min(most, mean + max(half, above))
    covers = "seeds and prompts" if n > 1 else "prompts"
    return Estimate(mean, min(low, mean), max(high, mean), (below + above) / 2, n, covers)


def paired(later: Totals, earlier: Totals) -> Interval:
    """The difference of two accuracies with the interval of the prompts, paired by prompt.

    Where no prompt differs from the rest, which gives a width of 0, the share of prompts that would is at most Wilson's bound of none of so many.
    """
    found = difference_interval(later, earlier)
    if found.low < found.high:
        return found
    half = wilson_interval(0, len(later))[1] * (1 + abs(found.mean))
    return Interval(found.mean, found.mean - half, found.mean + half)


def interval_of(figure: Mapping[str, Any]) -> Interval:
    """Of an evaluation's JSON file."""
    return Interval(figure["mean"], figure["low"], figure["high"])
