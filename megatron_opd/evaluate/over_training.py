"""Evaluations that a training made on its way, out of the rows of its steps: eval/NAME/accuracy and the like, or eval/NAME/error."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from megatron_opd.evaluate.wording import interval, shown

_FIELD = re.compile(r"eval/([A-Za-z0-9][A-Za-z0-9_-]*)/(\w+)")
COLUMNS = [
    "evaluation",
    "points",
    "first accuracy (95 % interval)",
    "last accuracy (95 % interval)",
    "ended by itself, first and last",
    "seconds",
]


class Point(NamedTuple):
    """An evaluation after `step`; `fields` without the name of the evaluation in front."""

    step: int
    fields: dict[str, Any]

    @property
    def accuracy(self) -> dict[str, Any] | None:
        """mean, low, high; None for an evaluation that failed or has no grader."""
        if self.fields.get("accuracy") is None:
            return None
        return {"mean": self.fields["accuracy"], "low": self.fields.get("accuracy_low"), "high": self.fields.get("accuracy_high")}

    def text(self) -> str:
        return f"{interval(self.accuracy, '.1%')} after step {self.step}" if self.accuracy else ""


def is_error(key: str) -> bool:
    """Whether a row's field says why an evaluation failed."""
    return (found := _FIELD.fullmatch(key)) is not None and found[2] == "error"


def points(rows: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """By the name of the evaluation, in the order of the rows; failed ones among them."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        of: dict[str, dict[str, Any]] = {}
        for key, value in row.items():
            if (match := _FIELD.fullmatch(key)) is not None:
                of.setdefault(match[1], {})[match[2]] = value
        for name, fields in of.items():
            found.setdefault(name, []).append(Point(row["step"], fields))
    return found


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row of COLUMNS an evaluation."""
    return [_row(name, found) for name, found in points(rows).items()]


def _row(name: str, found: list[Point]) -> list[str]:
    made = [point for point in found if "error" not in point.fields]
    failed = len(found) - len(made)
    graded = [point for point in made if point.accuracy is not None]
    stopped = [shown(point.fields.get("stopped_share"), ".1%") for point in (*made[:1], *made[-1:])]
    return [
        name,
        f"{len(made)}{f', {failed} failed' if failed else ''}",
        graded[0].text() if graded else "",
        graded[-1].text() if graded else "",
        " -> ".join(stopped),
        shown(sum(point.fields.get("seconds") or 0.0 for point in made), ".1f"),
    ]
