"""eval: sample answers to fresh prompts, grade them, and estimate the reverse KL to the teacher on the model's own samples."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.cost.meter import StageCost, provenance
from megatron_opd.data.missing import require_made
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.evaluate.accuracy import answers_sha256, check_answers, grade_store
from megatron_opd.evaluate.calibration_error import calibration
from megatron_opd.evaluate.chosen import check_code_allowed
from megatron_opd.evaluate.compare import read_graded
from megatron_opd.evaluate.grade import GRADING
from megatron_opd.evaluate.intervals import Totals, difference_interval, proportion_interval, ratio_interval
from megatron_opd.evaluate.passk import prompt_means, sample_figures
from megatron_opd.evaluate.rows import by_prompt, read_rows
from megatron_opd.evaluate.settings import GRADED, differences
from megatron_opd.evaluate.wording import describe, kl_caveat
from megatron_opd.hf.lineage import fingerprint_model, read_lineage
from megatron_opd.recipe.config import Recipe, SampleStage, ScoreStage
from megatron_opd.recipe.evaluation import NO_BASELINE, EvalStage, Evaluation
from megatron_opd.records import Finish, Prompt, PromptFile
from megatron_opd.safety.durable import write_json
from megatron_opd.serve.sample import sample_into_store
from megatron_opd.serve.score import score_store
from megatron_opd.serve.stage import Lend, lending_one

TEACHER = "teacher"


@dataclass
class _Work:
    """An evaluation under way. seconds: of its own work."""

    config: Evaluation
    prompt_file: PromptFile
    prompts: list[Prompt]
    seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


def evaluate(recipe: Recipe, chosen: Sequence[Evaluation]) -> None:
    """Do evaluations, model by model; writes RUN_DIR/eval/NAME/MODEL.json beside the store of its samples. Goes on where it was stopped. Raises UserError.

    Unreadable answers, programs that may not be run and a baseline that can't be compared with are found before anything is sampled. Of one
    model everything is sampled by one engine, and then scored by one of the teacher. Samples of an earlier run are graded anew, with the
    answers and the grader of now.
    """
    check_code_allowed({config.name: config for config in chosen})
    require_made(recipe, *dict.fromkeys(config.model for config in chosen))
    read: dict[str, tuple[PromptFile, list[Prompt]]] = {}
    works = []
    for config in chosen:
        if config.name not in read:
            read[config.name] = read_questions(config)
        works.append(_Work(_with_baseline(recipe, config, chosen, read[config.name][0]), *read[config.name]))
    for _, group in groupby(works, key=lambda work: work.config.model):
        _evaluate_model(recipe, list(group))


def read_questions(stage: EvalStage) -> tuple[PromptFile, list[Prompt]]:
    """The prompts of an evaluation, whose answers its grader can use. Raises UserError."""
    graded = stage.grader != "none"
    found = read_prompts(
        stage.prompts, limit=stage.num_prompts, subset_seed=stage.subset_seed, dates=stage.dates, split="test", answers=graded
    )
    if graded:
        check_answers(stage, found[1])
    return found


def evaluate_one(recipe: Recipe, config: Evaluation, questions: tuple[PromptFile, list[Prompt]], lend: Lend) -> dict[str, Any]:
    """Sample and grade one model with an engine that is there; returns the figures, which are in the record too. Raises UserError."""
    work = _Work(config, *questions)
    with work.timed():
        _sample(recipe, config, lend)
    return _write(recipe, work)


def _with_baseline(recipe: Recipe, config: Evaluation, chosen: Sequence[Evaluation], prompts: PromptFile) -> Evaluation:
    """Without a baseline that nobody asked for, where what is there of it can't be compared with. Raises UserError for one that was asked for."""
    baseline = config.baseline
    if baseline is None or config.store_of(baseline) in {other.store for other in chosen}:
        return config
    asked = recipe.eval[config.name].baseline is not None
    if not asked and not Path(config.store_of(baseline)).exists():
        why = f"which has no samples in {config.folder}"
    else:
        try:
            _open_baseline(config, prompts)
            return config
        except UserError as error:
            if asked:
                raise
            why = f"as nobody asked for it: {error}; or leave it out: eval.{config.name}.baseline={NO_BASELINE}"
    print(f"{config.title}: not compared with {baseline!r}, {why}")
    return config.model_copy(update={"baseline": None})


