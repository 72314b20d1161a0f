"""The table of a run: a row a model, a column an evaluation; and the paired differences below it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from megatron_opd.evaluate.run_files import read_evaluations
from megatron_opd.evaluate.settings import GRADED, differences
from megatron_opd.evaluate.wording import describe_difference, interval, kl_caveat
from megatron_opd.recipe.evaluation import model_order


def made(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The figures that lie in the folders of evaluations, models in the order that a run makes them. What is damaged is said and left out."""
    found = [record for folder in folders for record in read_evaluations(folder)]
    return sorted(found, key=lambda record: model_order(record["name"]))


def cells(evaluations: Sequence[dict[str, Any]], columns: Iterable[str] = ()) -> list[list[str]]:
    """Head and rows: accuracy with its 95 % interval, or the reverse KL of what is not graded. `columns`: the order of the evaluations.

    A figure that was not made as the others of its column has a "*", which `unlike` explains.
    """
    of = _by_evaluation(evaluations, columns)
    head = ["model", *(f"{name}{_average(list(records.values()))}" for name, records in of.items())]
    marked = unlike(evaluations)
    models = dict.fromkeys(record["name"] for record in evaluations)
    rows = [[(_cell(records.get(model)) + " *" * ((name, model) in marked)) for name, records in of.items()] for model in models]
    return [head, *([model, *row] for model, row in zip(models, rows, strict=True))]


def unlike(evaluations: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """What figures differ in from others of their evaluation, by evaluation and model: prompts, sampling, grading.

    They are held against the one that most others are like, the first of several.
    """
    found = {}
    for name, records in _by_evaluation(evaluations).items():
        most = min(records.values(), key=lambda record: sum(bool(differences(record, other)) for other in records.values()))
        for model, record in records.items():
            if other := differences(most, record):
                found[name, model] = f"{name} {model}: not as {most['name']}: other {', '.join(other.values())}"
    return found


def current(record: dict[str, Any], evaluations: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record, with a note for the difference of accuracy in `against` where it or its baseline was graded otherwise since."""
    against = record["against"]
    baseline = next((e for e in evaluations if (e["evaluation"], e["name"]) == (record["evaluation"], against["name"])), None)
    if baseline is None or "accuracy" not in against or not (found := differences(baseline, record, GRADED)):
        return record
    note = (
        f"accuracy is not compared: {against['name']} was graded since with other {', '.join(found.values())}; grade this again: "
        f"megatron-opd eval RECIPE {record['evaluation']} --of {record['name']}"
    )
    return record | {"against": {key: value for key, value in against.items() if key != "accuracy"} | {"note": note}}


def difference_lines(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each figure that is compared with a baseline, and for each that was not made as the others ("*")."""
    lines = [describe_difference(current(record, evaluations)) for record in evaluations if "against" in record]
    return lines + [f"* {text}" for text in unlike(evaluations).values()]


def sample_cells(evaluations: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Head and rows of what several samples of a prompt are worth: pass@k for the largest k, majority@n, calibration error; [] without any."""
    rows = []
    for record in evaluations:
        passed = record.get("pass@k")
        k = max((key for key in passed if key.isdecimal()), key=int, default="1") if isinstance(passed, dict) else "1"
        if not isinstance(passed, dict) or int(k) < 2 or not _is_figure(passed[k]):
            continue
        most, majority, calibration = passed[k].get("prompts"), record.get("majority@n"), record.get("calibration")
        fewer = isinstance(passed.get("1"), dict) and most != passed["1"].get("prompts")
        ece = calibration.get("ece") if isinstance(calibration, dict) else None
        rows.append(
            [
                record["evaluation"],
                record["name"],
                f"pass@{k} {interval(passed[k], '.1%')}" + f", of {most} prompts" * fewer,
                f"majority@{majority.get('n')} {interval(majority, '.1%')}" if _is_figure(majority) else "",
                interval(ece, ".3f") if _is_figure(ece) else "",
            ]
        )
    return [["evaluation", "model", "pass@k", "majority@n", "calibration error"], *rows] if rows else []


def _is_figure(value: Any) -> TypeGuard[dict[str, Any]]:
    """A mean with its bounds, which one prompt alone has as null."""
    if not isinstance(value, dict) or not isinstance(value.get("mean"), int | float):
        return False
    return all(isinstance(value.get(key, ""), int | float | None) for key in ("low", "high"))


def text(evaluations: Sequence[dict[str, Any]], columns: Iterable[str] = ()) -> str:
    """For a terminal: the tables, what is compared with a baseline, and what differs. "" where nothing is there."""
    if not evaluations:
        return ""
    paragraphs = [aligned(cells(evaluations, columns))]
    if several := sample_cells(evaluations):
        paragraphs.append(aligned(several))
    return "\n\n".join([*paragraphs, *(["\n".join(lines)] if (lines := difference_lines(evaluations)) else [])])


def _by_evaluation(evaluations: Iterable[dict[str, Any]], columns: Iterable[str] = ()) -> dict[str, dict[str, dict[str, Any]]]:
    """Records by the name of the evaluation, those of `columns` first, and by model."""
    of: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict, {name: {} for name in columns})
    for record in evaluations:
        of[record["evaluation"]][record["name"]] = record
    return {name: records for name, records in of.items() if records}


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _average(records: list[dict[str, Any]]) -> str:
    """Of how many samples a prompt the accuracy is the mean, where all models have the same number."""
    counts = {record.get("sampling", {}).get("samples_per_prompt") for record in records if "accuracy" in record}
    count = next(iter(counts)) if len(counts) == 1 else None
    return "" if count is None else f" (average@{count})"


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    if "accuracy" in record:
        return interval(record["accuracy"], ".1%")
    if "reverse_kl" not in record:
        return "not graded"
    caveat = kl_caveat(record.get("sampling"))
    return f"reverse KL {interval(record['reverse_kl'], '.4f')}" + (f", {caveat}" if caveat else "")
