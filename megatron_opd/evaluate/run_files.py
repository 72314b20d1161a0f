"""What a report reads of a run's folder. A file or row that is damaged is named and left out, so that it costs no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opd.cost import read_jsonl, read_stages
from megatron_opd.errors import UserError
from megatron_opd.untrusted import read_json

_LARGEST = 1e100


def read_run(folder: Path) -> dict[str, Any]:
    """evaluations (the oldest first), training (rows by stage), stages. Prints what it leaves out; raises UserError if nothing is there."""
    evaluations = [found for path in sorted((folder / "eval").glob("*.json")) if (found := _read_evaluation(path)) is not None]
    training = {
        path.parent.name: rows for path in sorted(folder.glob("*/metrics.jsonl")) if (rows := _rows(path, read_jsonl(path), _is_step))
    }
    stages = _rows(folder / "stages.jsonl", read_stages(folder / "stages.jsonl"), _is_stage)
    if not evaluations and not training and not stages:
        raise UserError(
            f"{folder}: no run here (no eval/*.json, */metrics.jsonl or stages.jsonl that can be read); give the run_dir of a recipe"
        )
    return {"evaluations": sorted(evaluations, key=_created), "training": training, "stages": stages}


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, UserError) as error:
        return _leave_out(path, str(error).removeprefix(f"{path}: "))
    return found if _is_evaluation(found) else _leave_out(path, "it lacks figures of an evaluation")


def _leave_out(path: Path, why: str) -> None:
    print(f"report: {path} is left out: {why}; run 'megatron-opd eval' with eval.name={path.stem} again, or delete the file")


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
    if not isinstance(record, dict) or not isinstance(record.get("name"), str) or not _are_intervals(record):
        return False
    against = record.get("against", {"name": "", "num_prompts": 0})
    paired = isinstance(against, dict) and isinstance(against.get("name"), str) and "num_prompts" in against and _are_intervals(against)
    # What older versions wrote lacks these.
    known = _has_numbers(record.get("sampling", {}), ("temperature", "top_p", "top_k"))
    known = known and _has_numbers(record.get("grading", {}), ("timeouts", "errors"))
    return paired and known and all(_is_number(record.get(key)) for key in ("response_length", "stopped_share"))


def _has_numbers(section: Any, names: tuple[str, ...]) -> bool:
    """Whether `section` is one, in which those of the fields that are there are numbers."""
    return isinstance(section, dict) and all(_is_number(section[name]) for name in names if name in section)


def _is_step(row: dict[str, Any]) -> bool:
    """A skipped step has null where there is no number."""
    values = [value for key, value in row.items() if key != "reverse_kl_by_position"]
    positions = row.get("reverse_kl_by_position") or []
    return isinstance(row.get("step"), int) and isinstance(positions, list) and all(v is None or _is_number(v) for v in values + positions)


def _is_stage(row: dict[str, Any]) -> bool:
    numbers = all(_is_number(row.get(key)) for key in ("seconds", "tokens", "gpu_hours")) and _is_number(row.get("energy_joules", 0.0))
    return numbers and bool(row.get("stage")) and all(isinstance(row.get(key, ""), str) for key in ("stage", "error"))
