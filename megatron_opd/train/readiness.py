"""Everything that must hold before training starts; `megatron-opd check` runs the same. Needs no GPU and no process group."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_opd.convert.source import open_source
from megatron_opd.convert.written import read_origin
from megatron_opd.data.calibration import check_calibration
from megatron_opd.data.joined import open_training_stores, show_stores, store_list
from megatron_opd.data.missing import require_made
from megatron_opd.data.order import TrainingOrder
from megatron_opd.data.store import StoreReader
from megatron_opd.data.stored_format import check_stored_format
from megatron_opd.data.vocabulary import Vocabulary
from megatron_opd.errors import LineageError, StoreError, UserError
from megatron_opd.hf.lineage import check_teacher, fingerprint_model, read_lineage, same_model, teacher_problem
from megatron_opd.hf.tokenizer import check_rows, check_same_tokenizer
from megatron_opd.hf.turns import check_prompt_format, own_stop_ids
from megatron_opd.model.architecture import Architecture, read_architecture
from megatron_opd.recipe.config import Recipe, ScoreStage
from megatron_opd.recipe.objective import RoundsConfig
from megatron_opd.recipe.rounds import round_recipe
from megatron_opd.recipe.training_stages import SftStage, TrainerConfig, TrainStage
from megatron_opd.records import Lineage, ModelFingerprint, RoundRecord, SftFacts
from megatron_opd.store_records import Derived
from megatron_opd.train.batches import check_lengths
from megatron_opd.train.endings import check_endings, sft_facts
from megatron_opd.train.identity import RunIdentity, of_round, plan_resume, run_identity
from megatron_opd.train.loggers import not_installed


@dataclass(frozen=True)
class Readiness:
    """What the checks found out."""

    arch: Architecture
    init: ModelFingerprint
    lineage: Lineage
    identity: RunIdentity
    notes: list[str]


def check_stage(recipe: Recipe, name: str, number: int | None = None) -> Readiness:
    """`check_sft` or `check_train`, with the teacher that the recipe names; `number` is the round of several.

    Raises UserError, for what no stage has made yet with the commands, and for evaluations that could not be made on the way.
    """
    seen = round_recipe(recipe, number)
    config: TrainerConfig = getattr(seen, name)
    require_made(seen, config.init, *store_list(config.store), scored=name == "train", number=number)
    if name == "sft":
        ready = check_sft(recipe.sft, recipe.generate.model if recipe.generate else recipe.models.teacher)
    else:
        ready = check_train(seen.train, seen.score, rounds=recipe.rounds, number=number)
    if config.eval_every is not None:
        from megatron_opd.train.eval_checks import check_evals  # brings the engines

        check_evals(recipe, name, config, ready.lineage)
    return replace(ready, notes=[*ready.notes, *_gpu_notes(ready.arch, config)])


def _gpu_notes(arch: Architecture, config: TrainerConfig) -> list[str]:
    """What the layers on this GPU will be; nothing where CUDA is not started, as a launcher must leave the GPU to its ranks."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return []
    from megatron_opd.model.student import describe_layers

    return describe_layers(arch, config)


def check_start(
    recipe: Recipe, name: str, *, number: int | None = None, ranks: int | None = None, allow_changes: bool = False
) -> Readiness:
    """All that `ranks` processes would refuse of stage `name` once they are up, a run in its output folder included. Raises UserError."""
    config: TrainerConfig = getattr(round_recipe(recipe, number), name)
    if ranks is not None:
        config.check_ranks(name, ranks)
    ready = check_stage(recipe, name, number)
    going = plan_resume(name, config, ready.identity, allow_changes=allow_changes)
    return replace(ready, notes=[*ready.notes, *going.notes])


def check_loggers(loggers: Sequence[str]) -> None:
    """Raise UserError for a logger whose package is not in this Python."""
    for name in loggers:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a mere folder, as W&B makes one of its own name
                raise not_installed(name)


def check_sft(stage: SftStage, teacher_model: str | None = None) -> Readiness:
    """Raises UserError unless the base student can be fine-tuned on this store of teacher answers, by the model in `teacher_model`."""
    reader, arch, init = _check_common("sft", stage)
    if reader.manifest.sampler_role != "teacher":
        raise StoreError(f"{reader.location.url}: rollouts of a student; SFT needs teacher answers (megatron-opd generate)")
    teacher = reader.manifest.sampler
    remedy = "name that one (generate.model=DIR, or models.teacher=DIR), or generate into another store (generate.store=..., sft.store=...)"
    compared = _compare_teacher(teacher_model, teacher, f"{reader.location.url} holds answers of", remedy)
    earlier = read_lineage(stage.init) or Lineage()
    overrides = list(earlier.overrides)
    if earlier.sft_teacher is not None and not same_model(earlier.sft_teacher, teacher):
        overrides.append(f"SFT on answers of {teacher.short()} after SFT on answers of {earlier.sft_teacher.short()}")
    for store in reader.stores:
        overrides += check_endings(store, set(own_stop_ids(stage.init)), None, allow=stage.allow_stop_mismatch)
    facts = sft_facts(reader)
    declared = reader.manifest.lineage.sft_teacher_declared  # answers that were imported
    lineage = Lineage(base=init, sft_teacher=teacher, sft_teacher_declared=declared, sft=facts, overrides=overrides)
    notes = [*_notes(reader, overrides), *compared, _describe_endings(facts)]
    return Readiness(arch, init, lineage, run_identity(stage, reader, arch, init, teacher), notes)


