"""Means over seeds and prompts, and differences between groups of runs, each with what its interval covers.

Two things make an accuracy uncertain. The prompts are a sample of those that could have been asked: an interval over prompts says how far that
matters for these trained models. A training with another seed would have ended elsewhere: an interval over seeds says how far that matters on
these prompts. Two or three seeds give wide ones, as they can hardly tell their own spread; that of other groups may be another.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from megatron_opd.evaluate.intervals import Interval, Totals, difference_interval, proportion_interval

PromptKey = tuple[str, int]  # of which set of prompts, and its index there
PromptMeans = Mapping[PromptKey, float]  # of a run that was asked one set of prompts: mean score of the samples of each


def over_seeds(runs: Sequence[PromptMeans]) -> Totals:
    """The mean of each prompt over the runs that were asked its set, if all of these have it, as totals for an interval over prompts."""
    asked = defaultdict(list)
    for run in runs:
        for name in {name for name, _ in run}:
            asked[name].append(run)
    having = Counter(prompt for run in runs for prompt in run)
    return {
        prompt: (math.fsum(run[prompt] for run in asked[prompt[0]]) / number, 1.0)
        for prompt, number in sorted(having.items())
        if number == len(asked[prompt[0]])
    }


def mean_interval(runs: Sequence[PromptMeans]) -> Interval:
    """Mean over prompts of the mean over runs; the interval covers the choice of the prompts, for these runs."""
    return proportion_interval(over_seeds(runs))


def paired_difference(later: Sequence[PromptMeans], earlier: Sequence[PromptMeans]) -> tuple[Interval, int]:
    """Mean of `later` minus that of `earlier`, paired by prompt, and the number of prompts that both have. Raises ValueError without any."""
    totals = over_seeds(later), over_seeds(earlier)
    both = totals[0].keys() & totals[1].keys()
    first, second = ({prompt: found[prompt] for prompt in both} for found in totals)
    return difference_interval(first, second), len(both)


def seed_interval(later: Mapping[Any, float], earlier: Mapping[Any, float]) -> tuple[Interval, str] | None:
    """The difference between means over seeds, and how its interval was made; figures by seed. None where a group has one seed alone.

    Where both have the same seeds, Student's of the differences by seed; otherwise Welch's (1947, Biometrika 34), which lets the
    groups spread differently.
    """
    sides = [np.array(list(values.values())) for values in (later, earlier)]
    difference = float(sides[0].mean() - sides[1].mean())
    if min(map(len, sides)) < 2:
        return None
    if later.keys() == earlier.keys():
        half, how = student_half([later[seed] - earlier[seed] for seed in later]), "paired by seed"
    else:
        errors = [float(values.var(ddof=1)) / len(values) for values in sides]
        freedom = sum(error**2 / (len(values) - 1) for error, values in zip(errors, sides, strict=True))
        half = student_t(sum(errors) ** 2 / freedom) * math.sqrt(sum(errors)) if freedom else 0.0
        how = "Welch"
    return Interval(difference, difference - half, difference + half), how


def student_half(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval of the mean of two or more values."""
    return student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


@cache
def student_t(freedom: float, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t: P(|T| <= t) = level.

    With T = sqrt(freedom) tan(theta) the density of theta is proportional to cos(theta)^(freedom - 1), which is summed numerically.
    """
    theta = np.linspace(0.0, math.pi / 2, 5_001)
    weights = np.cos(theta) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((weights[1:] + weights[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level * cumulative[-1], cumulative, theta)))
