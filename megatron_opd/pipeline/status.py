"""How far each stage of a recipe is, from what lies on disk: done, partial, not started, or STALE with the reason.

Every stage keeps who its inputs were: a store its model, prompts and sampling; scores their teacher; a checkpoint its data, loss and settings; a
converted model its checkpoint; an evaluation all of these. Here they are compared with the recipe and the files of now. No torch, no Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.checksums import content_id
from megatron_opd.config import EvalStage, Recipe, SampleStage, TrainerConfig, TrainStage, require
from megatron_opd.data.calibration import read_calibration
from megatron_opd.data.identity import rollouts_id, scores_hash, sums_of
from megatron_opd.data.joined import open_training_stores, show_stores
from megatron_opd.data.joining import as_of, flat
from megatron_opd.data.location import Location
from megatron_opd.data.order import num_steps
from megatron_opd.errors import UserError
from megatron_opd.lineage import ORIGIN_FILE
from megatron_opd.pipeline.identities import Identities, Unread, selection_of
from megatron_opd.pipeline.inputs_record import inputs_difference
from megatron_opd.pipeline.stages import Stage, evaluation_of, list_stages, recipe_of
from megatron_opd.pipeline.stores import Glance, differences, glance, glance_at_all, prompt_difference, sampling_differences, short
from megatron_opd.records import ModelFingerprint, SamplingParams, StoreManifest
from megatron_opd.redact import public_address
from megatron_opd.saved import find_checkpoint, latest_checkpoint, read_state
from megatron_opd.untrusted import read_object

# Settings that say how a training runs, not what comes out of it.
_HOW_IT_RUNS = {
    "async_save",
    "deterministic",
    "drift",
    "keep_every",
    "keep_last",
    "log_every",
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
_FIXED = ("seed", "global_batch", "max_response_tokens")
# What each stage reads the results of.
_READS = {
    "sft": ("generate",),
    "sft-hf": ("sft",),
    "rollout": ("sft-hf",),
    "score": ("rollout",),
    "engines": ("rollout",),
    "train": ("rollout", "score"),
    "opd-hf": ("train",),
    "eval-sft": ("sft-hf",),
    "eval-opd": ("opd-hf", "eval-sft"),
}
# Their results are needed only until the next stage has made its own.
_PASSING = ("inputs", "generate", "sft", "rollout", "score", "engines", "train")


@dataclass(frozen=True)
class Status:
    """`done` of `total` parts or steps; a total of 0 is not known yet. `stale`: why it must be made again; `note`: what else to know."""

    stage: Stage
    unit: str
    where: str = ""
    done: int = 0
    total: int = 0
    stale: str | None = None
    note: str | None = None
    gone: bool = False  # and not needed: what was made of it is there
    outdated: bool = False  # and made again unasked, as that costs nothing

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.done

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return self.stale is None and not self.outdated and (self.finished or self.gone)

    @property
    def state(self) -> str:
        if self.stale is not None:
            return "STALE"
        if self.gone:
            return "not needed"
        if self.outdated:
            return "outdated"
        return "done" if self.finished else "partial" if self.done else "not started"

    @property
    def amount(self) -> str:
        return f"{self.done} of {self.total} {self.unit}" if self.total and self.unit else ""


class Survey:
    """Looks at the stages of one recipe."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.identities = Identities(recipe.run_dir)
        self._look: dict[str, Callable[[Stage, Recipe], Status]] = {
            "inputs": self._inputs,
            "generate": self._generated,
            "sft": lambda stage, recipe: self._trained(stage, recipe.sft),
            "sft-hf": lambda stage, recipe: self._converted(stage, recipe.sft.output, require(recipe.rollout, "rollout").model),
            "rollout": self._rolled_out,
            "score": self._scored,
            "engines": self._compared,
            "train": lambda stage, recipe: self._trained(stage, recipe.train),
            "opd-hf": lambda stage, recipe: self._converted(stage, recipe.train.output, recipe.eval.model if recipe.eval else None),
            "report": self._reported,
        }

    def stages(self) -> list[Status]:
        """The status of every stage, in order. Raises UserError if what one left behind is damaged."""
        found = [self.stage(stage) for stage in list_stages(self.recipe)]
        self.identities.save()
        return _mark_gone(_pass_on_staleness(found))

    def stage(self, stage: Stage) -> Status:
        """One stage by itself."""
        look = self._look.get(stage.name, self._evaluated)
        return look(stage, recipe_of(self.recipe, stage))

    def _model(self, directory: str) -> ModelFingerprint | None:
        return self.identities.model(directory)

    def _replaced(self, directory: str, weights: str | None) -> str | None:
        """What to say if the model in `directory` is another one than that of `weights`; nothing if either is not known."""
        try:
            model = self._model(directory)
        except Unread as unread:
            return f"{unread}; 'megatron-opd check RECIPE --stage inputs' reads them"
        if model is None or weights is None or model.weights_sha256 == weights:
            return None
        models = self.recipe.models
        trained = {
            models.teacher: "the teacher was replaced",
            models.student: "the base student was replaced",
            self.recipe.rollout.model if self.recipe.rollout else "": "the student was fine-tuned again",
            self.recipe.eval.model if self.recipe.eval else "": "the student was trained again",
        }
        return f"{trained.get(directory, f'{directory} is another model')} since ({short(weights)} -> {short(model.weights_sha256)})"

    def _inputs(self, stage: Stage, recipe: Recipe) -> Status:
        status = Status(stage, "")
        difference = inputs_difference(recipe, self.identities)
        if difference is None:
            return status
        return replace(status, done=1, total=1, outdated=bool(difference), note=difference or None)

    def _generated(self, stage: Stage, recipe: Recipe) -> Status:
        return self._sampled(stage, require(recipe.generate, "generate"), recipe.sft.max_response_tokens)

    def _rolled_out(self, stage: Stage, recipe: Recipe) -> Status:
        return self._sampled(stage, require(recipe.rollout, "rollout"), recipe.train.max_response_tokens)

    def _sampled(self, stage: Stage, config: SampleStage, longest: int | None) -> Status:
        status, found = Status(stage, "parts", public_address(config.store)), glance(config.store)
        if found is None:
            return status
        status = replace(status, done=len(found.parts), total=found.manifest.num_parts)
        if (why := self._replaced(config.model, found.manifest.sampler.weights_sha256)) is not None:
            return replace(status, stale=why)
        sampling = config.sampling
        if longest is not None and longest < sampling.max_new_tokens:  # as the stage does
            sampling = sampling.model_copy(update={"max_new_tokens": longest})
        newest: str | None = None
        for generation in range(len(found.manifest.extensions), -1, -1):  # an extended store is still what it was before
            then = as_of(found.manifest, generation)
            changed = sampling_differences(flat(then), config, sampling)
            if (prompts := self._other_prompts(flat(then), config)) is not None:
                changed.append(prompts)
            if not changed:
                return replace(status, done=sum(part < then.num_parts for part in found.parts), total=then.num_parts)
            newest = newest or f"{_differs(changed)}{self._hint(flat(then), config, sampling, changed)}"
        return replace(status, stale=newest)

    def _hint(self, there: StoreManifest, config: SampleStage, sampling: SamplingParams, changed: list[str]) -> str:
        """Whether what is new can be added to what is there."""
        more = sampling.samples_per_prompt - there.sampling.samples_per_prompt
        other = [text for text in changed if not text.startswith(("samples_per_prompt ", "prompts "))]
        selection = {**selection_of(config), "limit": there.prompts.num_prompts}
        now = self.identities.prompts(config.prompts, **selection_of(config))
        if other or more < 0 or now is None or now.num_prompts < there.prompts.num_prompts:
            return ""
        first = self.identities.prompts(config.prompts, **selection)
        if first is None or first.sha256 != there.prompts.sha256:
            return ""
        return "; it is the beginning of that, and --extend makes what is new alone"

    def _other_prompts(self, there: StoreManifest, config: SampleStage | EvalStage) -> str | None:
        return prompt_difference(there.prompts, self.identities.prompts(config.prompts, **selection_of(config)))

    def _scored(self, stage: Stage, recipe: Recipe) -> Status:
        config = recipe.score
        status, found = Status(stage, "parts", public_address(config.store)), glance(config.store, config.teacher)
        if found is None:
            return status
        status = replace(status, done=len(found.scores), total=found.manifest.num_parts)
        teachers = {record.teacher.weights_sha256 for record in found.scores.values()}
        if (why := next((why for weights in sorted(teachers) if (why := self._replaced(config.model, weights))), None)) is not None:
            return replace(status, stale=why)
        candidates = {record.top_k for record in found.scores.values()}
        return replace(status, stale=_differs([text for there in sorted(candidates) for text in differences(there, config.top_k, "top_k")]))

    def _compared(self, stage: Stage, recipe: Recipe) -> Status:
        store = require(recipe.rollout, "rollout").store
        status = Status(stage, "")
        if glance(store) is None or (record := read_calibration(Location(store))) is None:
            return status
        note = record.floor.describe() if record.floor is not None else record.skipped
        return replace(status, done=int(note is not None), total=1, note=note)

    def _trained(self, stage: Stage, config: TrainerConfig) -> Status:
        found = find_checkpoint(Path(config.output))
        state = read_state(found.checkpoint) if found.checkpoint else {}
        done = int(state.get("step", 0))
        teacher = config.teacher if isinstance(config, TrainStage) else None
        data = glance_at_all(config.store, teacher)  # may be gone when the run is finished
        steps = config.steps
        if steps is None and data is not None:
            steps = num_steps(data.num_rollouts, global_batch=config.global_batch, epochs=config.epochs)
        notes = found.notes[:-1]  # the last says which one is taken
        status = Status(stage, "steps", str(found.checkpoint or config.output), done, steps or int(state.get("steps", 0)))
        if found.checkpoint is None:
            return status
        stale = self._trained_otherwise(state, config, data, finished=status.finished)
        settings = _settings(state, config)
        if stale is None and status.finished:
            stale = _differs([*settings, *(differences(done, steps, "steps") if steps is not None and done > steps else [])])
        elif stale is None and settings:
            notes.append(f"goes on with other settings: {', '.join(settings)}")
        return replace(status, stale=stale, note="; ".join(notes) or None)

    def _trained_otherwise(self, state: dict[str, Any], config: TrainerConfig, data: Glance | None, *, finished: bool) -> str | None:
        """Why a checkpoint is not of the model, the rollouts and the loss that there are now; older ones don't say all of it."""
        objective, fixed = state.get("objective", {}), state.get("fixed", {})
        if (why := self._replaced(config.init, objective.get("init", {}).get("weights"))) is not None:
            return why
        wanted: dict[str, Any] = {key: getattr(config, key) for key in _FIXED}
        if isinstance(config, TrainStage):
            wanted["loss"] = config.loss.model_dump(mode="json")
        there = {**fixed, "loss": objective.get("loss", {})}
        if changed := differences({key: there[key] for key in wanted if key in there}, wanted):
            return _differs(changed)
        if data is None or not data.parts:
            return None
        teacher = config.teacher if isinstance(config, TrainStage) else None
        return self._other_rollouts(fixed, config, data, teacher) or _other_scores(objective, config, data, teacher, finished=finished)

    def _other_rollouts(self, fixed: dict[str, Any], config: TrainerConfig, data: Glance, teacher: str | None) -> str | None:
        if (recorded := fixed.get("rollouts")) is None:
            return None
        excluded = [[part, len(record.excluded), record.max_tokens] for part, record in data.scores.items()]
        key = f"rollouts {sums_of(data.parts)} {excluded}"
        now = self.identities.hash_of(key, lambda: rollouts_id(open_training_stores(config.store, teacher)))
        if recorded == now:
            return None
        return f"the rollouts in {show_stores(config.store)} are others since ({short(recorded)} -> {short(now)})"

    def _converted(self, stage: Stage, source: str, target: str | None) -> Status:
        if target is None:
            return Status(stage, "")
        status = Status(stage, "", target)
        if not (Path(target) / "config.json").exists():
            return status
        status = replace(status, done=1, total=1)
        origin, latest = _read(Path(target) / ORIGIN_FILE), latest_checkpoint(Path(source))
        if latest is None:
            return status
        of_this_run = str(Path(str(origin.get("checkpoint"))).parent) == str(latest.parent.absolute())
        if not of_this_run and not Path(target).absolute().is_relative_to(Path(self.recipe.run_dir).absolute()):
            return replace(status, note="made by something else than this run's training")
        made, now = origin.get("content"), content_id(latest)
        if None in (made, now) or made == now:
            return status
        step, steps = origin.get("step"), read_state(latest)["step"]
        return replace(status, stale=f"made of step {step} ({short(str(made))}); the checkpoint is of step {steps} now ({short(str(now))})")

    def _evaluated(self, stage: Stage, recipe: Recipe) -> Status:
        config = require(evaluation_of(recipe, stage.name.removeprefix("eval-")).eval, "eval")
        path, store = Path(config.output) / f"{config.name}.json", f"{config.output}/{config.name}.opd.zarr"
        status, record, found = Status(stage, "", str(path)), _read(path), glance(store)
        if record:
            status = replace(status, done=1, total=1)
        elif found is not None:
            status = replace(status, unit="parts sampled", done=len(found.parts), total=found.manifest.num_parts + 1)
        else:
            return status
        weights = record.get("model", {}).get("weights_sha256") or (found.manifest.sampler.weights_sha256 if found is not None else None)
        if (why := self._replaced(config.model, weights)) is not None:
            return replace(status, stale=why)
        changed = [] if found is None else sampling_differences(found.manifest, config, config.sampling)
        if found is not None and (prompts := self._other_prompts(found.manifest, config)) is not None:
            changed.append(prompts)
        if record:
            changed += differences(record.get("grader", "none"), config.grader, "grader")
            changed += differences(record.get("against", {}).get("name"), config.baseline, "baseline")
        if (stale := _differs(changed)) is None and config.teacher is not None:
            scored = glance(store, "teacher")
            for teacher in {entry.teacher.weights_sha256 for entry in scored.scores.values()} if scored else ():
                stale = stale or self._replaced(config.teacher, teacher)
        return replace(status, stale=stale)

    def _reported(self, stage: Stage, recipe: Recipe) -> Status:
        folder = Path(recipe.run_dir)
        page = folder / "report" / "report.html"
        status = Status(stage, "", str(page))
        if not page.exists():
            return status
        read = [*folder.glob("eval/*.json"), *folder.glob("*/metrics.jsonl")]
        newer = [path for path in read if path.stat().st_mtime_ns > page.stat().st_mtime_ns]
        return replace(status, done=1, total=1, outdated=bool(newer), note=f"{newer[0]} is newer" if newer else None)


