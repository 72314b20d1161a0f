"""What stale stages made is moved out of the way, not deleted: RUN_DIR/set_aside/NNN/."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_opd.data.location import Location
from megatron_opd.errors import UserError
from megatron_opd.pipeline.stages import Stage, evaluation_at, recipe_of
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.recipe.rounds import ROUND_FILE, student_after
from megatron_opd.safety.durable import make_folder, sync
from megatron_opd.safety.locks import Lock

FOLDER = "set_aside"


def set_aside(recipe: Recipe, stages: list[Stage]) -> Path | None:
    """Move the results of `stages` away, the last stage's first; returns where they are, None if there was nothing.

    Killed in between, the first of them is still there and still stale. Raises UserError for what lies outside of the run's folder, where it may be
    of others too, and for a training that is running.
    """
    results = dict.fromkeys(path for stage in reversed(stages) for path in _results(recipe_of(recipe, stage), stage))
    found = [path for path in results if path.exists()]
    found = [path for path in found if not any(other in path.parents for other in found)]  # scores go with their store
    if not found:
        return None
    for path in found:
        _check_own(recipe, path)
    outputs = [Path(recipe.sft.output), Path(recipe.train.output)]
    with _not_running(path for path in found if path in outputs):
        target = _next_folder(Path(recipe.run_dir) / FOLDER)
        for path in found:
            _move(path, target / path.absolute().relative_to(Path(recipe.run_dir).absolute()))
    return target


def _move(path: Path, goal: Path) -> None:
    make_folder(goal.parent)
    try:
        path.rename(goal)
    except OSError as error:
        raise UserError(
            f"{path} can't be moved to {goal}: {error.strerror}; move it away yourself, and run the same command again"
        ) from None
    sync(goal.parent)
    sync(path.parent)


@contextlib.contextmanager
def _not_running(outputs: Iterable[Path]) -> Iterator[None]:
    """Holds the locks of trainings' output folders."""
    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(Lock(output, wait_seconds=0))
        yield


def _check_own(recipe: Recipe, path: Path) -> None:
    if not path.absolute().is_relative_to(Path(recipe.run_dir).absolute()):
        raise UserError(
            f"{path} lies outside of {recipe.run_dir}: it must be made again, and others may use it; move it away yourself, or name another"
        )


def _next_folder(parent: Path) -> Path:
    number = 1 + max((int(path.name) for path in parent.glob("[0-9]*") if path.name.isdecimal()), default=0)
    return parent / f"{number:03d}"


def _results(recipe: Recipe, stage: Stage) -> list[Path]:
    """Files and folders that a stage made; the training of a round is that of all rounds."""
    name = stage.name
    if name == "train" and stage.round is not None:
        return [*sorted(Path(recipe.run_dir).glob(f"rounds/*/{ROUND_FILE}")), Path(recipe.train.output)]
    if name == "generate":
        return [_local(require(recipe.generate, "generate").store)]
    if name == "rollout":
        return [_local(require(recipe.rollout, "rollout").store)]
    if name == "score":
        return sorted(_local(recipe.score.store).glob(f"parts/*/teacher/{recipe.score.teacher}"))
    if name == "derive":
        return sorted(path for derived in recipe.score.derived for path in _local(recipe.score.store).glob(f"parts/*/teacher/{derived}"))
    if name == "engines":
        return [_local(require(recipe.rollout, "rollout").store) / "calibration.json"]
    if name in ("sft", "train"):
        return [Path(getattr(recipe, name).output)]
    if name in ("sft-hf", "opd-hf"):
        return [Path(require(recipe.rollout, "rollout").model if name == "sft-hf" else student_after(recipe, stage.round))]
    if stage.evaluation is not None:
        return evaluation_at(recipe, stage).results
    return []


def _local(store: str) -> Path:
    location = Location(store)
    if "://" in location.address:
        raise UserError(
            f"{location.url}: its results must be made again, and can't be moved aside there; move or delete them, or name another store"
        )
    return Path(store)
