"""What a report reads of a run's folder. A file or row that is damaged is named and left out, so that it costs no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import read_jsonl, read_stages
from megatron_opd.errors import UserError
from megatron_opd.evaluate.over_training import is_error
from megatron_opd.recipe.evaluation import is_name, output_of
from megatron_opd.safety.untrusted import read_json

_LARGEST = 1e100
_BY_POSITION = ("reverse_kl_by_position", "tokens_by_position")


def read_run(folder: Path) -> dict[str, Any]:
    """evaluations (the oldest first), training (rows by stage), stages. Prints what it leaves out; raises UserError if nothing is there."""
    for path in sorted(output_of(folder).glob("*.json")):
        print(f"report: {path} is left out: it is of a version without named evaluations; its samples can be read with 'megatron-opd show'")
    evaluations = [found for path in evaluation_files(folder) if (found := _read_evaluation(path)) is not None]
    training = {
        path.parent.name: rows for path in sorted(folder.glob("*/metrics.jsonl")) if (rows := _rows(path, read_jsonl(path), _is_step))
    }
    stages = read_stage_rows(folder)
    if not evaluations and not training and not stages:
        raise UserError(
            f"{folder}: no run here (no eval/*/*.json, */metrics.jsonl or stages.jsonl that can be read); give the run_dir of a recipe"
        )
    return {"evaluations": sorted(evaluations, key=_created), "training": training, "stages": stages}


def read_stage_rows(folder: Path) -> list[dict[str, Any]]:
    """What the stages of a run cost; none where the folder keeps no account. Prints what it leaves out."""
    path = folder / "stages.jsonl"
    return _rows(path, read_stages(path), _is_stage)


def evaluation_files(folder: Path) -> list[Path]:
    """The figures in a run's folder, whether they can be read or not."""
    places = [place for place in sorted(output_of(folder).glob("*")) if is_name(place.name)]  # not stores, which hold JSON files too
    return [path for place in places for path in sorted(place.glob("*.json"))]


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Figures of the models that one evaluation was made of. Prints what it leaves out."""
    return [found for path in sorted(folder.glob("*.json")) if (found := _read_evaluation(path)) is not None]


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, UserError) as error:
        return _leave_out(path, str(error).removeprefix(f"{path}: "))
    return found if _is_evaluation(found) else _leave_out(path, "it lacks figures of an evaluation")


def _leave_out(path: Path, why: str) -> None:
    print(
        f"report: {path} is left out: {why}; run 'megatron-opd eval RECIPE {path.parent.name} --of {path.stem}' again, or delete the file"
    )


def _rows(path: Path, found: list[dict[str, Any]], is_whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    rows = [row for row in found if is_whole(row)]
    if len(rows) < len(found):
        print(
            f"report: {path}: {len(found) - len(rows)} of {len(found)} rows are left out: they lack fields, or hold no numbers where they should"
        )
    return rows


def _created(evaluation: dict[str, Any]) -> str:
    """When it was made; "" where the file does not say."""
    provenance = evaluation.get("provenance")
    return str(provenance.get("created", "")) if isinstance(provenance, dict) else ""


def _is_number(value: Any) -> bool:
    """One that a figure can show; infinities stand for a missing bound in old files."""
    return isinstance(value, int | float) and not _LARGEST < abs(value) < math.inf


def _are_intervals(record: dict[str, Any]) -> bool:
    """Whether those of accuracy and reverse KL that are there have a mean and its interval, whose bounds one prompt alone has as null."""
    found = [record[key] for key in ("accuracy", "reverse_kl") if key in record]
    return all(isinstance(value, dict) and _is_number(value.get("mean")) and _has_bounds(value) for value in found)


def _has_bounds(figure: dict[str, Any]) -> bool:
    bounds = [figure.get(key, "") for key in ("low", "high")]
    return all(_is_number(value) for value in bounds) or bounds == [None, None]


def _is_evaluation(record: Any) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("evaluation", "name")):
        return False
    if not _are_intervals(record):
        return False
    against = record.get("against", {"name": "", "num_prompts": 0})
    paired = isinstance(against, dict) and isinstance(against.get("name"), str) and "num_prompts" in against and _are_intervals(against)
    # What older versions wrote lacks these.
    known = _has_numbers(record.get("sampling", {}), ("temperature", "top_p", "top_k", "samples_per_prompt"))
    known = known and _has_numbers(record.get("grading", {}), ("timeouts", "errors"))
    return paired and known and all(_is_number(record.get(key)) for key in ("response_length", "stopped_share"))


def _has_numbers(section: Any, names: tuple[str, ...]) -> bool:
    """Whether `section` is one, in which those of the fields that are there are numbers."""
    return isinstance(section, dict) and all(_is_number(section[name]) for name in names if name in section)


def _is_step(row: dict[str, Any]) -> bool:
    """A skipped step has null where there is no number."""
    values = [value for key, value in row.items() if key not in _BY_POSITION and not (is_error(key) and isinstance(value, str))]
    positions = [row.get(key) or [] for key in _BY_POSITION]
    if not isinstance(row.get("step"), int) or not all(isinstance(found, list) for found in positions):
        return False
    return all(value is None or _is_number(value) for value in [*values, *(value for found in positions for value in found)])


def _is_stage(row: dict[str, Any]) -> bool:
    numbers = all(_is_number(row.get(key)) for key in ("seconds", "tokens", "gpu_hours")) and _is_number(row.get("energy_joules", 0.0))
    return numbers and bool(row.get("stage")) and all(isinstance(row.get(key, ""), str) for key in ("stage", "error"))
