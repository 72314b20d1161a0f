"""How far each stage of a recipe is, from what lies on disk: done, partial, not started, or STALE with the reason.

Every stage keeps who its inputs were: a store its model, prompts and sampling; scores their teacher; a checkpoint its data, loss and settings; a
converted model its checkpoint; an evaluation all of these. Here they are compared with the recipe and the files of now. No torch, no Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.checksums import content_id
from megatron_opd.checkpoints.saved import find_checkpoint, latest_checkpoint, read_state
from megatron_opd.data.calibration import read_calibration, servers_differ
from megatron_opd.data.identity import rollouts_id, sums_of
from megatron_opd.data.joined import open_training_stores, show_stores
from megatron_opd.data.joining import as_of, flat
from megatron_opd.data.location import Location
from megatron_opd.data.manifests import source_id
from megatron_opd.data.order import TrainingOrder, num_steps, order_settings
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.evaluate.chosen import code_refusal
from megatron_opd.evaluate.grade import GRADING
from megatron_opd.evaluate.run_files import evaluation_files
from megatron_opd.hf.lineage import ORIGIN_FILE
from megatron_opd.pipeline.identities import Identities, Unread, selection_of
from megatron_opd.pipeline.inputs_record import inputs_difference
from megatron_opd.pipeline.stages import Stage, evaluation_at, list_stages, recipe_of
from megatron_opd.pipeline.states import Status, mark_gone, pass_on_staleness, quarantined
from megatron_opd.pipeline.stores import Glance, differences, glance, glance_at_all, prompt_difference, sampling_differences, short
from megatron_opd.pipeline.trainings import as_of_round, differs, of_round, other_scores, settings
from megatron_opd.recipe.config import Recipe, SampleStage, require
from megatron_opd.recipe.evaluation import Evaluation
from megatron_opd.recipe.rounds import ROUND_FILE, entry_of, read_entries, round_folder, round_steps, student_after
from megatron_opd.recipe.training_stages import TrainerConfig, TrainStage
from megatron_opd.records import ModelFingerprint, SamplingParams
from megatron_opd.safety.redact import public_address
from megatron_opd.safety.untrusted import read_object
from megatron_opd.store_records import StoreManifest


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
            "derive": self._derived,
            "engines": self._compared,
            "train": lambda stage, recipe: self._trained(stage, recipe.train),
            "opd-hf": lambda stage, recipe: self._converted(stage, recipe.train.output, student_after(self.recipe, stage.round)),
            "report": self._reported,
        }

    def stages(self, begin: int = 0) -> list[Status]:
        """The status of every stage, in order; what is made from stale ones before number `begin` is not stale for that.

        Raises UserError if what a stage left behind is damaged.
        """
        found = [self.stage(stage) for stage in list_stages(self.recipe)]
        self.identities.save()
        return mark_gone(pass_on_staleness(found, self.recipe, begin), self.recipe)

    def stage(self, stage: Stage) -> Status:
        """One stage by itself."""
        look = self._look.get(stage.name, self._evaluated)
        return look(stage, recipe_of(self.recipe, stage))

    def _model(self, directory: str) -> ModelFingerprint | None:
        return self.identities.model(directory)

    def _another(self, directory: str, recorded: ModelFingerprint) -> str | None:
        """As `_replaced`, for a store, which is refused if anything of its model's files is another."""
        if (why := self._replaced(directory, recorded.weights_sha256, recorded.tokenizer.vocab_sha256)) is not None:
            return why
        model = self._model(directory)
        if model is None:
            return None
        for what, there, here in (
            ("chat template", recorded.tokenizer.chat_template_sha256, model.tokenizer.chat_template_sha256),
            ("config.json", recorded.config_sha256, model.config_sha256),
        ):
            if there != here:
                return f"the {what} of {directory} is another since ({short(there or 'none')} -> {short(here or 'none')})"
        return None

    def _replaced(self, directory: str, weights: str | None, tokens: str | None = None) -> str | None:
        """What to say if the model in `directory` is another one than that of `weights`, or reads other `tokens`; nothing if they are not known."""
        try:
            model = self._model(directory)
        except Unread as unread:
            return f"{unread}; 'megatron-opd check RECIPE --stage inputs' reads them"
        if model is None or weights is None:
            return None
        if model.weights_sha256 == weights:
            now = model.tokenizer.vocab_sha256
            return (
                None
                if tokens in (None, now)
                else f"the table of tokens of {directory} is another since ({short(str(tokens))} -> {short(now)})"
            )
        models = self.recipe.models
        trained = {
            models.teacher: "the teacher was replaced",
            self.recipe.rollout.model if self.recipe.rollout else "": "the student was fine-tuned again",
            **{student_after(self.recipe, number): "the student was trained again" for number in range(1, self.recipe.rounds.count + 1)},
        }
        return f"{trained.get(directory, f'{directory} is another model')} since ({short(weights)} -> {short(model.weights_sha256)})"

    def _inputs(self, stage: Stage, recipe: Recipe) -> Status:
        status = Status(stage, "", note=code_refusal(recipe.eval))
        difference = inputs_difference(recipe, self.identities)
        if difference is None:
            return status
        return replace(status, done=1, total=1, outdated=bool(difference), note=difference or status.note)

    def _generated(self, stage: Stage, recipe: Recipe) -> Status:
        return self._sampled(stage, require(recipe.generate, "generate"), recipe.sft.max_response_tokens)

    def _rolled_out(self, stage: Stage, recipe: Recipe) -> Status:
        return self._sampled(stage, require(recipe.rollout, "rollout"), recipe.train.max_response_tokens)

    def _sampled(self, stage: Stage, config: SampleStage, longest: int | None) -> Status:
        status, found = Status(stage, "parts", public_address(config.store)), glance(config.store)
        if found is None:
            return status
        status = replace(status, done=len(found.parts), total=found.manifest.num_parts)
        if (why := self._another(config.model, found.manifest.sampler)) is not None:
            return replace(status, stale=why)
        status = quarantined(status, [entry for record in found.parts.values() for entry in record.excluded], found, config.max_quarantined)
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
            newest = newest or f"{differs(changed)}{self._hint(flat(then), config, sampling, changed)}"
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

    def _other_prompts(self, there: StoreManifest, config: SampleStage | Evaluation) -> str | None:
        return prompt_difference(there.prompts, self.identities.prompts(config.prompts, **selection_of(config)))

    def _scored(self, stage: Stage, recipe: Recipe) -> Status:
        config = recipe.score
        status, found = Status(stage, "parts", public_address(config.store)), glance(config.store, config.teacher)
        if found is None:
            return status
        status = replace(status, done=len(found.scores), total=found.manifest.num_parts)
        if (why := self._other_teacher(config.model, found)) is not None:
            return replace(status, stale=why)
        status = quarantined(
            status, [entry for record in found.scores.values() for entry in record.excluded], found, config.max_quarantined
        )
        candidates = {record.top_k for record in found.scores.values()}
        return replace(status, stale=differs([text for there in sorted(candidates) for text in differences(there, config.top_k, "top_k")]))

    def _derived(self, stage: Stage, recipe: Recipe) -> Status:
        config = recipe.score
        status, source = Status(stage, "parts", public_address(config.store)), glance(config.store, config.teacher)
        if source is None:
            return status
        status = replace(status, total=source.manifest.num_parts * len(config.derived))
        for name, section in config.derived.items():
            found, wanted = glance(config.store, name), section.derivation(config.teacher)
            records = [] if found is None else list(found.scores.values())
            status = replace(status, done=status.done + len(records))
            for derived in (record.derived for record in records):
                if derived is None:
                    return replace(status, stale=f"{name!r} are scores of a model; give the derived teacher another name")
                if changed := differences(derived.derivation.model_dump(), wanted.model_dump()):
                    return replace(status, stale=differs([f"{name}: {text}" for text in changed]))
            if any(record.derived and record.derived.source_id != source_id(source.parts, source.scores) for record in records):
                status = replace(status, outdated=True, note=f"the scores that {name!r} is made of are others since")
        return status

    def _other_teacher(self, directory: str, found: Glance) -> str | None:
        """What to say if scores are of another model than the one in `directory`."""
        teachers = {(record.teacher.weights_sha256, record.teacher.tokenizer.vocab_sha256) for record in found.scores.values()}
        return next((why for weights, tokens in sorted(teachers) if (why := self._replaced(directory, weights, tokens))), None)

    def _compared(self, stage: Stage, recipe: Recipe) -> Status:
        store = require(recipe.rollout, "rollout").store
        status = Status(stage, "")
        if (found := glance(store)) is None or (record := read_calibration(Location(store))) is None:
            return status
        if (other := servers_differ(record, found.manifest.sampler.weights_sha256, recipe.train.max_engine_gap)) is not None:
            return replace(status, total=1, note=other)
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
            if config.global_batch is not None:
                steps = num_steps(data.num_rollouts, step=config.global_batch, epochs=config.epochs)
            elif data.num_rollouts:  # in tokens the lengths are needed
                steps = TrainingOrder.of(_reader(config, teacher), config).num_steps(config.epochs)
        notes = found.notes[:-1]  # the last says which one is taken
        status = Status(stage, "steps", str(found.checkpoint or config.output), done, steps or int(state.get("steps", 0)))
        if found.checkpoint is None:
            return replace(status, total=round_steps(self.recipe) or 0) if stage.round is not None else status
        ended, entries = status.finished, read_entries(state, found.checkpoint)
        if stage.name == "train" and bool(entries) != (stage.round is not None):
            return replace(
                status, stale=f"made {'in rounds' if entries else 'without rounds'}, but rounds.count = {self.recipe.rounds.count}"
            )
        if stage.round is not None:
            if (entry := entry_of(entries, stage.round)) is None:
                return replace(status, done=0, total=round_steps(self.recipe) or 0, note="; ".join(notes) or None)
            status, steps = of_round(status, entry, round_steps(self.recipe) or 0), None
            state = as_of_round(state, entry)
            ended = len(entries) == self.recipe.rounds.count and entries[-1].last_step is not None
            if entry.last_step is not None and not (round_folder(self.recipe, stage.round) / ROUND_FILE).exists():
                status = replace(status, outdated=True)  # a kill came before it was written
        stale = self._trained_otherwise(state, config, data, finished=status.finished)
        changed = settings(state, config, None if stage.round is None else self.recipe.rounds)
        if stale is None and ended:
            stale = differs([*changed, *(differences(done, steps, "steps") if steps is not None and done > steps else [])])
        elif stale is None and changed:
            notes.append(f"goes on with other settings: {', '.join(changed)}")
        return replace(status, stale=stale, note="; ".join(notes) or None)

    def _trained_otherwise(self, state: dict[str, Any], config: TrainerConfig, data: Glance | None, *, finished: bool) -> str | None:
        """Why a checkpoint is not of the model, the rollouts and the loss that there are now; older ones don't say all of it."""
        objective, fixed = state.get("objective", {}), state.get("fixed", {})
        for role, directory in (("init", config.init), ("teacher", self._teacher_of(config))):
            known = objective.get(role, {}) if directory is not None else {}
            if directory is not None and (why := self._replaced(directory, known.get("weights"), known.get("tokens"))) is not None:
                return why
        wanted = order_settings(config)
        if not finished:
            wanted["distributed_optimizer"] = config.distributed_optimizer  # no result depends on it, but no resume can change it
        if isinstance(config, TrainStage):
            wanted["loss"] = config.loss.model_dump(mode="json")
        there = {**fixed, "loss": objective.get("loss", {})}
        if changed := differences({key: there[key] for key in wanted if key in there}, wanted):
            return differs(changed)
        if data is None or not data.parts:
            return None
        teacher = config.teacher if isinstance(config, TrainStage) else None
        return self._other_rollouts(fixed, config, data, teacher) or other_scores(objective, config, data, teacher, finished=finished)

    def _teacher_of(self, config: TrainerConfig) -> str | None:
        """The directory of the teacher that a training learns from, None where the recipe does not say."""
        if isinstance(config, TrainStage):
            scoring = self.recipe.score
            return scoring.model if config.teacher in (scoring.teacher, *scoring.derived) else None
        return self.recipe.generate.model if self.recipe.generate is not None else None

    def _other_rollouts(self, fixed: dict[str, Any], config: TrainerConfig, data: Glance, teacher: str | None) -> str | None:
        if (recorded := fixed.get("rollouts")) is None:
            return None
        excluded = [[part, len(record.excluded), record.max_tokens] for part, record in data.scores.items()]
        key = f"rollouts {sums_of(data.parts)} {excluded}"
        now = self.identities.hash_of(key, lambda: rollouts_id(_reader(config, teacher)))
        if recorded == now:
            return None
        return f"the rollouts in {show_stores(config.store)} are others since ({short(recorded)} -> {short(now)})"

    def _converted(self, stage: Stage, source: str, target: str) -> Status:
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
        state = read_state(latest)
        step, now = state["step"], content_id(latest)
        if stage.round is not None:
            if (entry := entry_of(read_entries(state, latest), stage.round)) is None or entry.last_step is None:
                return replace(status, stale=f"round {stage.round} has not ended")
            step, now = entry.last_step, entry.content or now
        made, of_step = origin.get("content"), origin.get("step")
        if None in (made, now) or made == now:
            return status
        if stage.round is not None and step == of_step:  # a last checkpoint that was made again has other bytes: the conversion compares
            return replace(status, outdated=True, note="the checkpoint was saved again")
        return replace(
            status, stale=f"made of step {of_step} ({short(str(made))}); the checkpoint is of step {step} now ({short(str(now))})"
        )

    def _evaluated(self, stage: Stage, recipe: Recipe) -> Status:
        config = evaluation_at(recipe, stage)
        path, store = config.record, config.store
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
        if found is not None and (why := self._another(config.model, found.manifest.sampler)) is not None:
            return replace(status, stale=why)
        changed = [] if found is None else sampling_differences(found.manifest, config, config.sampling)
        if found is not None and (prompts := self._other_prompts(found.manifest, config)) is not None:
            changed.append(prompts)
        if (stale := differs(changed)) is None and config.teacher is not None and (scored := glance(store, "teacher")) is not None:
            stale = self._other_teacher(config.teacher, scored)
        again = _other_figures(record, config) if record else []
        return replace(
            status, stale=stale, outdated=bool(again), note=f"made again from the same samples: {'; '.join(again)}" if again else None
        )

    def _reported(self, stage: Stage, recipe: Recipe) -> Status:
        folder = Path(recipe.run_dir)
        page = folder / "report" / "report.html"
        status = Status(stage, "", str(page))
        if not page.exists():
            return status
        outputs = [Path(recipe.sft.output), Path(recipe.train.output)]
        read = [*evaluation_files(folder), *(path for output in outputs if (path := output / "metrics.jsonl").exists())]
        newer = [path for path in read if path.stat().st_mtime_ns > page.stat().st_mtime_ns]
        return replace(status, done=1, total=1, outdated=bool(newer), note=f"{newer[0]} is newer" if newer else None)