def _evaluate_model(recipe: Recipe, works: list[_Work]) -> None:
    """All of one model: sampled, scored, graded."""
    with lending_one(recipe.engine_for(works[0].config.model), recipe.run_dir) as lend:
        for work in works:
            with work.timed():
                _sample(recipe, work.config, lend)
    for teacher, scored in groupby(works, key=lambda work: work.config.teacher):
        if teacher is None:
            continue
        with lending_one(recipe.engine_for(teacher), recipe.run_dir) as lend:
            for work in scored:
                with work.timed():
                    score_store(
                        ScoreStage(store=work.config.store, model=teacher, teacher=TEACHER),
                        recipe.engine_for(teacher),
                        run_dir=recipe.run_dir,
                        name=f"{work.config.title} scores",
                        check_lineage=False,
                        lend=lend,
                    )
    for work in works:
        _write(recipe, work)


def sample_stage(config: Evaluation) -> SampleStage:
    return SampleStage(
        model=config.model,
        prompts=config.prompts,
        store=config.store,
        num_prompts=config.num_prompts,
        subset_seed=config.subset_seed,
        dates=config.dates,
        sampling=config.sampling,
        encoding=config.encoding,
    )


def _sample(recipe: Recipe, config: Evaluation, lend: Lend) -> None:
    reader = sample_into_store(
        sample_stage(config),
        recipe.engine_for(config.model),
        role="evaluation",
        run_dir=recipe.run_dir,
        name=config.title,
        lineage=read_lineage(config.model),
        allow_template_mismatch=config.allow_template_mismatch,
        extend=None,
        lend=lend,
    )
    reader.check_complete()
    if not len(reader):
        raise UserError(
            f"{config.store}: no response to evaluate: all prompts were excluded; 'megatron-opd inspect {config.store}' says why"
        )


def _grade(recipe: Recipe, work: _Work, reader: StoreReader) -> dict[str, Any]:
    """Rows of all samples on disk; returns the counts. The time is in the account of stages, unless every row was there."""
    rows = work.config.rows
    before = _written(rows)
    with StageCost(recipe.run_dir, f"{work.config.title} grading") as cost:
        _, counts = grade_store(work.config, reader, work.prompts, rows=rows)
        if _written(rows) != before:
            cost.tokens = int(reader.response_lens.sum())
    return counts


def _written(path: Path) -> tuple[int, int] | None:
    """What is another when something was written."""
    if not path.exists():
        return None
    fact = path.stat()
    return fact.st_mtime_ns, fact.st_size


def _write(recipe: Recipe, work: _Work) -> dict[str, Any]:
    """Figures of samples that are there, and scored, on disk and said."""
    config, started = work.config, time.monotonic()
    reader = StoreReader(config.store)
    result: dict[str, Any] = {
        "evaluation": config.name,
        "name": config.label,
        "model": reader.manifest.sampler.model_dump(),
        "num_prompts": reader.manifest.prompts.num_prompts,
        "prompts_sha256": reader.manifest.prompts.sha256,
        "sampling": config.sampling.model_dump(),
        "encoding": reader.manifest.encoding,
        "excluded": sum(len(record.excluded) for record in reader.parts.values()),
        "response_tokens": int(reader.response_lens.sum()),
        "response_length": float(reader.response_lens.mean()),
        "stopped_share": float((reader.finishes == Finish.STOP).mean()),
    }
    figures: dict[str, Totals] = {}
    if config.grader != "none":
        grading = _grade(recipe, work, reader)
        samples = by_prompt(read_rows(config.rows))
        figures["accuracy"] = prompt_means(samples)
        result |= {
            "grader": config.grader,
            "grading_seconds": config.grading_seconds,
            "grading_version": GRADING,
            "answers_sha256": answers_sha256(config, work.prompts),
            "grading": grading,
            "accuracy": proportion_interval(figures["accuracy"]).record(),
        }
        votes = config.grader != "code"  # two programs that are right need not be the same text
        result |= sample_figures(samples, votes=votes) | {"calibration": calibration(samples) if votes else None}
        if config.grader == "code":
            result["limits"] = config.code.model_dump(mode="json")
    if config.teacher is not None:
        figures["reverse_kl"] = reverse_kl_totals(StoreReader(config.store, teacher=TEACHER), TEACHER)
        result["reverse_kl"] = ratio_interval(figures["reverse_kl"]).record()
        result["reverse_kl_caveat"] = kl_caveat(result["sampling"])
    if (baseline := _open_baseline(config, work.prompt_file)) is not None:
        result["against"] = _compare(config, result, figures, baseline)
    result |= {"seconds": work.seconds + time.monotonic() - started, "provenance": provenance()}
    write_json(config.record, result)
    print(f"eval: {describe(result)}", flush=True)
    return result


