"""What a checkpoint's state says of its training, compared with a recipe; without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_opd.data.identity import scores_hash
from megatron_opd.data.joined import show_stores
from megatron_opd.pipeline.stores import Glance, differences, short
from megatron_opd.recipe.objective import RoundsConfig
from megatron_opd.recipe.rounds import RoundEntry
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.pipeline.states import Status

# Settings that say how a training runs, not what comes out of it.
_HOW_IT_RUNS = {
    "async_save",
    "deterministic",
    "drift",
    "keep_every",
    "keep_last",
    "log_every",
    "log_group",
    "log_name",
    "log_tags",
    "loggers",
    "loss_chunk_tokens",
    "max_engine_gap",
    "max_skipped_steps",
    "micro_batch_tokens",
    "optimizer_offload",
    "packing",
    "parallel",
    "process_group_minutes",
    "recompute",
    "recompute_modules",
    "save_every",
    "steps",
    "wandb_project",
}


def of_round(status: Status, entry: RoundEntry, steps: int) -> Status:
    """Steps of one round; one that has ended, be it early by drift, has all of its."""
    done = (status.done if entry.last_step is None else entry.last_step) - entry.steps_before
    return replace(status, done=done, total=steps if entry.last_step is None else done)


def as_of_round(state: dict[str, Any], entry: RoundEntry) -> dict[str, Any]:
    """A checkpoint's state with the data and the student of one of its rounds."""
    objective = {**state.get("objective", {}), "init": {"weights": entry.student}, "scores": entry.scores}
    return {**state, "fixed": {**state.get("fixed", {}), "rollouts": entry.rollouts}, "objective": objective}


def settings(state: dict[str, Any], config: TrainerConfig, rounds: RoundsConfig | None) -> list[str]:
    """Settings that change the result and are not what the checkpoint's were; `rounds` of a training in several."""
    how = _HOW_IT_RUNS - {"drift"} if rounds is not None and rounds.until == "drift" else _HOW_IT_RUNS
    there = {key: value for key, value in state.get("settings", {}).items() if key not in how}
    here = config.model_dump(mode="json")
    if rounds is not None:
        here["rounds"] = rounds.model_dump(mode="json", exclude={"keep_alive"})
    return differences(there, here)


def other_scores(objective: dict[str, Any], config: TrainerConfig, data: Glance, teacher: str | None, *, finished: bool) -> str | None:
    recorded = objective.get("scores")
    if teacher is None or recorded is None or (finished and not data.scores):  # scores that are gone are not others
        return None
    now = scores_hash(data.scores)
    if recorded == now:
        return None
    return f"the scores of {teacher!r} in {show_stores(config.store)} are others since ({short(recorded)} -> {short(now)})"


def differs(changed: list[str]) -> str | None:
    return f"differs from the recipe: {'; '.join(changed)}" if changed else None
