"""average@n, pass@k and majority@n against exact combinatorics, and by drawing samples."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.graded_rows import graded, make_row, make_samples

from megatron_opd.evaluate.intervals import wilson_interval
from megatron_opd.evaluate.passk import majority, pass_at_k, sample_figures


@given(st.data())
def test_pass_at_k_is_the_ratio_of_binomials(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 600))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples_and_edges() -> None:
    assert pass_at_k(1_000_000, 1, 500_000) == pytest.approx(0.5)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 2, 3) == pass_at_k(1, 1, 1) == 1.0
    for bad in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*bad)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all outcomes of n samples, each right with chance p, is 1 - (1-p)^k."""
    n, k, p = 6, 3, Fraction(2, 7)
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(pass_at_k(n, c, k)) for c in range(n + 1))
    assert float(mean) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["7", "7", "8"], 1.0),
        (["7", "8", "8"], 0.0),
        (["7", "8"], 0.5),
        (["7", "8", "9"], 1 / 3),
        (["7", None, None, None], 1.0),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_majority(answers: list[str | None], wanted: float) -> None:
    assert majority([graded(0, number, answer, "7") for number, answer in enumerate(answers)]) == pytest.approx(wanted)


def test_figures_of_samples() -> None:
    samples = make_samples({0: ["7"] * 5, 1: ["7", "8", "8", "8"], 2: ["8", None, "9", "8"]})
    figures = sample_figures(samples)
    assert list(figures["pass@k"]) == ["1", "2", "4"]  # of 5, 4 and 4 samples
    assert [figure["prompts"] for figure in figures["pass@k"].values()] == [3, 3, 3]
    assert figures["average@n"]["n"] == figures["majority@n"]["n"] == 4
    assert figures["average@n"]["mean"] == pytest.approx((1 + 1 / 4 + 0) / 3), "each prompt counts the same"
    assert [figures["pass@k"][k]["mean"] for k in ("1", "2", "4")] == pytest.approx([(1 + 1 / 4) / 3, (1 + 1 / 2) / 3, 2 / 3])
    assert figures["majority@n"]["mean"] == pytest.approx(1 / 3)
    for figure in (*figures["pass@k"].values(), figures["average@n"], figures["majority@n"]):
        assert 0 <= figure["low"] <= figure["mean"] <= figure["high"] <= 1
    assert sample_figures({}) == {}


def test_a_prompt_with_fewer_samples_takes_no_figure_from_the_others() -> None:
    figures = sample_figures(make_samples({0: ["7", "8", "8", "8"], 1: ["7", "7", "7", "7"], 2: ["8"]}))
    assert {k: (figure["prompts"], figure["mean"]) for k, figure in figures["pass@k"].items()} == {
        "1": (3, pytest.approx((1 / 4 + 1) / 3)),
        "2": (2, pytest.approx((1 / 2 + 1) / 2)),
        "4": (2, 1.0),
    }
    assert (figures["average@n"]["n"], figures["average@n"]["mean"]) == (1, pytest.approx((1 / 4 + 1 + 0) / 3))


def test_programs_have_no_vote() -> None:
    figures = sample_figures({0: [make_row(answer=None), make_row(sample=1, answer=None)]}, votes=False)
    assert figures["majority@n"] is None
    assert figures["average@n"]["mean"] == figures["pass@k"]["2"]["mean"] == 1.0


def test_a_partial_score_counts_in_the_average_alone() -> None:
    figures = sample_figures({number: [make_row(number, outcome="partial", score=0.5)] for number in range(3)})
    assert figures["average@n"]["mean"] == 0.5
    assert figures["pass@k"]["1"] == {"prompts": 3, "mean": 0.0, "low": 0.0, "high": pytest.approx(wilson_interval(0, 3)[1])}
