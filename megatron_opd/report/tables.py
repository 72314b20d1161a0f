"""The tables of a report: evaluations, differences within a run, trainings, rounds and stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_opd.evaluate import over_training
from megatron_opd.evaluate.side_by_side import cells, current, sample_cells, unlike
from megatron_opd.evaluate.wording import interval, kl_caveat, shown
from megatron_opd.recipe.evaluation import model_order
from megatron_opd.report.curves import distils, kl_by_position, window
from megatron_opd.report.rounds_table import ROUND_COLUMNS, round_rows
from megatron_opd.report.runs import Run, total_cost
from megatron_opd.report.shared_cost import unmeasured

Table = list[list[str]]  # head and rows


def tables(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """Title and cells of each table that has rows, of all runs."""
    results = [
        [
            "run",
            "evaluation",
            "model",
            "accuracy (95 % interval)",
            "reverse KL to the teacher, nat/token (95 % interval)",
            "tokens a response",
            "ended by itself",
        ]
    ]
    differences = [
        ["run", "evaluation", "model", "against", "accuracy, points (95 % interval)", "reverse KL, nat/token (95 % interval)", "prompts"]
    ]
    training = [["run", "stage", *TRAINING_COLUMNS]]
    stages = [["run", "stage", "seconds", "tokens", "tokens/s", "GPU hours", "energy, kWh"]]
    for run in runs:
        results += [[run.label, *evaluation_cells(evaluation)] for evaluation in run.evaluations]
        differences += [
            [run.label, *difference_cells(evaluation, run.evaluations)] for evaluation in run.evaluations if "against" in evaluation
        ]
        training += [[run.label, stage, *training_cells(rows)] for stage, rows in run.training.items()]
        stages += [[run.label, *stage_cells(row), shown(total_cost([row])["energy_kwh"], ".2f")] for row in run.stages]
        if len(run.stages) > 1:
            energy = unmeasured(run.stages) or shown(run.cost()["energy_kwh"], ".2f")
            stages.append([run.label, *stage_cells(_total(run.stages)), energy])
    on_the_way = [["run", "stage", *over_training.COLUMNS]]
    rounds = [["run", *ROUND_COLUMNS]]
    for run in runs:
        on_the_way += [[run.label, stage, *row] for stage, rows in run.training.items() for row in over_training.table_rows(rows)]
        rounds += [[run.label, *row] for row in round_rows(run.stages, run.training.get("opd", []))]
    found = _with_run(runs)
    every = (
        ("Models by evaluation", cells(found) if len({record["evaluation"] for record in found}) > 1 else []),
        ("Results", results),
        ("Several samples a prompt", sample_cells(found)),
        ("Figures that were not made as others of their evaluation", [["* what differs"], *([text] for text in unlike(found).values())]),
        ("Differences, paired by prompt", differences),
        ("Training", training),
        ("Evaluations during training", on_the_way),
        ("Rounds", rounds),
        ("Stages", stages),
    )
    return [(title, rows) for title, rows in every if len(rows) > 1]


def _with_run(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Evaluations of all runs, in the order of the models; of several runs the run goes before the model's name."""
    return [
        record | {"name": f"{run.label}: {record['name']}" if len(runs) > 1 else record["name"]}
        for run in runs
        for record in sorted(run.evaluations, key=lambda record: model_order(record["name"]))
    ]


def evaluation_cells(evaluation: dict[str, Any]) -> list[str]:
    """evaluation, model, accuracy, reverse KL, response length, stopped share."""
    accuracy = interval(evaluation["accuracy"], ".1%") if "accuracy" in evaluation else ""
    grading = evaluation.get("grading")
    if accuracy and isinstance(grading, dict):
        accuracy += "".join(
            f", {grading[key]} {text}" for key, text in (("timeouts", "timed out"), ("errors", "failed")) if grading.get(key)
        )
    return [
        evaluation["evaluation"],
        evaluation["name"],
        accuracy,
        _with_caveat(interval(evaluation["reverse_kl"], ".4f"), evaluation) if "reverse_kl" in evaluation else "",
        shown(evaluation["response_length"], ".0f"),
        shown(evaluation["stopped_share"], ".1%"),
    ]


def difference_cells(evaluation: dict[str, Any], evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """evaluation, model, baseline, change of accuracy and of reverse KL, number of prompts. `evaluations`: all of the run."""
    against = current(evaluation, evaluations)["against"]
    return [
        evaluation["evaluation"],
        evaluation["name"],
        against["name"],
        interval(against["accuracy"], ".1f", factor=100, signed=True) if "accuracy" in against else str(against.get("note", "")),
        _with_caveat(interval(against["reverse_kl"], ".4f", signed=True), evaluation) if "reverse_kl" in against else "",
        str(against["num_prompts"]),
    ]


def _with_caveat(cell: str, evaluation: dict[str, Any]) -> str:
    caveat = kl_caveat(evaluation.get("sampling"))
    return f"{cell}, {caveat}" if caveat else cell


TRAINING_COLUMNS = (
    "steps (skipped)", "loss", "reverse KL, nat/token", "KL at 1st, 16th, 256th, 4096th token", "entropy, nat", "tokens a response",
    "effective share", "tokens/s", "MFU", "memory, GiB",
)  # fmt: skip


def training_cells(rows: list[dict[str, Any]]) -> list[str]:
    """The columns above; "a -> b" are means over the first and the last tenth of the steps."""
    start, end = window(rows, end=False), window(rows, end=True)
    distilled = distils(rows)

    def change(key: str, form: str) -> str:
        return f"{shown(_mean(start, key), form)} -> {shown(_mean(end, key), form)}"

    positions, _ = kl_by_position(end)
    return [
        f"{rows[-1]['step']} ({sum(bool(row.get('skipped')) for row in rows)})",
        change("loss", ".4f"),
        change("reverse_kl", ".4f") if distilled else "",
        ", ".join(shown(positions[p], ".3f") if p < len(positions) else "-" for p in (0, 4, 8, 12)) if distilled else "",
        change("entropy", ".3f"),
        shown(_mean(rows, "response_length"), ".0f"),
        change("effective_sample_share", ".0%") if distilled else "",
        shown(_mean(rows, "tokens_per_second"), ",.0f"),
        shown(_mean(rows, "model_flops_utilisation"), ".1%"),
        shown(max((row["memory_gib"] for row in rows if row.get("memory_gib") is not None), default=None), ".1f"),
    ]


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Mean of the rows that have a value (a skipped step has none)."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"stage": "all", **{key: sum(row[key] for row in rows) for key in ("seconds", "tokens", "gpu_hours")}}


def stage_cells(row: dict[str, Any]) -> list[str]:
    """stage, seconds, tokens, tokens/s, GPU hours."""
    failed = f" (ended by {row['error'].split(':')[0]})" if "error" in row else " (unfinished)" if row.get("unfinished") else ""
    return [
        row["stage"] + failed,
        shown(row["seconds"], ".1f"),
        shown(row["tokens"], ",.0f"),
        shown(row["tokens"] / max(row["seconds"], 1e-9), ",.0f"),
        shown(row["gpu_hours"], ".2f"),
    ]