def training_status(recipe: Recipe, name: str) -> Status:
    """How far 'sft' or 'train' is."""
    return Survey(recipe).stage(Stage(name, (name,), "train"))


def _settings(state: dict[str, Any], config: TrainerConfig) -> list[str]:
    """Settings that change the result and are not what the checkpoint's were."""
    there = {key: value for key, value in state.get("settings", {}).items() if key not in _HOW_IT_RUNS}
    return differences(there, config.model_dump(mode="json"))


def _other_scores(objective: dict[str, Any], config: TrainerConfig, data: Glance, teacher: str | None, *, finished: bool) -> str | None:
    recorded = objective.get("scores")
    if teacher is None or recorded is None or (finished and not data.scores):  # scores that are gone are not others
        return None
    now = scores_hash(data.scores)
    if recorded == now:
        return None
    return f"the scores of {teacher!r} in {show_stores(config.store)} are others since ({short(recorded)} -> {short(now)})"


def _differs(changed: list[str]) -> str | None:
    return f"differs from the recipe: {'; '.join(changed)}" if changed else None


def _pass_on_staleness(found: list[Status]) -> list[Status]:
    """What was made from something stale is stale, too."""
    by_name = {(status.stage.name, status.stage.round): number for number, status in enumerate(found)}
    for number, status in enumerate(found):
        if not status.done or status.stale:
            continue
        for name in _READS.get(status.stage.name, ()):
            before = by_name.get((name, status.stage.round), by_name.get((name, None)))
            if before is not None and found[before].stale:
                found[number] = replace(status, stale=f"{found[before].stage.label} is")
                break
    return found


def _mark_gone(found: list[Status]) -> list[Status]:
    """What is not there, and was read by stages that are done, is not needed any more."""
    for number in reversed(range(len(found))):
        status = found[number]
        if status.stage.name not in _PASSING or (status.done and not status.outdated):
            continue
        readers = [other for other in found[number + 1 :] if _reads(other.stage, status.stage)]
        if readers and all(other.settled for other in readers):
            found[number] = replace(status, gone=True, outdated=False)
    return found


def _reads(reader: Stage, read: Stage) -> bool:
    if read.name == "inputs":
        return reader.name in ("generate", "sft")
    if read.name == "engines":
        return reader.name == "train" and reader.round == read.round
    return read.name in _READS.get(reader.name, ()) and (reader.round in (read.round, None) or read.round is None)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none that can be read."""
    try:
        return read_object(path)
    except (OSError, UserError):
        return {}
