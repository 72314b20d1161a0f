"""Rounds of rollout, score and train: the recipe as each of them sees it, and what a run records of them.

A round's student samples, the teacher scores, and training goes on where the round before ended. Steps are counted through all rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.errors import CheckpointError, ConfigError
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.safety.durable import make_folder, write_json

ROUND_FILE = "round.json"
_LARGEST_SEED = 1 << 63


def check_number(recipe: Recipe, number: int | None, command: str) -> int | None:
    """The round that `command` is for: None where the recipe has but one. Raises ConfigError for one that it has not, or none."""
    count = recipe.rounds.count
    if number is not None and number > count:
        raise ConfigError(f"--round {number}: the recipe has {count} round{'s' if count > 1 else ''} (rounds.count)")
    if count == 1:
        return None
    if number is None:
        raise ConfigError(
            f"the recipe has {count} rounds (rounds.count), and each has its own {command}: say which with --round N (1 to {count}), "
            "or let 'megatron-opd run' do all of them in order"
        )
    return number


def check_keep_alive(recipe: Recipe) -> None:
    """Raise ConfigError where one set of processes can't do all rounds."""
    require(recipe.rollout, "rollout")
    round_recipe(recipe, 1)
    if recipe.engine.urls:
        raise ConfigError(
            "engine.urls: a server at an address serves one model, but the rounds in one set of processes need student and teacher side by side; "
            "take --launch, or the transformers engine, or run each round's stages by themselves ('megatron-opd run' with rounds.keep_alive = false)"
        )


def check_share(recipe: Recipe, num_prompts: int) -> None:
    """Raise ConfigError where `num_prompts` are too few for a step of each round."""
    rounds, batch, samples = recipe.rounds, recipe.train.global_batch, require(recipe.rollout, "rollout").sampling.samples_per_prompt
    if rounds.count == 1 or rounds.prompts == "all":
        return
    if batch is None:  # in tokens, which nobody knows before they are sampled; training looks again
        return
    if (least := num_prompts // rounds.count * samples) < batch:
        raise ConfigError(
            f"rounds.count = {rounds.count}: {num_prompts} prompts leave a round {least} rollouts, fewer than train.global_batch = {batch}; "
            "take fewer rounds, more prompts or samples, a smaller batch, or rounds.prompts = 'all'"
        )


def round_folder(recipe: Recipe, number: int) -> Path:
    return Path(recipe.run_dir) / "rounds" / f"{number:03d}"


def round_steps(recipe: Recipe) -> int | None:
    """Optimizer steps of a round, at most; None where a single round takes `epochs` over its store."""
    steps = recipe.train.steps
    return recipe.rounds.steps or (None if steps is None else steps // recipe.rounds.count)


def student_after(recipe: Recipe, number: int | None) -> str:
    """Where the student that round `number` made is converted to: of the last one RUN_DIR/opd-hf."""
    if number is None or number == recipe.rounds.count:
        return f"{recipe.run_dir}/opd-hf"
    return str(round_folder(recipe, number) / "student-hf")


def round_recipe(recipe: Recipe, number: int | None) -> Recipe:
    """The recipe as round `number` (from 1) sees it; of a single round it is the recipe itself.

    A store of its own; from the second round on the student is that of the round before; its share of the prompts, or all of them; its
    own seed of sampling; train.steps are those of all rounds. Raises ConfigError.
    """
    if number is None or recipe.rounds.count == 1:
        return recipe
    if not 1 <= number <= recipe.rounds.count:
        raise ConfigError(f"round {number}: the recipe has {recipe.rounds.count} rounds")
    sampling = require(recipe.rollout, "rollout")
    _check_places(recipe)
    store, tree = str(round_folder(recipe, number) / "rollouts.opd.zarr"), recipe.model_dump()
    for section in ("rollout", "score", "train"):
        tree[section]["store"] = store
    tree["rollout"]["sampling"]["seed"] = (sampling.sampling.seed + number - 1) % _LARGEST_SEED
    if recipe.rounds.prompts == "slice":
        tree["rollout"]["share"] = (number, recipe.rounds.count)
    if number > 1:
        tree["rollout"]["model"] = tree["train"]["init"] = student_after(recipe, number - 1)
        tree["rollout"]["sft_teacher"] = None  # the student's lineage has it
    tree["train"]["steps"] = recipe.rounds.count * (round_steps(recipe) or 0)
    return Recipe.model_validate(tree)


def _check_places(recipe: Recipe) -> None:
    """Raise ConfigError for fields that rounds fill in themselves, and which were given otherwise."""
    sampling, usual = require(recipe.rollout, "rollout"), f"{recipe.run_dir}/rollouts.opd.zarr"
    wrong = [
        f"{name}.store = {store}"
        for name, store in (("rollout", sampling.store), ("score", recipe.score.store), ("train", recipe.train.store))
        if store not in (usual, [usual])
    ]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: each round has its own store ({recipe.run_dir}/rounds/NNN); leave the field out")
    if sampling.share is not None:
        raise ConfigError("rollout.share: rounds divide the prompts themselves (rounds.prompts); leave the field out")
    if sampling.model != recipe.train.init:
        raise ConfigError(
            f"rollout.model = {sampling.model}, but train.init = {recipe.train.init}: the first round's student must be the one that is trained; make them one"
        )


@dataclass(frozen=True)
class RoundEntry:
    """A round in a checkpoint's state. `last_step` is None until the round has ended, `content` (of its last checkpoint) until the next begins.

    `rollouts` and `scores` are hashes of what it was trained on, `student` the weights that sampled it.
    """

    number: int
    store_id: str
    rollouts: str
    scores: str
    student: str
    first_step: int | None = None  # from 1
    last_step: int | None = None
    ended_by: str | None = None  # "steps" or "drift"
    content: str | None = None

    @property
    def steps_before(self) -> int:
        return (self.first_step or 1) - 1

    def begun(self, steps_before: int) -> RoundEntry:
        return replace(self, first_step=steps_before + 1)

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


_TYPES = {
    "number": int, "store_id": str, "rollouts": str, "scores": str, "student": str, "first_step": int, "last_step": int, "ended_by": str,
    "content": str,
}  # fmt: skip
_NEEDED = ("number", "store_id", "rollouts", "scores", "student", "first_step")


def read_entries(state: dict[str, Any], where: str | Path) -> list[RoundEntry]:
    """The rounds of a checkpoint's state, in order; none where it is of a run without. Raises CheckpointError."""
    found = state.get("rounds", [])
    entries: list[RoundEntry] = []
    for number, entry in enumerate(found if isinstance(found, list) else [found], 1):
        wrong = not isinstance(entry, dict) or any(key not in entry for key in _NEEDED)
        if wrong or any(key not in _TYPES or type(value) is not _TYPES[key] for key, value in entry.items()) or entry["number"] != number:
            raise CheckpointError(f"{where}: its state has an entry of rounds that can't be read ({entry!r:.100}); use another step folder")
        entries.append(RoundEntry(**entry))
    return entries


def entry_of(entries: Sequence[RoundEntry], number: int) -> RoundEntry | None:
    return entries[number - 1] if 0 < number <= len(entries) else None


def write_round(recipe: Recipe, entry: RoundEntry, content: str | None) -> None:
    """Put a round that has ended, with its last checkpoint's content, into its folder, unless it is there."""
    path = round_folder(recipe, entry.number) / ROUND_FILE
    record = replace(entry, content=content or entry.content).record()
    make_folder(path.parent)
    write_json(path, record)
