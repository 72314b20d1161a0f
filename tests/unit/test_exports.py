"""Tables of the report: what others named is no formula in a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from unit.graded_rows import make_row, write_rows

from megatron_opd.report.exports import write_prompts


class Graded:
    """Of a run what a table of samples takes."""

    label, group = "=run", "+group"
    evaluations = ({"evaluation": "@sums", "name": "opd"},)

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(self, evaluation: str, model: str) -> Path:
        return self.folder / f"{model}.prompts.jsonl"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "opd.prompts.jsonl", [make_row(id=name), make_row(1, id="a=1")])
    write_prompts(tmp_path / "prompts.csv", [Graded(tmp_path)])  # type: ignore[list-item]
    with (tmp_path / "prompts.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["id"], first["run"], first["group"], first["evaluation"]) == (f"'{name}", "'=run", "'+group", "'@sums")
    assert (second["id"], second["prompt"], second["score"]) == ("a=1", "1", "1.0")
