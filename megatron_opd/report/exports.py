"""Numbers for other programs: report.json, training.csv, prompts.csv. docs/report.md has their fields."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import provenance
from megatron_opd.errors import UserError
from megatron_opd.evaluate import over_training
from megatron_opd.evaluate.rows import read_rows
from megatron_opd.report.curves import kl_by_position, window
from megatron_opd.report.disagreements import Disagreement
from megatron_opd.report.grouping import different_settings
from megatron_opd.report.runs import Run
from megatron_opd.report.shared_cost import whole_cost
from megatron_opd.report.verdict import Result, best_first
from megatron_opd.safety.durable import write_file

VERSION = 1  # of report.json: raised where a field changes its meaning or goes
UNITS = {
    "accuracy": "share from 0 to 1; mean, low and high of a 95 % interval",
    "difference": "share from -1 to 1",
    "reverse_kl": "nat/token",
    "seconds": "wall time, s",
    "gpu_hours": "h",
    "energy_kwh": "kWh",
    "entropy": "nat",
    "nll": "nat/token",
    "response_length": "tokens",
}
TRAINING_COLUMNS = (
    "run", "group", "stage", "step", "round", "epoch", "loss", "nll", "entropy", "reverse_kl", "abs_advantage", "clipped_share", "ratio",
    "effective_sample_share", "off_share", "topk_overlap", "response_length", "response_length_max", "grad_norm", "learning_rate", "skipped",
    "response_tokens", "batch_tokens", "micro_batches", "seconds", "data_seconds", "tokens_per_second", "model_tflops_per_rank",
    "model_flops_utilisation", "memory_gib", "gpu_memory_gib", "energy_joules", "power_watts",
)  # fmt: skip
PROMPT_COLUMNS = ("run", "group", "evaluation", "model", "prompt", "id", "sample", "outcome", "score", "finish", "tokens", "seconds")


def report_record(
    groups: Mapping[str, Sequence[Run]], verdicts: Mapping[str, Sequence[Result]], disagreements: Sequence[Disagreement]
) -> dict[str, Any]:
    """What the page shows."""
    runs = [run for members in groups.values() for run in members]
    return {
        "version": VERSION,
        "provenance": provenance(),
        "units": UNITS,
        "groups": {name: [run.label for run in members] for name, members in groups.items()},
        "verdicts": {name: [_result(result) for result in results] for name, results in verdicts.items()},
        "best": {name: order[0].name for name, results in verdicts.items() if (order := best_first(results))},
        "settings_that_differ": {
            name: dict(zip([run.label for run in runs], values, strict=True))
            for name, values in different_settings(runs, seeds=True).items()
        },
        "disagreements": [asdict(entry) for entry in disagreements],
        "runs": {run.label: _run(run) for run in runs},
    }


def _result(result: Result) -> dict[str, Any]:
    kept = (
        "name", "is_group", "accuracy", "seeds", "deviation", "baseline", "difference", "difference_seeds", "seeds_how",
        "num_prompts", "reverse_kl", "cost", "whole_cost", "notes",
    )  # fmt: skip
    found = {key: getattr(result, key) for key in kept}
    return found | {"members": [{"run": member.run.label, "model": member.model} for member in result.members]}


def _run(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "group": run.group,
        "student": run.student,
        "cost": run.cost(),
        "whole_cost": whole_cost(run),
        "shared": run.shared,
        "unknown": run.unknown,
        "settings": run.settings,
        **run.facts,
        "evaluations": run.evaluations,
        "stages": run.stages,
        "training": {stage: _training(rows) for stage, rows in run.training.items()},
    }


def _training(rows: list[dict[str, Any]]) -> dict[str, Any]:
    positions, tokens = kl_by_position(window(rows, end=True))
    return {
        "steps": rows[-1]["step"],
        "skipped": sum(bool(row.get("skipped")) for row in rows),
        "reverse_kl_by_position": [None if value != value else float(value) for value in positions],
        "tokens_by_position": None if tokens is None else [int(value) for value in tokens],
        "evaluations": {
            name: [{"step": point.step, **point.fields} for point in points] for name, points in over_training.points(rows).items()
        },
    }


def write_training(path: Path, runs: Sequence[Run]) -> None:
    """A row a run, stage and step; a column that a row lacks, or that is null there, is empty."""
    _write(path, TRAINING_COLUMNS, ({"run": run.label, "group": run.group, "stage": stage, **row} for run, stage, row in _steps(runs)))


def _steps(runs: Sequence[Run]) -> Iterator[tuple[Run, str, dict[str, Any]]]:
    for run in runs:
        for stage, rows in run.training.items():
            for row in rows:
                yield run, stage, row


def write_prompts(path: Path, runs: Sequence[Run]) -> None:
    """A row a graded sample, of every model that has rows; texts stay in the rows' own files."""
    _write(path, PROMPT_COLUMNS, _samples(runs))


def _samples(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        for record in run.evaluations:
            names = {"run": run.label, "group": run.group, "evaluation": record["evaluation"], "model": record["name"]}
            try:
                if run.rows(record["evaluation"], record["name"]).exists():
                    for row in read_rows(run.rows(record["evaluation"], record["name"])):
                        yield names | {key: getattr(row, key) for key in PROMPT_COLUMNS if key not in names}
            except (OSError, UserError) as error:
                print(f"report: prompts.csv lacks rows: {error}")


def _cell(value: Any) -> Any:
    """With an apostrophe before a text that a spreadsheet would take for a formula: names and ids are others'."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _write(path: Path, columns: Sequence[str], rows: Iterator[dict[str, Any]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items() if value is not None})
    write_file(path, file.getvalue())
