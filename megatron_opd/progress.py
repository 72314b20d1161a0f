"""`megatron-opd progress`: how far each stage of a recipe is, from what lies on disk; for people, and for job scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_opd.config import STAGES, Recipe, SampleStage, TrainerConfig
from megatron_opd.data.location import Location
from megatron_opd.data.order import num_steps
from megatron_opd.data.store import StoreReader

NOT_FINISHED = 3  # exit code


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts or steps; a total of 0 is not known yet."""

    stage: str
    done: int
    total: int
    unit: str
    where: str

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.done

    def __str__(self) -> str:
        state = f"{self.done} of {self.total} {self.unit}" if self.total else "not started"
        return f"{self.stage:<9} {state:<24} {self.where}"


def show_progress(recipe: Recipe, stage: str | None) -> int:
    """Print a line a stage (or of one stage); returns 0 if all of them are finished, otherwise NOT_FINISHED. Raises UserError."""
    progress = [stage_progress(recipe, name) for name in ([stage] if stage else STAGES)]
    for line in progress:
        print(line)
    return 0 if all(entry.finished for entry in progress) else NOT_FINISHED


def stage_progress(recipe: Recipe, stage: str) -> Progress:
    """How far one stage is. Raises UserError if what it left behind is damaged."""
    if stage == "sft":
        return _trained(stage, recipe.sft)
    if stage == "train":
        return _trained(stage, recipe.train)
    if stage == "score":
        return _scored(recipe.score.store, recipe.score.teacher)
    if stage == "eval":
        return _evaluated(recipe)
    return _sampled(stage, recipe.generate if stage == "generate" else recipe.rollout)


def _sampled(stage: str, config: SampleStage | None) -> Progress:
    if config is None:
        return Progress(stage, 0, 0, "parts", "(no such section in the recipe)")
    reader = _open(config.store)
    return Progress(stage, len(reader.parts) if reader else 0, reader.manifest.num_parts if reader else 0, "parts", config.store)


def _scored(store: str, teacher: str) -> Progress:
    reader = _open(store)
    if reader is None:
        return Progress("score", 0, 0, "parts", store)
    return Progress("score", len(reader.parts) - len(reader.unscored_parts(teacher)), reader.manifest.num_parts, "parts", store)


def _trained(stage: str, config: TrainerConfig) -> Progress:
    from megatron_opd.train.saved import latest_checkpoint, read_state  # torch's import takes seconds

    checkpoint = latest_checkpoint(Path(config.output))
    state = read_state(checkpoint) if checkpoint else {}
    steps = config.steps
    if steps is None:
        reader = _open(config.store)  # may be gone when the run is finished
        steps = num_steps(len(reader), global_batch=config.global_batch, epochs=config.epochs) if reader else int(state.get("steps", 0))
    return Progress(stage, int(state.get("step", 0)), steps, "steps", str(checkpoint or config.output))


def _evaluated(recipe: Recipe) -> Progress:
    if recipe.eval is None:
        return Progress("eval", 0, 0, "models", "(no such section in the recipe)")
    result = Path(recipe.eval.output) / f"{recipe.eval.name}.json"
    return Progress("eval", int(result.exists()), 1, "models", str(result))


def _open(store: str) -> StoreReader | None:
    return StoreReader(store) if Location(store).read_attributes("") is not None else None
