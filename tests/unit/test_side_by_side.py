"""Tables of several models: what was not made alike is marked, and differences that no longer hold are not shown."""

from __future__ import annotations

from typing import Any

import pytest
from unit.graded_rows import make_samples

from megatron_opd.evaluate.calibration_error import calibration
from megatron_opd.evaluate.passk import sample_figures
from megatron_opd.evaluate.side_by_side import cells, sample_cells, text, unlike

FIGURE = {"mean": 0.5, "low": 0.4, "high": 0.6}
MADE = {
    "prompts_sha256": "a" * 64, "sampling": {"temperature": 1.0, "samples_per_prompt": 1}, "encoding": {}, "grader": "exact",
    "grading_seconds": 5.0, "grading_version": 2, "answers_sha256": "b" * 64, "accuracy": FIGURE,
}  # fmt: skip


def record(model: str, name: str = "maths", **changes: Any) -> dict[str, Any]:
    return {"evaluation": name, "name": model, **MADE, **changes}


def test_what_was_made_alike_has_no_mark() -> None:
    found = [record(model) for model in ("teacher", "sft", "opd")]
    assert unlike(found) == {}
    assert cells(found)[1:] == [[model, "50.0% (40.0% to 60.0%)"] for model in ("teacher", "sft", "opd")]
    assert "*" not in text(found)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompts_sha256": "c" * 64}, "prompts"),
        ({"answers_sha256": "c" * 64}, "answers or tests"),
        ({"answers_sha256": None, "grading_version": None}, "answers or tests, version of the graders (2 and none)"),
        ({"grader": "number"}, "grader (exact and number)"),
        ({"grading_seconds": 1.0}, "grading_seconds (5.0 and 1.0)"),
        ({"encoding": {"system": "Hush"}}, "encoding of prompts (system none and Hush)"),
        ({"sampling": {"temperature": 0.6, "samples_per_prompt": 1}}, "sampling (temperature 1.0 and 0.6)"),
        ({"limits": {"seconds": 3.0}}, "limits of programs (none and some)"),
    ],
)
def test_the_one_that_differs_from_most_is_marked(change: dict[str, Any], what: str) -> None:
    found = [record("teacher", **change), record("sft"), record("opd"), record("teacher", "code", grader="code")]
    assert list(unlike(found)) == [("maths", "teacher")]
    assert [row[1].endswith(" *") for row in cells(found)[1:]] == [True, False, False]
    assert text(found).splitlines()[-1] == f"* maths teacher: not as sft: other {what}"


def test_programs_have_no_limit_of_answers() -> None:
    assert unlike([record("sft", grader="code", grading_seconds=5.0), record("opd", grader="code", grading_seconds=1.0)]) == {}


def test_a_difference_holds_while_its_baseline_is_graded_as_it_was() -> None:
    against = {"name": "sft", "num_prompts": 4, "accuracy": FIGURE, "reverse_kl": FIGURE}
    opd = record("opd", against=against)
    assert "maths opd against sft, paired over 4 prompts:  accuracy +50.0 points [+40.0, +60.0]" in text([record("sft"), opd])
    assert "accuracy +50.0 points" in text([opd]), "a baseline whose figures are not there says nothing against it"
    shown = text([record("sft", answers_sha256="c" * 64), opd])
    assert "points" not in shown
    assert "reverse KL +0.5000 [+0.4000, +0.6000] nat/token" in shown
    assert "accuracy is not compared: sft was graded since with other answers or tests; grade this again: " in shown
    assert "megatron-opd eval RECIPE maths --of opd" in shown
    assert opd["against"] == against


def test_what_several_samples_are_worth_has_a_table() -> None:
    samples = make_samples({0: ["7", "8", "8", "8"], 1: ["7"] * 4, 2: ["8", "9"]})
    several = record("opd", **sample_figures(samples), calibration=calibration(samples))
    code = record("opd", "code", **sample_figures(samples, votes=False), calibration=None)
    one = record("sft", **sample_figures(make_samples({0: ["7"], 1: ["8"]})), calibration=None)
    head, maths, program = sample_cells([several, one, code])
    assert head == ["evaluation", "model", "pass@k", "majority@n", "calibration error"]
    assert maths[:2] == ["maths", "opd"]
    assert maths[2] == "pass@4 100.0% (34.2% to 100.0%), of 2 prompts"
    assert maths[3].startswith("majority@2 33.3% (")
    assert maths[4].startswith("0.")
    assert program == ["code", "opd", maths[2], "", ""]
    assert "\n\nevaluation  model  pass@k" in text([several])
    assert sample_cells([one]) == []
    assert sample_cells([record("opd") | {"pass@k": damaged} for damaged in (None, [1], {"2": 1}, {"2": {"mean": "high"}})]) == []
