"""Crafted answers and their right verdicts, a table for each grader: tests/unit/graders/GRADER.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.evaluate.grade import PACKAGES, check_gold, grade
from megatron_opd.records import Prompt

FOLDER = Path(__file__).parent / "graders"
LEAST = {"math": 60, "number": 25, "exact": 25, "choice": 25, "reasoning_gym": 25}
TABLES = {name: tomllib.loads((FOLDER / f"{name}.toml").read_text())["rows"] for name in LEAST}


def prompt_of(grader: str, row: list[str]) -> Prompt:
    """The gold stands before the response; a row of reasoning_gym has the dataset before that."""
    meta: dict[str, Any] = {}
    if grader == "reasoning_gym":
        meta = {"reasoning_gym": {"dataset": row[1], "entry": {"question": "q", "answer": row[2], "metadata": {"source_dataset": row[1]}}}}
    return Prompt(0, "question", row[-3], meta)


@pytest.mark.parametrize("grader", LEAST)
def test_table(grader: str) -> None:
    if grader in PACKAGES:
        pytest.importorskip(PACKAGES[grader])
    rows = TABLES[grader]
    assert len(rows) >= LEAST[grader]
    wrong = []
    for row in rows:
        prompt = prompt_of(grader, row)
        check_gold(grader, prompt)
        verdict = grade(grader, prompt, row[-2])
        assert verdict.reason
        assert (verdict.score == 1.0) == (verdict.outcome == "right")
        assert (verdict.outcome in ("right", "wrong", "partial")) or verdict.answer is None
        if verdict.outcome != row[-1]:
            wrong.append(f"{row[0]}: {row[-3]!r}, {row[-2]!r} must be {row[-1]}, not {verdict.outcome} ({verdict.reason})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("grader", LEAST)
def test_a_long_response_before_the_answer_changes_nothing(grader: str) -> None:
    """300,000 characters of working, as a model that thinks aloud writes."""
    if grader in PACKAGES:
        pytest.importorskip(PACKAGES[grader])
    working = "Let us see. First x + 1 = 2, which is no answer yet.\n" * 6000
    for row in TABLES[grader]:
        if row[-1] == "right" and ("####" in row[-2] or "boxed" in row[-2] or "nswer:" in row[-2]):
            assert grade(grader, prompt_of(grader, row), working + row[-2]).outcome == "right", row
            break
    else:
        raise AssertionError("no row to put behind the working")