def check_train(
    stage: TrainStage, scoring: ScoreStage | None = None, *, rounds: RoundsConfig | None = None, number: int | None = None
) -> Readiness:
    """Raises UserError unless the student can be distilled on this store: right student, right teacher, every score there.

    `scoring`: the recipe's section that says which model scores. `number`: the round, of several, that `stage` is of.
    """
    reader, arch, init = _check_common("train", stage, teacher=stage.teacher)
    manifest = reader.manifest
    off_policy = check_sampler(stage, reader, init)
    if manifest.round != number:
        made, wanted = (f"round {value}" if value else "a run without rounds" for value in (manifest.round, number))
        raise StoreError(f"{reader.location.url}: made for {made}, but this is {wanted}; sample a store for it")
    for store in reader.stores:
        check_stored_format(store)
    lineage = manifest.lineage
    if off_policy:  # what the store says is of its responses, the rest of the student
        lineage = read_lineage(stage.init) or Lineage()
        off_policy += [f"of the responses: {text}" for text in manifest.lineage.overrides if text not in lineage.overrides]
    stop_ids = set(own_stop_ids(stage.init)) | set(lineage.sft.stop_ids if lineage.sft is not None else [])
    endings = [text for store in reader.stores for text in check_endings(store, stop_ids, lineage.sft, allow=stage.allow_stop_mismatch)]
    reader.check_scored(stage.teacher)
    records = [record for part in reader.parts if (record := reader.score_manifest(part, stage.teacher))]
    teacher, derived = records[0].teacher, records[0].derived
    if stage.loss.needs_topk:
        _check_topk(reader, stage, arch)
    overrides = [*lineage.overrides, *(text for text in [*off_policy, *endings] if text not in lineage.overrides)]
    if other := next((record for record in records if not same_model(record.teacher, teacher)), None):
        raise StoreError(
            f"{reader.location.url}: teacher {stage.teacher!r} of part {records[0].part} is {teacher.short()}, of part {other.part} {other.teacher.short()} "
            "(weights, or table of tokens); delete the odd parts' scores and score again"
        )
    compared = _compare_scorer(stage, scoring, teacher, derived.source if derived else stage.teacher)
    foreign = check_same_tokenizer(manifest.sampler, teacher)
    for store in reader.stores:
        Vocabulary(f"teacher {teacher.short()}", teacher.vocab_size, foreign).check_store(store, store.parts, known_rows=arch.vocab_size)
    mended = derived is not None and derived.mends and not off_policy  # what recurs was fitted against the sampler's pi_ref
    if not mended:
        allowed = stage.allow_teacher_mismatch or any(record.allow_teacher_mismatch for record in records)
        override = check_teacher(lineage, teacher, allow_mismatch=allowed, off_policy=bool(off_policy))
        if override is not None and override not in overrides:
            overrides.append(override)
    facts = [] if derived is None else [_describe_derived(stage, derived, teacher, teacher_problem(lineage, teacher) if mended else None)]
    scores = None if derived is None else derived.derivation
    lineage = lineage.model_copy(update={"opd_teacher": teacher, "opd_scores": scores, "overrides": overrides})
    bound, sampler = stage.max_engine_gap, manifest.sampler_role.upper()
    noise = [check_calibration(store.location, teacher.weights_sha256, bound, sampler=sampler) for store in reader.stores]
    identity = run_identity(stage, reader, arch, init, teacher)
    if number is not None and rounds is not None:
        read_lineage(stage.init)  # refuses weights that are not those that were written
        converted_from = None if number == 1 else (read_origin(Path(stage.init)) or {}).get("content")
        identity = of_round(identity, rounds, number, reader=reader, init=init, converted_from=converted_from)
        lineage = lineage.model_copy(update={"rounds": [*lineage.rounds, RoundRecord(number=number, store_id=reader.store_id)]})
    return Readiness(arch, init, lineage, identity, [*_notes(reader, overrides), *facts, *compared, *noise, *_warn_of_loss(stage)])


