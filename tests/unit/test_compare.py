"""compare: paired differences of two models from their rows, and what can't be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.graded_rows import make_row, make_samples, write_rows

from megatron_opd.cli import main
from megatron_opd.evaluate.intervals import difference_interval


def write_evaluation(run: Path, name: str, model: str, answers: dict[int, list[str | None]], *, gold: str = "7", **record: Any) -> Path:
    rows = [row for found in make_samples(answers, gold=gold).values() for row in found]
    folder = run / "eval" / name
    path = folder / f"{model}.prompts.jsonl"
    write_rows(path, [*rows, make_row(99, outcome="excluded", score=None, answer=None, finish=None, response=None)])
    fields = {
        "prompts_sha256": "a" * 64, "grader": "math", "sampling": {"temperature": 1.0}, "grading": {"responses": len(rows)},
        "answers_sha256": "c" * 64, "encoding": {}, "grading_seconds": 5.0, "grading_version": 2,
    }  # fmt: skip
    (folder / f"{model}.json").write_text(json.dumps(fields | record))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs; the models of one (sft, opd) and the opd of the other over aime; math in the first alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_evaluation(first, "aime", "sft", {0: ["8", "8"], 1: ["7", "8"], 2: ["7", "7"]})
    write_evaluation(first, "aime", "opd", {0: ["7", "8"], 1: ["7", "7"], 2: ["8", None]})
    write_evaluation(first, "math", "opd", {0: ["7"]})
    write_evaluation(second, "aime", "opd", {0: ["7", "7"], 1: ["8", "7"], 2: ["7", "7"], 3: ["7", "7"]}, sampling={"temperature": 0.6})
    return first, second


def test_two_models_of_a_run(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = runs
    assert main(["compare", f"{first}:sft", str(first), "--json", str(tmp_path / "found.json")]) == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["evaluations"]["aime"]
    before, after = {0: (0.0, 2.0), 1: (1.0, 2.0), 2: (2.0, 2.0)}, {0: (1.0, 2.0), 1: (2.0, 2.0), 2: (0.0, 2.0)}
    assert found["difference"] == difference_interval(after, before).record()
    assert found["solved_after_alone"] == [{"prompt": 0, "id": None}]
    assert found["solved_before_alone"] == [{"prompt": 2, "id": None}]
    assert (found["prompts"], found["notes"]) == (3, [])
    assert output.splitlines()[0] == f"{first}:opd minus {first}:sft, paired by prompt; accuracy alone, no reverse KL"
    assert "+0.0 (-98.0 to +98.0)" in output
    assert f"of {first}:opd alone: math" in output


def test_models_of_two_runs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0]), str(runs[1])]) == 0
    output = capsys.readouterr().out
    assert "aime: other sampling (temperature 1.0 and 0.6)" in output
    assert "aime: 1 prompts are left out, which one of them has no response to" in output
    assert "+33.3" in output


def test_what_cannot_be_compared(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runs

    def refused(before: str, after: str) -> str:
        assert main(["compare", before, after]) == 2
        return capsys.readouterr().err

    assert "no evaluation whose samples were graded" in refused(str(first), str(first.parent))
    assert "'base' was not evaluated; there are opd, sft" in refused(f"{first}:base", str(second))
    assert "can't be compared with itself" in refused(f"{first}:opd", str(first))
    write_evaluation(second, "hmmt", "sft", {0: ["7"]})
    assert "have no evaluation in common: aime, math; hmmt" in refused(str(first), f"{second}:sft")
    write_evaluation(second, "aime", "opd", {0: ["7"]}, prompts_sha256="b" * 64)
    assert "were made with other prompts; run 'megatron-opd eval' again for both" in refused(str(first), str(second))
    write_evaluation(second, "aime", "opd", {0: ["7"]}, grader="exact")
    assert "were made with other grader (math and exact)" in refused(str(first), str(second))
    write_evaluation(second, "aime", "opd", {0: ["7"]}, answers_sha256="d" * 64)
    assert "were made with other answers or tests; run" in refused(str(first), str(second))
    write_evaluation(second, "aime", "opd", {0: ["7"]}, answers_sha256=None)
    assert "does not say its answers or tests: it is of an older version; run" in refused(str(first), str(second))
    write_evaluation(second, "aime", "opd", {0: ["8"]}, gold="8")
    assert "the answer of prompt 0 was '7' and '8'" in refused(str(first), str(second))
    write_evaluation(second, "aime", "opd", {5: ["7"]})
    assert "no prompt has a response in both" in refused(str(first), str(second))
    write_evaluation(second, "aime", "opd", {0: ["7"]}, grading={"responses": 2})
    assert "1 samples are graded, and its .json file says 2" in refused(str(first), str(second))
    (second / "eval" / "aime" / "opd.json").unlink()
    assert "the evaluation was not finished" in refused(str(first), str(second))


def test_how_they_were_asked_and_graded_is_noted(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runs
    other = {"encoding": {"system": "Hush"}, "grading_seconds": 1.0, "grading_version": 1, "limits": {"seconds": 3.0}}
    write_evaluation(second, "aime", "opd", {0: ["7"], 1: ["7"]}, **other)
    assert main(["compare", str(first), str(second)]) == 0
    output = capsys.readouterr().out
    for text in (
        "encoding of prompts (system none and Hush)", "version of the graders (2 and 1)", "grading_seconds (5.0 and 1.0)",
        "limits of programs (none and some)",
    ):  # fmt: skip
        assert f"aime: other {text}" in output


def test_what_cannot_be_compared_costs_no_other_evaluation(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    first, second = runs
    write_evaluation(second, "math", "opd", {0: ["7"]}, answers_sha256="d" * 64)
    (second / "eval" / "plain").mkdir()
    (second / "eval" / "plain" / "opd.json").write_text("{}")
    assert main(["compare", str(first), str(second), "--json", str(tmp_path / "found.json")]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].endswith("paired by prompt; accuracy alone, no reverse KL")
    assert "\naime " in output
    assert "\nmath is left out: " in output
    assert "were made with other answers or tests; run 'megatron-opd eval' again for both" in output
    assert f"of {second}:opd not graded, so not compared: plain" in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (list(found["evaluations"]), list(found["refused"])) == (["aime"], ["math"])


def test_a_model_must_be_named_where_there_are_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("teacher", "round-1"):
        write_evaluation(tmp_path / "run:1", "aime", model, {0: ["7"], 1: ["8"]})
    assert main(["compare", str(tmp_path / "run:1"), f"{tmp_path}/run:1:teacher"]) == 2
    assert "name one, as in" in capsys.readouterr().err
    assert main(["compare", f"{tmp_path}/run:1:round-1", f"{tmp_path}/run:1:teacher"]) == 0
    assert "(no interval: the same for every prompt)" in capsys.readouterr().out
