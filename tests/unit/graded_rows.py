"""Rows of graded samples for the unit tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_opd.evaluate.rows import Row


def make_row(prompt: int = 0, sample: int = 0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "prompt": prompt, "id": None, "sample": sample, "outcome": "right", "score": 1.0, "answer": "7", "gold": "7", "reason": "it is 7",
        "seconds": 0.1, "detail": {}, "finish": "stop", "tokens": 5, "key": "0" * 64, "response": "7",
    }  # fmt: skip
    return Row(**(fields | changes))


def make_samples(answers: Mapping[int, Sequence[str | None]], *, gold: str = "7") -> dict[int, list[Row]]:
    """Rows of prompts from their samples' answers; None is no answer."""
    return {prompt: [graded(prompt, sample, answer, gold) for sample, answer in enumerate(given)] for prompt, given in answers.items()}


def graded(prompt: int, sample: int, answer: str | None, gold: str) -> Row:
    outcome = "no_answer" if answer is None else "right" if answer == gold else "wrong"
    return make_row(prompt, sample, outcome=outcome, score=float(answer == gold), answer=answer, gold=gold)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