def reverse_kl_totals(reader: StoreReader, teacher: str) -> Totals:
    """Nats (log pi_model - log pi_teacher of the model's own samples) and tokens by prompt.

    Their ratio is unbiased for the reverse KL of the sampled prefixes if sampling was at temperature 1 over the whole vocabulary.
    """
    totals: dict[int, tuple[float, float]] = {}
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        response = slice(rollout.prompt_len, None)
        gap = (rollout.student_logp[response].astype(np.float64) - reader.scores(index, teacher).logp[response]).sum()
        nats, tokens = totals.get(rollout.prompt_index, (0.0, 0.0))
        totals[rollout.prompt_index] = (nats + float(gap), tokens + rollout.response_len)
    return totals


def _open_baseline(stage: Evaluation, prompts: PromptFile) -> StoreReader | None:
    """The samples of `stage.baseline`, if they can be compared with those that this evaluation makes. Raises UserError."""
    if stage.baseline is None:
        return None
    path, field = Path(stage.store_of(stage.baseline)), f"eval.{stage.name}.baseline={stage.baseline!r}"
    make = f"make it first: megatron-opd eval RECIPE {stage.name} --of {stage.baseline}"
    if not path.exists():
        suffix = ".opd.zarr"
        there = sorted(other.name.removesuffix(suffix) for other in stage.folder.glob(f"*{suffix}") if other != Path(stage.store))
        listed = f"there are {', '.join(there)}" if there else "there is none yet"
        raise UserError(f"{field}: that model was not evaluated in {stage.folder} ({listed}); {make}")
    reader = StoreReader(str(path))
    manifest = reader.manifest
    encoding = stage.encoding.recorded()
    # A date that the recipe leaves open was filled in for a template that prints one.
    theirs = {key: value for key, value in manifest.encoding.items() if key in encoding or key != "date_string"}
    for what, here, there in (
        ("prompts", prompts.sha256, manifest.prompts.sha256),
        ("sampling parameters", stage.sampling, manifest.sampling),
        ("encoding of prompts", encoding, theirs),
        ("tokens", fingerprint_model(stage.model).tokenizer.vocab_sha256, manifest.sampler.tokenizer.vocab_sha256),
    ):
        if here != there:
            shown_values = f" ({there} there, {here} here)" if what in ("sampling parameters", "encoding of prompts") else ""
            raise UserError(f"{path}: {field} was evaluated with other {what}{shown_values}; {make}")
    reader.check_complete()
    if stage.teacher is not None:
        reader.check_scored(TEACHER)
        teacher = fingerprint_model(stage.teacher)
        for part in reader.parts:
            scored = reader.score_manifest(part, TEACHER)
            if scored is not None and scored.teacher.weights_sha256 != teacher.weights_sha256:
                raise UserError(
                    f"{path}: {field} was scored by {scored.teacher.short()}, but eval.{stage.name}.teacher is {teacher.short()}; {make}"
                )
    return reader


def _compare(stage: Evaluation, record: dict[str, Any], figures: dict[str, Totals], baseline: StoreReader) -> dict[str, Any]:
    """This evaluation minus the baseline, figure by figure, paired by prompt. Raises UserError.

    What the baseline was graded with stays as it is: where that is not what `record` says, accuracy is left out, and `note` says why.
    """
    before: dict[str, Totals] = {}
    result: dict[str, Any] = {"name": stage.baseline, "num_prompts": 0}
    if "accuracy" in figures:
        try:
            before["accuracy"] = _graded_alike(stage, record)
        except UserError as error:
            result["note"] = (
                f"accuracy is not compared: {error}; grade it again: megatron-opd eval RECIPE {stage.name} --of {stage.baseline}"
            )
    if "reverse_kl" in figures:
        before["reverse_kl"] = reverse_kl_totals(StoreReader(baseline.location.address, teacher=TEACHER), TEACHER)
    for name, totals in before.items():
        both = figures[name].keys() & totals.keys()  # without prompts that were excluded from either
        if not both:
            raise UserError(
                f"{baseline.location.url}: no prompt has a response both here and in eval.{stage.name}.baseline={stage.baseline!r}"
            )
        result["num_prompts"] = len(both)
        result[name] = difference_interval({p: figures[name][p] for p in both}, {p: totals[p] for p in both}).record()
    return result


def _graded_alike(stage: Evaluation, record: dict[str, Any]) -> Totals:
    """The scores of the baseline by prompt. Raises UserError unless it was graded as `record` was."""
    theirs, samples = read_graded(stage.rows_of(str(stage.baseline)))
    if other := differences(theirs, record, GRADED):
        raise UserError(f"{stage.baseline} was graded with other {', '.join(other.values())}")
    return prompt_means(samples)