def check_sampler(stage: TrainStage, reader: StoreReader, init: ModelFingerprint) -> list[str]:
    """Nothing if `init` sampled the responses; else, with allow_off_policy, the sentences that are recorded. Raises UserError."""
    url, sampler = reader.location.url, reader.manifest.sampler
    if (role := reader.manifest.sampler_role) not in ("student", "teacher"):
        raise StoreError(f"{url}: responses of an {role}; distillation needs rollouts of the student (megatron-opd rollout)")
    answers = role == "teacher"
    if not answers and same_model(sampler, init):
        return []
    allow = "train.allow_off_policy=true trains on them all the same, and is recorded"
    if answers and not stage.allow_off_policy:
        raise StoreError(f"{url}: answers of a teacher; distillation needs rollouts of the student (megatron-opd rollout). {allow}")
    if not stage.allow_off_policy:
        raise LineageError(
            f"{url} holds rollouts of {sampler.short()}, but training starts from {init.short()} (train.init={stage.init}); "
            f"train the student that was sampled, or collect rollouts of this one. {allow}"
        )
    limits = [f"train.drift.{name}" for name in ("max_off_share", "min_effective_share") if getattr(stage.drift, name) is not None]
    if limits or stage.loss.name == "exopd":
        what = " and ".join([*(["train.loss.name = 'exopd'"] if stage.loss.name == "exopd" else []), *limits])
        raise UserError(
            f"{url}: the stored log-probabilities are those of {sampler.short()}, which sampled, but {what} is about pi_ref, the student that training "
            "starts from; leave it out with train.allow_off_policy, or collect rollouts of this student"
        )
    told = "sampled, as declared," if answers and reader.manifest.lineage.sft_teacher_declared else "sampled"
    who = f"the teacher {sampler.short()}" if answers else sampler.short()
    allowed = [f"off-policy responses allowed: {told} by {who}, trained from {init.short()}"]
    lineage = read_lineage(stage.init)
    if lineage is not None and lineage.sft is not None and (problem := check_prompt_format(lineage.sft, reader.manifest, url)) is not None:
        allowed.append(f"prompt format mismatch allowed: {problem}")
    return allowed


def _warn_of_loss(stage: TrainStage) -> list[str]:
    if not stage.loss.unclipped_importance:
        return []
    return [
        f"WARNING: train.loss.importance_clip = {stage.loss.importance_clip:g} without advantage_clip: on the demo's task such runs ended at 0 to 5 % "
        "accuracy, from 56 % before, and at 92 % with advantage_clip = 0.5 (docs/method.md); set train.loss.advantage_clip too, or leave importance_clip out"
    ]


def _describe_derived(stage: TrainStage, derived: Derived, teacher: ModelFingerprint, mended: tuple[str, str] | None) -> str:
    """What training on derived scores means; `mended` is the teacher's problem that they mend, of `teacher_problem`."""
    why = "" if mended is None else f"; {mended[0]}, which these scores allow for"
    what = (
        "" if derived.are_log_probs else ", which are no distribution's: figures against the teacher are against them, and may be below 0"
    )
    return f"teacher {stage.teacher!r}: {derived.describe()} of {teacher.short()}{what}{why}"


def _compare_scorer(stage: TrainStage, scoring: ScoreStage | None, teacher: ModelFingerprint, group: str) -> list[str]:
    """As `_compare_teacher`, for the model that [score] names; `group` is the one that it scored into."""
    if scoring is not None and scoring.teacher != group:
        return [
            f"train.teacher = {stage.teacher!r} is {teacher.short()}; the recipe's score.model is for score.teacher = {scoring.teacher!r}, and not compared"
        ]
    remedy = "name that one (score.model=DIR, or models.teacher=DIR), or score with this one under another name (score.teacher=NAME train.teacher=NAME)"
    return _compare_teacher(
        scoring.model if scoring else None, teacher, f"{show_stores(stage.store)}: teacher {stage.teacher!r} is", remedy
    )


def _compare_teacher(directory: str | None, teacher: ModelFingerprint, recorded: str, remedy: str) -> list[str]:
    """What to say where the recipe's teacher can't be compared with the one on record. Raises LineageError where it is another model."""
    if directory is None:
        return []
    if not Path(directory).exists():
        return [f"{recorded} {teacher.short()}; the recipe's teacher {directory} is not on this machine, and not compared"]
    try:
        own = fingerprint_model(directory)
    except UserError as error:
        return [f"{recorded} {teacher.short()}; the recipe's teacher is not compared: {error}"]
    if not same_model(own, teacher):
        tokens = f", tables of tokens {own.tokenizer.vocab_sha256[:12]} and {teacher.tokenizer.vocab_sha256[:12]}"
        raise LineageError(
            f"{recorded} {teacher.short()}, but the recipe's teacher {directory} is now {own.short()}"
            f"{tokens if own.weights_sha256 == teacher.weights_sha256 else ''}; {remedy}"
        )
    return []


