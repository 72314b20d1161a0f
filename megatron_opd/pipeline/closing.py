"""The tables at the end of a run: its models, and what every stage cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.config import Recipe, require
from megatron_opd.cost import read_jsonl, read_stages
from megatron_opd.errors import UserError
from megatron_opd.evaluate.report import evaluation_cells, stage_cells
from megatron_opd.evaluate.rounds_table import ROUND_COLUMNS, round_rows
from megatron_opd.evaluate.run import describe_difference
from megatron_opd.pipeline.stages import evaluation_of
from megatron_opd.untrusted import read_object

_MODELS = ["model", "accuracy (95 % interval)", "reverse KL to the teacher, nat/token", "tokens a response", "ended by itself"]
_STAGES = ["stage", "seconds", "tokens", "tokens/s", "GPU hours"]


def closing(recipe: Recipe) -> str:
    """The tables, with the paired differences between them; of several rounds one more. Evaluations that are not there are left out."""
    found = _evaluations(recipe)
    paragraphs = []
    if found:
        paragraphs.append(_table([_MODELS, *(evaluation_cells(evaluation) for evaluation in found)]))
    paragraphs += [describe_difference(evaluation) for evaluation in found if "against" in evaluation]
    stages = read_stages(Path(recipe.run_dir) / "stages.jsonl")
    if rounds := round_rows(stages, read_jsonl(Path(recipe.train.output) / "metrics.jsonl")):
        paragraphs.append(_table([ROUND_COLUMNS, *rounds]))
        stages = [row for row in stages if "round" not in row]
    paragraphs.append(_table([_STAGES, *map(stage_cells, stages)]))
    return "\n\n".join(paragraphs)


def _evaluations(recipe: Recipe) -> list[dict[str, Any]]:
    if recipe.eval is None:
        return []
    found = []
    for model in recipe.eval.models:
        config = require(evaluation_of(recipe, model).eval, "eval")
        try:
            found.append(read_object(Path(config.output) / f"{config.name}.json"))
        except (OSError, UserError) as error:
            print(f"WARNING: the evaluation {config.name!r} is left out: {error}")
    return found


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
