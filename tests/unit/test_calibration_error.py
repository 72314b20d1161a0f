"""Expected calibration error against sums written out, and against simulated models whose calibration is known."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.graded_rows import make_samples

from megatron_opd.evaluate.calibration_error import NUM_BINS, calibration
from megatron_opd.evaluate.passk import Samples


def found(samples: Samples) -> dict:
    result = calibration(samples)
    assert result is not None
    return result


def test_sums_written_out() -> None:
    """Confidences 0.75 (right, 3 samples) and 0.25 (wrong) of one prompt, 1.0 (wrong, 4) of the other."""
    result = found(make_samples({0: ["7", "7", "7", "8"], 1: ["9"] * 4}))
    assert result["ece"]["mean"] == pytest.approx((3 * 0.25 + 1 * 0.25 + 4 * 1.0) / 8)
    assert result["overconfidence"]["mean"] == pytest.approx((3 * -0.25 + 0.25 + 4.0) / 8)
    assert [(entry["above"], entry["samples"], entry["right"]) for entry in result["bins"]] == [(0.2, 1, 0.0), (0.7, 3, 1.0), (0.9, 4, 0.0)]
    assert 0 <= result["ece"]["low"] <= result["ece"]["mean"] <= result["ece"]["high"] <= 1


def test_no_confidence_from_single_samples_and_none_without_answers() -> None:
    assert calibration({}) is None
    assert calibration(make_samples({0: ["7"], 1: ["8"]})) is None
    result = found(make_samples({0: [None, None], 1: ["7"]}))
    assert (result["ece"], result["overconfidence"], result["without_answer"], result["prompts"]) == (None, None, 2, 1)
    one = found(make_samples({0: ["7", "8"]}))
    assert one["ece"] == {"mean": 0.0, "low": None, "high": None}  # each of two answers has half of the samples, and half are right
    assert one["overconfidence"]["low"] is None


def test_samples_without_an_answer_lower_the_confidence_of_others() -> None:
    result = found(make_samples({0: ["7", None, None, None], 1: ["7", None, None, None]}))
    assert result["bins"] == [{"above": 0.2, "to": 0.3, "samples": 2, "confidence": 0.25, "right": 1.0}]
    assert result["without_answer"] == 6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=13), min_size=1, max_size=6))
def test_bins_hold_every_answer_once_and_nothing_is_nan(answers: list[list[str | None]]) -> None:
    result = calibration(make_samples(dict(enumerate(answers))))
    if result is None:
        assert all(len(given) == 1 for given in answers)
        return
    json.dumps(result, allow_nan=False)
    assert sum(entry["samples"] for entry in result["bins"]) == result["samples"] - result["without_answer"]
    for entry in result["bins"]:
        assert entry["above"] - 1e-12 < entry["confidence"] <= entry["to"] + 1e-12
    for each in answers:
        for answer in set(each) - {None}:
            share = Fraction(each.count(answer), len(each))
            b = next(b for b in range(NUM_BINS) if share <= Fraction(b + 1, NUM_BINS))
            assert len(each) == 1 or any(entry["above"] == b / NUM_BINS for entry in result["bins"])


@pytest.mark.parametrize(("right", "wanted"), [("share", 0.0), ("never", 1.0)])
def test_simulated_models(right: str, wanted: float) -> None:
    """Of a calibrated model an answer that has share s of the samples is right with chance s; of a sure and wrong one none is."""
    rng = np.random.default_rng(3)
    answers = {}
    for prompt in range(1500):
        count = int(rng.integers(1, 20)) if right == "share" else 20
        first = "7" if right == "share" and rng.random() < count / 20 else "8"
        answers[prompt] = [first] * count + ["8" if first == "7" else "7"] * (20 - count)
    result = found(make_samples(answers))
    assert result["overconfidence"]["mean"] == pytest.approx(wanted, abs=0.02)
    assert result["ece"]["mean"] == pytest.approx(wanted, abs=0.05)
    assert result["ece"]["low"] <= result["ece"]["mean"] <= result["ece"]["high"] + 1e-9


def test_the_interval_is_the_same_each_time_and_widens_with_fewer_prompts() -> None:
    rng = np.random.default_rng(1)
    answers = {prompt: [str(7 + int(rng.random() < 0.4)) for _ in range(8)] for prompt in range(200)}
    many, few = found(make_samples(answers)), found(make_samples({prompt: answers[prompt] for prompt in range(10)}))
    assert many == found(make_samples(answers))
    assert many["ece"]["high"] - many["ece"]["low"] < few["ece"]["high"] - few["ece"]["low"]
