"""The runs of a report: what `read_run` finds in their folders, their settings, and who made what when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.saved import checkpoint_folder, step_of
from megatron_opd.errors import UserError
from megatron_opd.evaluate.run_files import read_run
from megatron_opd.hf.lineage import LINEAGE_FILE
from megatron_opd.recipe.evaluation import round_number
from megatron_opd.recipe.files import RECIPE_FILE
from megatron_opd.safety.untrusted import LARGEST_TOML, load_toml, read_bytes, read_object

_BEFORE = ("teacher", "base", "sft")  # models of a run that its distillation begins with
_TRAININGS = {"sft": "sft", "opd": "train"}  # folder of a training in the run's: its section of the recipe
_STATE_FILE = "opd_state.json"


@dataclass
class Run:
    """A run's folder. evaluations, training (rows by stage) and stages as `read_run` returns them.

    settings: of its recipe, flat ("train.lr"); {} where none is kept; run_dir: as the recipe names it. facts: lineage, commits, versions and dates of what it made.
    group: set by `grouping.group_runs`. shared: rows of stages of other folders whose products it took, with "folder"; unknown: those of which
    nobody knows the cost; both set by `shared_cost.find_shared`.
    """

    label: str
    folder: Path
    evaluations: list[dict[str, Any]]
    training: dict[str, list[dict[str, Any]]]
    stages: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    run_dir: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    shared: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def student(self) -> str | None:
        """The model that the run is about: "opd", else its last round, else the only one beside those that it began with."""
        names = dict.fromkeys(record["name"] for record in self.evaluations)
        made = [name for name in names if name not in _BEFORE]
        if "opd" in made:
            return "opd"
        if rounds := [(number, name) for name in made if (number := round_number(name)) is not None]:
            return max(rounds)[1]
        return made[0] if len(made) == 1 else None

    def record(self, evaluation: str, model: str) -> dict[str, Any] | None:
        """Figures of a model; the newest."""
        found = [record for record in self.evaluations if (record["evaluation"], record["name"]) == (evaluation, model)]
        return found[-1] if found else None

    def rows(self, evaluation: str, model: str) -> Path:
        """The file with a row for every sample."""
        return self.folder / "eval" / evaluation / f"{model}.prompts.jsonl"

    def store(self, evaluation: str, model: str) -> Path:
        """The store of those samples."""
        return self.folder / "eval" / evaluation / f"{model}.opd.zarr"

    def cost(self) -> dict[str, float | None]:
        """`total_cost` of the stages that ran in this folder."""
        return total_cost(self.stages)


def total_cost(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """seconds, gpu_hours and energy_kwh (of the GPUs) of stages; None without any, and energy where one that used GPUs did not measure it."""
    measured = [row["energy_joules"] for row in rows if "energy_joules" in row]
    whole = bool(measured) and all("energy_joules" in row for row in rows if row["gpu_hours"])
    return {
        "seconds": sum(row["seconds"] for row in rows) if rows else None,
        "gpu_hours": sum(row["gpu_hours"] for row in rows) if rows else None,
        "energy_kwh": sum(measured) / 3.6e6 if whole else None,
    }


def read_runs(folders: list[str]) -> list[Run]:
    """Each folder once, under its name, or where two have one name its path from the folder that all lie in. Raises UserError for one that holds no run."""
    different: dict[Path, Path] = {}
    for folder in folders:
        different.setdefault(Path(os.path.realpath(folder)), Path(folder))
    if len(different) < len(folders):
        print(f"report: {len(folders)} folders were given, but only {len(different)} different ones; each is shown once")
    names = [place.name for place in different]
    labels = names if len(set(names)) == len(names) else _paths(list(different))
    return [_read(label, given) for label, given in zip(labels, different.values(), strict=True)]


def _paths(places: list[Path]) -> list[str]:
    above = os.path.commonpath([place.parent for place in places])
    return [str(place.relative_to(above)) for place in places]


def _read(label: str, folder: Path) -> Run:
    run = Run(label, folder, **read_run(folder))
    run.settings, run.run_dir = read_settings(folder)
    run.facts = _facts(run)
    return run


def read_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Settings of a run, flat, and its run_dir: its recipe.toml, with what its trainings kept of their own sections. What can't be read is said."""
    tree = _recipe(folder / RECIPE_FILE)
    for name, section in _TRAININGS.items():
        if section in (kept := _recipe(folder / name / RECIPE_FILE)):
            tree[section] = kept[section]
    run_dir = str(tree.pop("run_dir", ""))
    tree.pop("name", None)
    return {key: _as_written(value, run_dir) for key, value in flat(tree).items()}, run_dir


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return load_toml(read_bytes(path, LARGEST_TOML).decode(), str(path))
    except FileNotFoundError:
        return {}
    except (OSError, UserError, UnicodeDecodeError) as error:
        print(f"report: {path} is left out: {str(error).removeprefix(f'{path}: ')}")
        return {}


def _as_written(value: Any, run_dir: str) -> Any:
    """A path in the run's own folder is no setting of its own."""
    if isinstance(value, str) and run_dir and value.startswith(f"{run_dir}/"):
        return "{run_dir}" + value.removeprefix(run_dir)
    return value


def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """{"train.loss.name": "opd", ...}; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def _facts(run: Run) -> dict[str, Any]:
    """Of the distillation's last checkpoint, or of the student made of it: lineage and provenance; and when figures were made."""
    facts: dict[str, Any] = {}
    for place in _made(run.folder):
        for name, key in ((LINEAGE_FILE, "lineage"), (_STATE_FILE, "training")):
            if key not in facts and (content := _object(place / name)):
                facts[key] = content.get("lineage", {}) if key == "lineage" else _provenance(content)
    dates = [record["provenance"] for record in run.evaluations if isinstance(record.get("provenance"), dict)]
    if dates:
        facts["evaluations"] = _provenance(dates[-1])
    started = [row["started"] for row in run.stages if isinstance(row.get("started"), int | float)]
    if started:
        facts["started"] = min(started)
    return facts


def _made(folder: Path) -> list[Path]:
    """The last checkpoint and the converted student, as far as they are there."""
    steps = checkpoint_folder(folder / "opd")
    found = sorted((path for path in steps.glob("step_*") if step_of(path.name) is not None), key=lambda path: step_of(path.name) or 0)
    return [*found[-1:], folder / "opd-hf"]


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, UserError) as error:
        print(f"report: {path} is left out: {str(error).removeprefix(f'{path}: ')}")
        return {}


def _provenance(content: dict[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in ("created", "git_commit", "versions", "overrides") if key in content}
