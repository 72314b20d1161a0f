"""Intervals of ratios over prompts, and the paired difference of two evaluations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_opd.evaluate.intervals import difference_interval, proportion_interval, ratio_interval, wilson_interval


def totals(scores_by_prompt):
    return {number: (float(sum(scores)), float(len(scores))) for number, scores in enumerate(scores_by_prompt)}


def test_wilson_interval():
    low, high = wilson_interval(81, 263)  # a worked example: Newcombe 1998, Statistics in Medicine 17, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson_interval(0, 20)
    assert low == 0.0
    assert round(high, 4) == 0.1611
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="successes of"):
            wilson_interval(*bad)


def test_single_samples_give_the_usual_interval():
    scores = np.random.default_rng(0).normal(size=41)
    half = 1.96 * scores.std(ddof=1) / math.sqrt(41)
    assert ratio_interval(totals([[score] for score in scores])) == pytest.approx(
        (scores.mean(), scores.mean() - half, scores.mean() + half)
    )


def test_copies_of_a_sample_count_once():
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert ratio_interval(totals([[score] * 8 for score in scores])) == pytest.approx(ratio_interval(totals([[score] for score in scores])))


def test_covers_the_truth_where_prompts_differ():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        chances = rng.beta(0.5, 0.5, size=60)
        interval = ratio_interval(totals([list(map(float, rng.random(rng.integers(1, 9)) < chance)) for chance in chances]))
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_edges():
    assert ratio_interval(totals([[1.0, 1.0], [], [1.0]])) == (1.0, 1.0, 1.0)
    assert ratio_interval(totals([[0.0, 1.0]])) == (0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no scores"):
        ratio_interval(totals([[], []]))


def test_scores_that_are_all_equal_still_have_an_interval():
    assert proportion_interval(totals([[1.0]] * 20)) == pytest.approx((1.0, *wilson_interval(20, 20)))
    assert proportion_interval(totals([[0.0]] * 20)) == pytest.approx((0.0, *wilson_interval(0, 20)))


def test_the_paired_difference_covers_the_truth_and_is_narrower_than_unpaired():
    """Prompts of very different difficulty, and a second model that is right in 8 of 100 more cases, with ratios of tokens."""
    rng = np.random.default_rng(2)
    covered, narrower = 0, 0
    for _ in range(400):
        skill_G, tokens_G = rng.random(80), rng.integers(5, 50, 80)
        earlier = {g: (float(rng.binomial(t, 0.9 * p)), float(t)) for g, (p, t) in enumerate(zip(skill_G, tokens_G, strict=True))}
        later = {g: (float(rng.binomial(t, 0.9 * p + 0.08)), float(t)) for g, (p, t) in enumerate(zip(skill_G, tokens_G, strict=True))}
        found = difference_interval(later, earlier)
        covered += found.low <= 0.08 <= found.high
        apart = [ratio_interval(both) for both in (later, earlier)]
        narrower += found.high - found.low < math.hypot(*(each.high - each.low for each in apart))
    assert 0.90 <= covered / 400 <= 0.98
    assert narrower == 400


def test_a_difference_needs_the_same_prompts():
    with pytest.raises(ValueError, match="1 prompts are in one of the two alone"):
        difference_interval({0: (1.0, 1.0)}, {0: (1.0, 1.0), 1: (0.0, 1.0)})