def _describe_endings(facts: SftFacts) -> str:
    share = max(facts.stopped_within.values(), default=0.0)
    return (
        f"{share:.1%} of {facts.num_answers} answers ended by themselves, at the ids {facts.stop_ids or 'none'}: the student's from now on"
    )


def _check_topk(reader: StoreReader, stage: TrainStage, arch: Architecture) -> None:
    """Raises StoreError unless the teacher's candidates are stored, as many in every part, and the student knows them."""
    records = {part: record for part in reader.parts if (record := reader.score_manifest(part, stage.teacher))}
    counts = {part: record.top_k for part, record in records.items()}
    for part, record in records.items():
        if record.largest_candidate is not None and record.largest_candidate >= arch.vocab_size:
            raise StoreError(
                f"{reader.location.url}: part {part} has the candidate id {record.largest_candidate} of teacher {stage.teacher!r}, but the student has {arch.vocab_size} "
                "embedding rows; score again with a lower score.top_k, or train with train.loss.name=opd, which needs none"
            )
    if any(record.derived is not None for record in records.values()):
        raise StoreError(
            f"{reader.location.url}: train.loss.name = {stage.loss.name!r} needs candidates, and derived scores have none ({stage.teacher!r}); "
            "train with a loss of the sampled token (train.loss.name=opd), or on the scores of a model"
        )
    without = [part for part, top_k in counts.items() if not top_k]
    if without:
        raise StoreError(
            f"{reader.location.url}: train.loss.name = {stage.loss.name!r} needs the top-k candidates of teacher {stage.teacher!r}, and {len(without)} of "
            f"{len(counts)} parts have none (first: {without[:5]}); delete these scores and score again with score.top_k=64, or train with train.loss.name=opd"
        )
    if len(set(counts.values())) > 1:
        raise StoreError(
            f"{reader.location.url}: teacher {stage.teacher!r} has {', '.join(map(str, sorted(set(counts.values()))))} candidates a token in different parts; "
            "score again with one score.top_k"
        )


def _check_common(name: str, stage: TrainerConfig, teacher: str | None = None) -> tuple[StoreReader, Architecture, ModelFingerprint]:
    arch = read_architecture(stage.init)
    arch.check_stage(stage, name)
    open_source(stage.init, arch)
    reader = open_training_stores(stage.store, teacher)
    if not stage.allow_incomplete:
        reader.check_complete()
    if len(reader) == 0:
        raise StoreError(f"{reader.location.url}: no rollouts in it")
    order = TrainingOrder.of(reader, stage)
    if order.repeats():
        there, field = f"{len(reader)} rollouts, fewer than", "global_batch"
        if stage.global_batch_tokens is not None:
            there, field = f"{len(reader)} rollouts of {order.lengths.sum()} tokens, fewer than", "global_batch_tokens"
        raise UserError(
            f"{reader.location.url}: {there} {field} = {getattr(stage, field)}: a step would have some of them twice; "
            f"lower {field}, or collect more"
        )
    init, sampler = fingerprint_model(stage.init), reader.manifest.sampler
    foreign = check_same_tokenizer(init, sampler)
    check_rows(init)
    for store in reader.stores:
        Vocabulary(f"student {init.short()}", arch.vocab_size, foreign).check_store(store, store.parts, known_rows=sampler.vocab_size)
    check_lengths(reader, stage)
    longest = int(order.lengths.max())
    if longest > arch.max_positions:
        raise UserError(
            f"{reader.location.url}: a rollout has {longest} tokens, the model takes {arch.max_positions}; cut with max_response_tokens"
        )
    return reader, arch, init


def _notes(reader: StoreReader, overrides: list[str]) -> list[str]:
    notes = [*(f"WARNING: {override}" for override in overrides), *reader.notes]
    missing = reader.missing_parts()
    if missing:
        notes.append(f"WARNING: {len(missing)} of {reader.num_parts} parts are not sealed; training on the others (allow_incomplete)")
    excluded = sum(len(record.excluded) for record in reader.parts.values())
    if excluded:
        notes.append(f"{excluded} rollouts were excluded when the store was made; 'megatron-opd inspect' gives the reasons")
    if reader.teacher is not None:
        sampled = sum(record.num_rollouts for record in reader.parts.values())
        if len(reader) < sampled:
            notes.append(f"{sampled - len(reader)} of {sampled} rollouts have no scores of {reader.teacher!r} and are left out")
    return notes
