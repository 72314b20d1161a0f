"""`megatron-opd progress`: how far each stage of a recipe is, from what lies on disk, and what was made from something that is another now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.config import STAGES, EvalStage, Recipe, SampleStage, ScoreStage, TrainerConfig
from megatron_opd.data.location import Location
from megatron_opd.data.order import num_steps
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.lineage import ORIGIN_FILE, known_weights
from megatron_opd.redact import public_address
from megatron_opd.rounds import entry_of, read_entries, round_recipe, round_steps
from megatron_opd.untrusted import read_object

NOT_FINISHED = 3  # exit code
_IN_ROUNDS = ("rollout", "score", "train")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts or steps; a total of 0 is not known yet. `stale`: why what is done must be made again."""

    stage: str
    done: int
    total: int
    unit: str
    where: str
    stale: str | None = None

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.done

    def __str__(self) -> str:
        state = f"{self.done} of {self.total} {self.unit}" if self.total else "not started"
        stale = f"  STALE: {self.stale}" if self.stale else ""
        return f"{self.stage:<10} {state:<24} {self.where}{stale}"


def show_progress(recipe: Recipe, stage: str | None, number: int | None = None) -> int:
    """Print a line a stage (or of one stage, or of one round); returns 0 if all of them are finished and none is stale, otherwise NOT_FINISHED.

    A stage that comes after a stale one is stale, too. Raises UserError.
    """
    progress: list[Progress] = []
    for name, of in _stages(recipe, stage, number):
        found = stage_progress(recipe, name, of)
        before = next((entry.stage for entry in progress if entry.stale), None)
        if before is not None and found.done and not found.stale:
            found = replace(found, stale=f"{before} is")
        progress.append(found)
        print(found)
    return 0 if all(entry.finished and not entry.stale for entry in progress) else NOT_FINISHED


def _stages(recipe: Recipe, stage: str | None, number: int | None) -> list[tuple[str, int | None]]:
    """Stages in order, each with its round: those of the student's rounds as often as there are rounds, or of round `number` alone."""
    if recipe.rounds.count == 1:
        return [(name, None) for name in ([stage] if stage else STAGES)]
    rounds = [(name, of) for of in ([number] if number else range(1, recipe.rounds.count + 1)) for name in _IN_ROUNDS]
    before, after = (STAGES[: STAGES.index(_IN_ROUNDS[0])], STAGES[STAGES.index(_IN_ROUNDS[-1]) + 1 :]) if number is None else ((), ())
    found: list[tuple[str, int | None]] = [*((name, None) for name in before), *rounds, *((name, None) for name in after)]
    return [(name, of) for name, of in found if stage in (None, name)]


def stage_progress(recipe: Recipe, stage: str, number: int | None = None) -> Progress:
    """How far one stage is, in round `number` of several. Raises UserError if what it left behind is damaged."""
    if number is not None and stage in _IN_ROUNDS:
        found = _round_progress(recipe, stage, number)
        return replace(found, stage=f"{stage}@{number}")
    if stage == "sft":
        return _trained(stage, recipe.sft, teacher=None)
    if stage == "train":
        return _trained(stage, recipe.train, teacher=recipe.train.teacher)
    if stage == "score":
        return _scored(recipe.score)
    if stage == "eval":
        return _evaluated(recipe.eval, recipe)
    return _sampled(stage, recipe.generate if stage == "generate" else recipe.rollout, recipe)


def _round_progress(recipe: Recipe, stage: str, number: int) -> Progress:
    seen = round_recipe(recipe, number)
    if stage == "score":
        return _scored(seen.score)
    if stage == "rollout":
        return _sampled(stage, seen.rollout, seen)
    from megatron_opd.train.identity import rollouts_id
    from megatron_opd.train.saved import find_checkpoint, read_state  # torch's import takes seconds

    total, found = round_steps(recipe) or 0, find_checkpoint(Path(seen.train.output))
    if found.checkpoint is None:
        return Progress(stage, 0, total, "steps", seen.train.output)
    state = read_state(found.checkpoint)
    entry = entry_of(read_entries(state, found.checkpoint), number)
    where = "; ".join([str(found.checkpoint), *found.notes[:-1]])
    if entry is None:
        return Progress(stage, 0, total, "steps", where)
    done = (state["step"] if entry.last_step is None else entry.last_step) - entry.steps_before
    stale = _other_model("trained from", entry.student, seen.train.init)
    reader = _open(seen.train.store, seen.train.teacher)
    if stale is None and reader is not None and entry.rollouts != (now := rollouts_id(reader)):
        stale = f"trained on the rollouts {entry.rollouts}, but {public_address(seen.train.store)} holds {now} now"
    return Progress(stage, done, total if entry.last_step is None else done, "steps", where, stale)


