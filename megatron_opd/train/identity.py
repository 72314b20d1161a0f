"""What a run is: what a resume can't change at all, what it can't change silently, and what is the recipe's of now."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_opd.checkpoints.checksums import content_id
from megatron_opd.checkpoints.saved import find_checkpoint, read_state
from megatron_opd.data.identity import content_of, lengths_id, rollouts_id, scores_id
from megatron_opd.data.joined import show_stores
from megatron_opd.data.order import ORDER_FIELDS, order_settings
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import BRANCH, CheckpointError
from megatron_opd.model.architecture import Architecture
from megatron_opd.recipe.objective import LossConfig, RoundsConfig
from megatron_opd.recipe.rounds import RoundEntry, entry_of, read_entries
from megatron_opd.recipe.training_stages import TrainerConfig, TrainStage
from megatron_opd.records import ModelFingerprint

# Settings that decide which rollouts are in which step, and the one that decides how the optimizer's state is laid out.
_FIXED = {*ORDER_FIELDS, "distributed_optimizer"}
# Data and models are known by their content, wherever they lie and whatever their group in the store is called.
_BY_CONTENT = {
    "init",
    "store",
    "output",
    "teacher",
    "loss",
    "allow_incomplete",
    "allow_teacher_mismatch",
    "allow_stop_mismatch",
    "allow_off_policy",
}
_STATE: dict[str, type] = {"fixed": dict, "objective": dict, "settings": dict, "overrides": list}
# How far a model reads, not what it computes.
_NOT_THE_FUNCTION = ("max_positions",)
# Of a round: another one has others.
_OF_THE_ROUND = {"num_rollouts", "rollouts", "lengths", "scores", "init"}


@dataclass(frozen=True)
class RoundIdentity:
    """Which of several rounds a training is of: its entry in the state, without steps; the stores of the rounds before; what its student was
    converted from (None: not recorded, or the first round)."""

    entry: RoundEntry
    stores_before: list[str]
    converted_from: str | None

    @property
    def number(self) -> int:
        return self.entry.number


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
    round: RoundIdentity | None = None

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
    fixed = order_settings(config) | {"distributed_optimizer": config.distributed_optimizer}
    fixed |= {"num_rollouts": len(reader), "rollouts": rollouts_id(reader)}
    if config.global_batch_tokens is not None:
        fixed["lengths"] = lengths_id(reader, config)
    return RunIdentity(
        fixed=fixed,
        objective=objective,
        free=config.model_dump(mode="json", exclude=_BY_CONTENT | _FIXED),
        rollouts_and_scores=content_of(reader),
    )


def of_round(
    identity: RunIdentity,
    rounds: RoundsConfig,
    number: int,
    *,
    reader: StoreReader,
    init: ModelFingerprint,
    converted_from: str | None,
) -> RunIdentity:
    """`identity` as that of a round; how prompts are divided can't change, the rest of `rounds` is said."""
    entry = RoundEntry(
        number=number,
        store_id=reader.store_id,
        rollouts=identity.fixed["rollouts"],
        scores=identity.objective["scores"],
        student=init.weights_sha256,
    )
    shares = {"prompt_shares": rounds.count} if rounds.prompts == "slice" else {}
    before = [record.store_id for record in reader.manifest.lineage.rounds]
    return replace(
        identity,
        fixed=identity.fixed | shares,
        free=identity.free | {"rounds": rounds.model_dump(mode="json", exclude={"keep_alive"})},
        round=RoundIdentity(entry, before, converted_from),
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
    rounds: list[RoundEntry] = field(default_factory=list)  # up to that of now, of several
    begins_round: bool = False  # the checkpoint is the last of the round before

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))

    @property
    def finished_round(self) -> RoundEntry | None:
        """The round of now, if it has ended."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].last_step is not None else None


def plan_resume(
    name: str, config: TrainerConfig, now: RunIdentity, *, allow_changes: bool, damaged: Mapping[Path, str] | None = None
) -> Resumption:
    """What the newest whole checkpoint in the run's folder means for this run; `name` is the stage, `damaged` what is known of others.

    Raises CheckpointError if none is whole, if it is of a run with other data or another layout of the optimizer's state and, unless `allow_changes`,
    of one with another objective.
    """
    found = find_checkpoint(Path(config.output), damaged)
    if (checkpoint := found.checkpoint) is None:
        return Resumption(rounds=_first_round(now.round, config))
    state = read_state(checkpoint)
    wrong = [key for key, kind in _STATE.items() if not isinstance(state.get(key, kind()), kind)]
    if wrong or "fixed" not in state:
        raise CheckpointError(
            f"{checkpoint}: its state has no field {(wrong or ['fixed'])[0]!r} that can be read; write the name of another step folder into 'latest', or take another output"
        )
    rounds, begins = _place_of_round(checkpoint, state, now.round, found.notes)
    if rounds and rounds[-1].last_step is not None:
        return Resumption(checkpoint, state, rounds=rounds)
    if begins:
        now = replace(now, fixed=_without(now.fixed), objective=_without(now.objective))
    _check_fixed(checkpoint, state["fixed"], now, name, show_stores(config.store))
    free = dict(state.get("settings", {}))
    loss = free.pop("loss", None)  # where older versions put it
    objective = state.get("objective", {} if loss is None else {"loss": loss})
    new = _changes_of_objective(objective, now.objective)
    if new and not allow_changes:
        raise CheckpointError(
            f"{checkpoint}: {name} was started with a different objective: {', '.join(new)}; give the new run a folder of its own "
            f"({name}.output=...), or restore the old objective. --continue-with-changes proceeds in this folder, and is recorded permanently; {BRANCH}"
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
        rounds=rounds,
        begins_round=begins,
    )


def _without(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _OF_THE_ROUND}


def _first_round(now: RoundIdentity | None, config: TrainerConfig) -> list[RoundEntry]:
    if now is not None and now.number > 1:
        raise CheckpointError(
            f"{config.output}: no checkpoint of round {now.number - 1}, so round {now.number} can't begin; train that one first"
        )
    return [] if now is None else [now.entry.begun(0)]


def _place_of_round(checkpoint: Path, state: dict[str, Any], now: RoundIdentity | None, notes: list[str]) -> tuple[list[RoundEntry], bool]:
    """The rounds up to that of now as the checkpoint knows them, and whether that one begins there. Raises CheckpointError."""
    entries = read_entries(state, checkpoint)
    if now is None:
        if entries:
            raise CheckpointError(f"{checkpoint}: made in round {len(entries)} of several; give rounds.count as it was, or another output")
        return [], False
    if not entries:
        raise CheckpointError(
            f"{checkpoint}: made by a run without rounds; leave out rounds.count, or take another output (train.output=...)"
        )
    if (known := entry_of(entries, now.number)) is not None:
        if known.last_step is None or known.number == len(entries):
            _check_chain(checkpoint, entries, now)
        return entries[: now.number], False
    last = entries[-1]
    if last.number < now.number - 1 or last.last_step is None:
        first = last.number + (last.last_step is not None)
        raise CheckpointError(
            f"{checkpoint}: round {first} must end before round {now.number} begins{''.join(f' ({note})' for note in notes)}; "
            f"'megatron-opd train RECIPE --round {first}' goes on"
        )
    content = content_id(checkpoint)
    if content != now.converted_from:
        raise CheckpointError(
            f"round {now.number} was sampled from a student that was converted from a checkpoint of content {now.converted_from}, but round "
            f"{last.number} ended with {checkpoint} ({content}); 'megatron-opd convert trained RECIPE --round {last.number}' says whether they are one; if not, sample and score round {now.number} again"
        )
    _check_chain(checkpoint, entries, now)
    ended = replace(last, content=content)
    return [*entries[:-1], ended, now.entry.begun(int(state["step"]))], True


def _check_chain(checkpoint: Path, entries: list[RoundEntry], now: RoundIdentity) -> None:
    """Raise CheckpointError unless the rounds before this one are those that its store's lineage names."""
    trained = [entry.store_id for entry in entries[: now.number - 1]]
    if trained != now.stores_before:
        raise CheckpointError(
            f"{checkpoint}: trained on the stores {', '.join(trained) or 'none'} in the rounds before, but the student of round {now.number} went "
            f"through {', '.join(now.stores_before) or 'none'}; it is another run's"
        )


def _check_fixed(checkpoint: Path, before: dict[str, Any], now: RunIdentity, name: str, store: str) -> None:
    """Raise CheckpointError for what no resume can change."""
    wanted: dict[str, Any] = dict(now.fixed)
    if "rollouts" not in before:  # an older version's
        del wanted["rollouts"]
        wanted["store"] = now.rollouts_and_scores
    if "lengths" not in before:
        wanted.pop("lengths", None)
    for key, value in wanted.items():
        if before.get(key) == value:
            continue
        what = f"{key} = {before.get(key)!r}, now {value!r}"
        if key in ("store", "rollouts"):
            what = f"other rollouts{' or scores' if key == 'store' else ''} than {store} has now ({before.get(key)}, now {value})"
        if key == "lengths":
            what = f"rollouts of other lengths than {store} has now ({before.get(key)}, now {value}), so that steps would hold others"
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
