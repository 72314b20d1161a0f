"""The tables at the end of a run: its models, and what every stage cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import read_jsonl, read_stages
from megatron_opd.errors import UserError
from megatron_opd.evaluate.chosen import list_evaluations
from megatron_opd.evaluate.side_by_side import aligned, cells, difference_lines, sample_cells
from megatron_opd.recipe.config import Recipe
from megatron_opd.report.rounds_table import ROUND_COLUMNS, round_rows
from megatron_opd.report.tables import evaluation_cells, stage_cells
from megatron_opd.safety.untrusted import read_object

_MODELS = [
    "evaluation",
    "model",
    "accuracy (95 % interval)",
    "reverse KL to the teacher, nat/token",
    "tokens a response",
    "ended by itself",
]
_STAGES = ["stage", "seconds", "tokens", "tokens/s", "GPU hours"]


def closing(recipe: Recipe) -> str:
    """The tables, with the paired differences between them; of several rounds one more. Evaluations that are not there are left out."""
    found = _evaluations(recipe)
    paragraphs = []
    if len({record["evaluation"] for record in found}) > 1:
        paragraphs.append(aligned(cells(found, recipe.eval)))
    if found:
        paragraphs.append(aligned([_MODELS, *(evaluation_cells(evaluation) for evaluation in found)]))
    if several := sample_cells(found):
        paragraphs.append(aligned(several))
    paragraphs += difference_lines(found)
    stages = read_stages(Path(recipe.run_dir) / "stages.jsonl")
    if rounds := round_rows(stages, read_jsonl(Path(recipe.train.output) / "metrics.jsonl")):
        paragraphs.append(aligned([ROUND_COLUMNS, *rounds]))
        stages = [row for row in stages if "round" not in row]
    paragraphs.append(aligned([_STAGES, *map(stage_cells, stages)]))
    return "\n\n".join(paragraphs)


def _evaluations(recipe: Recipe) -> list[dict[str, Any]]:
    found = []
    for config in list_evaluations(recipe):
        try:
            found.append(read_object(config.record))
        except (OSError, UserError) as error:
            print(f"WARNING: the evaluation {config.title!r} is left out: {error}")
    return found
