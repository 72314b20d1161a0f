"""What a run is: what a resume can't change at all, what it can't change silently, and what is the recipe's of now."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_opd.config import TrainerConfig, TrainStage
from megatron_opd.data.identity import content_of, rollouts_id, scores_id
from megatron_opd.data.joined import show_stores
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import BRANCH, CheckpointError
from megatron_opd.model.architecture import Architecture
from megatron_opd.objective import LossConfig
from megatron_opd.records import ModelFingerprint
from megatron_opd.saved import find_checkpoint, read_state

# Settings that decide which rollouts are in which step, and the one that decides how the optimizer's state is laid out.
_FIXED = ("seed", "global_batch", "max_response_tokens", "distributed_optimizer")
# Data and models are known by their content, wherever they lie and whatever their group in the store is called.
_BY_CONTENT = {"init", "store", "output", "teacher", "loss", "allow_incomplete", "allow_teacher_mismatch", "allow_stop_mismatch"}
_STATE: dict[str, type] = {"fixed": dict, "objective": dict, "settings": dict, "overrides": list}
# How far a model reads, not what it computes.
_NOT_THE_FUNCTION = ("max_positions",)


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint records of its run, besides weights and progress.

    `fixed` can't change; `objective` (loss, teacher, its scores, the model that training starts from) not without being asked for and
    recorded, since the result is another; `free` are the recipe's of now, and what changed is said.
    """

    fixed: dict[str, Any]
    objective: dict[str, Any]
    free: dict[str, Any]
    rollouts_and_scores: str  # what older checkpoints have as fixed["store"]

    def state(self) -> dict[str, Any]:
        return {"fixed": self.fixed, "objective": self.objective, "settings": self.free}


def run_identity(
    config: TrainerConfig, reader: StoreReader, arch: Architecture, init: ModelFingerprint, teacher: ModelFingerprint
) -> RunIdentity:
    """`teacher` is the model that scored or, for SFT, that answered."""
    function = {key: value for key, value in asdict(arch).items() if key not in _NOT_THE_FUNCTION}
    objective: dict[str, Any] = {"teacher": _model(teacher), "init": _model(init) | {"architecture": json.loads(json.dumps(function))}}
    if isinstance(config, TrainStage):
        objective |= {"loss": config.loss.model_dump(mode="json"), "scores": scores_id(reader)}
    return RunIdentity(
        fixed={key: getattr(config, key) for key in _FIXED} | {"num_rollouts": len(reader), "rollouts": rollouts_id(reader)},
        objective=objective,
        free=config.model_dump(mode="json", exclude=_BY_CONTENT | set(_FIXED)),
        rollouts_and_scores=content_of(reader),
    )


def _model(model: ModelFingerprint) -> dict[str, Any]:
    return {"name": model.name, "weights": model.weights_sha256, "tokens": model.tokenizer.vocab_sha256}


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on, and with what that was not so before. Without a checkpoint it starts."""

    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)  # changes of the objective, now and earlier: a sentence each
    new: list[str] = field(default_factory=list)  # those of now: 'loss.name opd -> vopd'
    settings: list[str] = field(default_factory=list)  # 'lr 0.001 -> 1e-05'
    unrecorded: list[str] = field(default_factory=list)  # what the checkpoint does not say of its objective
    notes: list[str] = field(default_factory=list)  # why it is not the checkpoint that one would expect
    damaged: list[int] = field(default_factory=list)  # steps of newer ones, which are passed over

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))


def plan_resume(
    name: str, config: TrainerConfig, now: RunIdentity, *, allow_changes: bool, damaged: Mapping[Path, str] | None = None
) -> Resumption:
    """What the newest whole checkpoint in the run's folder means for this run; `name` is the stage, `damaged` what is known of others.

    Raises CheckpointError if none is whole, if it is of a run with other data or another layout of the optimizer's state and, unless `allow_changes`,
    of one with another objective.
    """
    found = find_checkpoint(Path(config.output), damaged)
    if (checkpoint := found.checkpoint) is None:
        return Resumption()
    state = read_state(checkpoint)
    wrong = [key for key, kind in _STATE.items() if not isinstance(state.get(key, kind()), kind)]
    if wrong or "fixed" not in state:
        raise CheckpointError(
            f"{checkpoint}: its state has no field {(wrong or ['fixed'])[0]!r} that can be read; write the name of another step folder into 'latest', or take another output"
        )
    _check_fixed(checkpoint, state["fixed"], now, name, show_stores(config.store))
    free = dict(state.get("settings", {}))
    loss = free.pop("loss", None)  # where older versions put it
    objective = state.get("objective", {} if loss is None else {"loss": loss})
    new = _changes_of_objective(objective, now.objective)
    if new and not allow_changes:
        raise CheckpointError(
            f"{checkpoint}: {name} was begun with another objective than it would go on with: {', '.join(new)}; give the new run a folder of its "
            f"own ({name}.output=...), or use what it was begun with. --continue-with-changes goes on in this folder, and is recorded for good; {BRANCH}"
        )
    step = int(state["step"])
    earlier = [str(entry) for entry in state.get("overrides", [])]
    return Resumption(
        checkpoint,
        state,
        overrides=earlier + [f"{name} went on after step {step} with other settings: {change}" for change in new],
        new=new,
        settings=changes(free, now.free),
        unrecorded=sorted(now.objective.keys() - objective.keys()),
        notes=[f"WARNING: {note}" for note in found.notes],
        damaged=found.damaged,
    )


def _check_fixed(checkpoint: Path, before: dict[str, Any], now: RunIdentity, name: str, store: str) -> None:
    """Raise CheckpointError for what no resume can change."""
    wanted: dict[str, Any] = dict(now.fixed)
    if "rollouts" not in before:  # an older version's
        del wanted["rollouts"]
        wanted["store"] = now.rollouts_and_scores
    for key, value in wanted.items():
        if before.get(key) == value:
            continue
        what = f"{key} = {before.get(key)!r}, now {value!r}"
        if key in ("store", "rollouts"):
            what = f"other rollouts{' or scores' if key == 'store' else ''} than {store} has now ({before.get(key)}, now {value})"
        raise CheckpointError(
            f"{checkpoint}: made with {what}; a resumed run can't change that: use it as it was, or another folder ({name}.output=...); {BRANCH}"
        )


def _changes_of_objective(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """As `changes`, of what both know; models by their content."""
    before = {key: value for key, value in before.items() if key in now}
    if "loss" in before:
        with contextlib.suppress(ValidationError):  # fields that a newer version added had their defaults
            before["loss"] = LossConfig.model_validate(before["loss"]).model_dump(mode="json")
    found = []
    for key, old in before.items():
        new = now[key]
        if key in ("teacher", "init") and isinstance(old, dict):
            if [old.get("weights"), old.get("tokens")] != [new["weights"], new["tokens"]]:
                found.append(f"{key} {_short(old)} -> {_short(new)}")
            sizes, sizes_now = old.get("architecture") or {}, new.get("architecture") or {}
            both = sizes.keys() & sizes_now.keys()
            found += changes({k: sizes[k] for k in both}, {k: sizes_now[k] for k in both}, f"{key}.")
        else:
            found += changes({key: old}, {key: new})
    return found


def _short(model: dict[str, Any]) -> str:
    return f"{model.get('name')} (weights {str(model.get('weights'))[:12]}, tokens {str(model.get('tokens'))[:12]})"


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """'lr 0.001 -> 1e-05' for each setting that is not what it was."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old} -> {new}")
    return found