def _sampled(stage: str, config: SampleStage | None, recipe: Recipe) -> Progress:
    if config is None:
        return Progress(stage, 0, 0, "parts", "(no such section in the recipe)")
    reader = _open(config.store)
    if reader is None:
        return Progress(stage, 0, 0, "parts", public_address(config.store))
    stale = _other_model("sampled from", reader.manifest.sampler.weights_sha256, config.model)
    if stage == "rollout":
        stale = _trained_since(config.model, recipe.sft) or stale
    return Progress(stage, len(reader.parts), reader.manifest.num_parts, "parts", public_address(config.store), stale)


def _scored(config: ScoreStage) -> Progress:
    reader = _open(config.store)
    if reader is None:
        return Progress("score", 0, 0, "parts", public_address(config.store))
    records = (reader.score_manifest(part, config.teacher) for part in reader.parts)
    teachers = {record.teacher.weights_sha256 for record in records if record is not None}
    stale = next((why for weights in sorted(teachers) if (why := _other_model("scored by", weights, config.model))), None)
    scored = len(reader.parts) - len(reader.unscored_parts(config.teacher))
    return Progress("score", scored, reader.manifest.num_parts, "parts", public_address(config.store), stale)


def _trained(stage: str, config: TrainerConfig, *, teacher: str | None) -> Progress:
    from megatron_opd.train.saved import find_checkpoint, read_state  # torch's import takes seconds

    found = find_checkpoint(Path(config.output))
    checkpoint = found.checkpoint
    state = read_state(checkpoint) if checkpoint else {}
    reader = _open(config.store, teacher)  # may be gone when the run is finished
    steps = config.steps
    if steps is None:
        steps = num_steps(len(reader), global_batch=config.global_batch, epochs=config.epochs) if reader else int(state.get("steps", 0))
    where = "; ".join([str(checkpoint or config.output), *found.notes[:-1]])  # the last says which one is taken
    return Progress(stage, int(state.get("step", 0)), steps, "steps", where, _trained_on_others(state, config, reader))


def _trained_on_others(state: dict[str, Any], config: TrainerConfig, reader: StoreReader | None) -> str | None:
    """Why a run's checkpoint is not of the model and the rollouts that are there now; older checkpoints don't say."""
    from megatron_opd.train.identity import rollouts_id

    init = state.get("objective", {}).get("init", {}).get("weights")
    recorded = state.get("fixed", {}).get("rollouts")
    if (why := _other_model("trained from", init, config.init)) is not None:
        return why
    if reader is not None and recorded is not None and recorded != (now := rollouts_id(reader)):
        return f"trained on the rollouts {recorded}, but {public_address(config.store)} holds {now} now"
    return None


def _evaluated(config: EvalStage | None, recipe: Recipe) -> Progress:
    if config is None:
        return Progress("eval", 0, 0, "models", "(no such section in the recipe)")
    path = Path(config.output) / f"{config.name}.json"
    if not path.exists():
        return Progress("eval", 0, 1, "models", str(path))
    stale = _other_model("of the model", _read(path).get("model", {}).get("weights_sha256"), config.model)
    if config.model not in (recipe.models.teacher, recipe.models.student):
        stale = _trained_since(config.model, recipe.train) or stale
    return Progress("eval", 1, 1, "models", str(path), stale)


def _other_model(done: str, weights: str | None, directory: str) -> str | None:
    """What differs, if the model in `directory` is known to be another one than that of `weights`."""
    now = known_weights(directory)
    if weights is None or now is None or weights == now:
        return None
    return f"{done} {weights[:12]}, but {directory} is {now[:12]} now"


def _trained_since(directory: str, config: TrainerConfig) -> str | None:
    """What differs, if `directory` was converted from an earlier checkpoint of the run than its latest."""
    from megatron_opd.checksums import content_id
    from megatron_opd.train.saved import latest_checkpoint

    origin, latest = _read(Path(directory) / ORIGIN_FILE), latest_checkpoint(Path(config.output))
    run = str((Path(config.output) / "checkpoints").absolute())
    if latest is None or str(Path(str(origin.get("checkpoint"))).parent) != run:
        return None
    made, now = origin.get("content"), content_id(latest)
    return (
        None
        if None in (made, now) or made == now
        else f"{directory} is of step {origin.get('step')} ({made}), and {latest} ({now}) is newer"
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none that can be read."""
    try:
        return read_object(path)
    except (OSError, UserError):
        return {}


def _open(store: str, teacher: str | None = None) -> StoreReader | None:
    return StoreReader(store, teacher=teacher) if Location(store).read_attributes("") is not None else None
