"""`megatron-opd progress`: how far each stage of a recipe is, from what lies on disk, and what was made from something that is another now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.config import STAGES, EvalStage, Recipe, SampleStage, ScoreStage, TrainerConfig
from megatron_opd.data.joined import open_training_stores, show_stores, training_stores_exist
from megatron_opd.data.location import Location
from megatron_opd.data.order import num_steps
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.lineage import ORIGIN_FILE, known_weights
from megatron_opd.redact import public_address
from megatron_opd.untrusted import read_object

NOT_FINISHED = 3  # exit code


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
        return f"{self.stage:<9} {state:<24} {self.where}{stale}"


def show_progress(recipe: Recipe, stage: str | None) -> int:
    """Print a line a stage (or of one stage); returns 0 if all of them are finished and none is stale, otherwise NOT_FINISHED.

    A stage that comes after a stale one is stale, too. Raises UserError.
    """
    progress: list[Progress] = []
    for name in [stage] if stage else STAGES:
        found = stage_progress(recipe, name)
        before = next((entry.stage for entry in progress if entry.stale), None)
        if before is not None and found.done and not found.stale:
            found = replace(found, stale=f"{before} is")
        progress.append(found)
        print(found)
    return 0 if all(entry.finished and not entry.stale for entry in progress) else NOT_FINISHED


def stage_progress(recipe: Recipe, stage: str) -> Progress:
    """How far one stage is. Raises UserError if what it left behind is damaged."""
    if stage == "sft":
        return _trained(stage, recipe.sft, teacher=None)
    if stage == "train":
        return _trained(stage, recipe.train, teacher=recipe.train.teacher)
    if stage == "score":
        return _scored(recipe.score)
    if stage == "eval":
        return _evaluated(recipe.eval, recipe)
    return _sampled(stage, recipe.generate if stage == "generate" else recipe.rollout, recipe)


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
    # May be gone when the run is finished.
    reader = open_training_stores(config.store, teacher) if training_stores_exist(config.store) else None
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
        return f"trained on the rollouts {recorded}, but {show_stores(config.store)} holds {now} now"
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


def _open(store: str) -> StoreReader | None:
    return StoreReader(store) if Location(store).read_attributes("") is not None else None
