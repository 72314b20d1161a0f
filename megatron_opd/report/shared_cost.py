"""What runs cost: the stages of a run's own folder, and those of other folders whose store or student its training began with.

A store and a student that several runs share are paid for once, in the folder where they were made; its scores in that of the run that asked for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opd.evaluate.run_files import read_stage_rows
from megatron_opd.report.runs import Run, read_settings, total_cost

_STAGES = {"generate": "generate.store", "sft": "sft.output", "rollout": "rollout.store", "score": "score.store"}  # with what each makes


def find_shared(runs: Sequence[Run]) -> None:
    """Sets `shared` and `unknown` of each run whose training took a store or a student that lies in another folder."""
    folders: dict[Path, Run] = {Path(os.path.realpath(run.folder)): run for run in runs}
    for run in runs:
        if "train" in {row["stage"] for row in run.stages}:
            _find(run, folders)


def _find(run: Run, folders: dict[Path, Run]) -> None:
    init, stores = run.settings.get("train.init"), run.settings.get("train.store")
    for path in _elsewhere(run, [init]):
        _take(run, path, ("generate", "sft"), _maker(_place(run, path), folders))
    for path in _elsewhere(run, stores if isinstance(stores, list) else [stores]):
        place = _place(run, path)
        makers = _maker(place, folders)
        answers = any(_made(maker, "generate") == place for maker in makers)
        _take(run, path, ("generate" if answers else "rollout",), makers)
        if "score" not in {row["stage"] for row in run.stages}:
            others = {id(other): other for other in [*folders.values(), *makers]}
            _take(run, path, ("score",), [other for other in others.values() if _scored(other, run, place)])


def _elsewhere(run: Run, values: Sequence[Any]) -> list[str]:
    """The paths that lead out of the run's folder."""
    paths = [value for value in values if isinstance(value, str) and not value.startswith("{")]
    return [path for path in paths if _place(run, path).parent != Path(os.path.realpath(run.folder))]


def _take(run: Run, path: str, stages: Sequence[str], makers: Sequence[Run]) -> None:
    """Add the rows of these stages to what the run shares; a stage that no maker has a row of is not known."""
    for stage in stages:
        rows = [row | {"folder": str(maker.folder)} for maker in makers for row in maker.stages if row["stage"] == stage]
        run.shared += [row for row in rows if row not in run.shared]
        if not rows:
            run.unknown.append(f"{stage} of {path}")


def _maker(product: Path, folders: dict[Path, Run]) -> list[Run]:
    """The run in whose folder this lies, also one that the report is not about; none where that has no account of its stages."""
    folder = product.parent
    if folder in folders:
        return [folders[folder]]
    rows = read_stage_rows(folder)
    return [Run(folder.name, folder, [], {}, rows, *read_settings(folder))] if rows else []


def _scored(other: Run, run: Run, store: Path) -> bool:
    """Whether `other` made the scores that `run` was trained on."""
    return _made(other, "score") == store and other.settings.get("score.teacher") == run.settings.get("score.teacher")


def _made(run: Run, stage: str) -> Path | None:
    """Where the run's recipe has the product of a stage."""
    path = run.settings.get(_STAGES[stage])
    return _place(run, path) if isinstance(path, str) else None


def _place(run: Run, path: str) -> Path:
    """A path of the run's recipe: beside the run's folder where it was beside `run_dir`, wherever both are by now."""
    parent = run.run_dir.rstrip("/").rpartition("/")[0]
    path = path.replace("{run_dir}", str(run.folder))
    if parent and path.startswith(f"{parent}/"):
        path = str(Path(os.path.realpath(run.folder)).parent / path.removeprefix(f"{parent}/"))
    return Path(os.path.realpath(path))


def whole_cost(run: Run) -> Mapping[str, float | None]:
    """Of the run's stages and those that it shares; None where that of one is not known."""
    return total_cost([] if run.unknown or not run.stages else [*run.stages, *run.shared])


def unmeasured(rows: Sequence[dict[str, Any]]) -> str:
    """Why the energy of stages is not known as a whole though some have it; "" otherwise."""
    missing = [row["stage"] for row in rows if row["gpu_hours"] and "energy_joules" not in row]
    measured = [row["energy_joules"] for row in rows if "energy_joules" in row]
    if not missing or not measured:
        return ""
    return f"not known: {', '.join(dict.fromkeys(missing))} did not measure it ({sum(measured) / 3.6e6:.3g} kWh in the others)"
