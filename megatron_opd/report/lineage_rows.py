"""What each run is: the settings that differ, and lineage, commit, versions, dates and cost of every run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opd.evaluate.wording import shown
from megatron_opd.report.grouping import different_settings
from megatron_opd.report.runs import Run, total_cost
from megatron_opd.report.shared_cost import unmeasured

_MOST_VALUES = 4


def settings_table(groups: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """Settings that differ, a row each, with a column a group; seeds, and what differs within a group, as a list of its values."""
    runs = [run for members in groups.values() for run in members]
    rows = [["setting", *groups]]
    for name, values in different_settings(runs, seeds=True).items():
        of = {run.label: value for run, value in zip(runs, values, strict=True)}
        rows.append([name, *(_values([of[run.label] for run in members]) for members in groups.values())])
    return rows


def _values(values: Sequence[str]) -> str:
    different = list(dict.fromkeys(values))
    return ", ".join(different[:_MOST_VALUES]) + (f" and {len(different) - _MOST_VALUES} more" if len(different) > _MOST_VALUES else "")


def mixed_groups(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """A sentence for each group whose runs differ in more than seeds."""
    found = {name: list(different_settings(members)) for name, members in groups.items()}
    return [f"The runs of group {name} differ in more than seeds: {', '.join(fields)}." for name, fields in found.items() if fields]


def run_facts(run: Run) -> list[list[str]]:
    """Rows of a name and a value: where a run lies, when and with what it was made, of which models, and what it cost."""
    training, evaluations = (run.facts.get(key, {}) for key in ("training", "evaluations"))
    lineage = run.facts.get("lineage") or {}
    versions = training.get("versions") or evaluations.get("versions") or {}
    cost = run.cost()
    found = {
        "folder": str(run.folder),
        "group": run.group,
        "begun": _date(run.facts.get("started")),
        "trained until": str(training.get("created", "")),
        "evaluated": str(evaluations.get("created", "")),
        "commit": str(training.get("git_commit") or evaluations.get("git_commit") or ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else "",
        "base model": _model(lineage.get("base")),
        "teacher of the SFT answers": _model(lineage.get("sft_teacher")),
        "teacher of the distillation": _model(lineage.get("opd_teacher")),
        "what was allowed": "; ".join(map(str, [*(lineage.get("overrides") or []), *(training.get("overrides") or [])])),
        "seconds, all stages": shown(cost["seconds"], ",.1f"),
        "GPU hours": shown(cost["gpu_hours"] or None, ".3g"),
        "energy of its GPUs, kWh": unmeasured(run.stages) or shown(cost["energy_kwh"], ".3g"),
        "shared with others": ", ".join(_shared(run)),
        "shared, but of unknown cost": ", ".join(run.unknown),
    }
    return [[name, value] for name, value in found.items() if value]


def _shared(run: Run) -> list[str]:
    """Stages of other folders, each with its time, and GPU hours where it used GPUs."""
    totals: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.shared:
        totals.setdefault((row["stage"], row["folder"]), []).append(row)
    return [
        f"{stage} in {folder}: {shown(cost['seconds'], ',.1f')} s"
        + (f", {shown(cost['gpu_hours'], '.3g')} GPU hours" if cost["gpu_hours"] else "")
        for (stage, folder), rows in totals.items()
        for cost in [total_cost(rows)]
    ]


def _model(model: Any) -> str:
    if not isinstance(model, dict):
        return ""
    return f"{model.get('name', '')} ({str(model.get('weights_sha256', ''))[:12]})"


def _date(seconds: Any) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if isinstance(seconds, int | float) and 0 < seconds < 1e11 else ""