def _reader(config: TrainerConfig, teacher: str | None) -> StoreReader:
    """The rollouts of a training. That a derived teacher is stale is what the stage 'derive' says, and mends."""
    return open_training_stores(config.store, teacher, allow_stale=True)


def _other_figures(record: dict[str, Any], config: Evaluation) -> list[str]:
    """What the figures of an evaluation lack, or were made otherwise than now; what records of older versions don't say is not known."""
    found = differences(record.get("grader", "none"), config.grader, "grader")
    if config.grader != "none":
        now: dict[str, Any] = {"grading_version": GRADING}
        now |= {"limits": config.code.model_dump(mode="json")} if config.grader == "code" else {"grading_seconds": config.grading_seconds}
        known = {field: wanted for field, wanted in now.items() if record.get(field) is not None}
        found += [
            text for field, wanted in known.items() for text in differences(record[field], wanted, "code" if field == "limits" else field)
        ]
    if config.teacher is not None and "reverse_kl" not in record:
        found.append("the reverse KL to the teacher is missing")
    return found + differences(record.get("against", {}).get("name"), config.baseline, "baseline")


def training_status(recipe: Recipe, name: str, number: int | None = None) -> Status:
    """How far 'sft' or 'train' is, the latter in round `number` of several."""
    return Survey(recipe).stage(Stage(name, (name,), "train", round=number))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none that can be read."""
    try:
        return read_object(path)
    except (OSError, UserError):
        return {}
