"""eval: sample answers to fresh prompts, grade them, and estimate the reverse KL to the teacher on the model's own samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.config import EvalStage, Recipe, SampleStage, ScoreStage
from megatron_opd.cost import provenance
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.durable import write_json
from megatron_opd.errors import UserError
from megatron_opd.evaluate.accuracy import grade_store
from megatron_opd.evaluate.grading_pool import check_answers
from megatron_opd.evaluate.intervals import Totals, difference_interval, proportion_interval, ratio_interval
from megatron_opd.evaluate.wording import describe_grading, interval, kl_caveat, shown
from megatron_opd.lineage import fingerprint_model, read_lineage
from megatron_opd.pipeline.missing import require_made
from megatron_opd.records import Finish, Prompt, PromptFile
from megatron_opd.serve.sample import sample_into_store
from megatron_opd.serve.score import score_store

TEACHER = "teacher"


def evaluate(stage: EvalStage, recipe: Recipe) -> dict[str, Any]:
    """Evaluate one model; writes OUTPUT/NAME.json beside the store of its samples. Goes on where it was stopped. Raises UserError.

    Unreadable answers and a baseline that can't be compared with are found before anything is sampled. Samples of an earlier run are
    graded anew, with the answers and the grader of now.
    """
    started = time.monotonic()
    require_made(recipe, stage.model)
    prompt_file, prompts = read_prompts(stage.prompts, limit=stage.num_prompts)
    if stage.grader != "none":
        check_answers(stage.grader, prompts, stage.prompts, seconds=stage.grading_seconds)
    baseline = _open_baseline(stage, prompt_file)
    output = Path(stage.output)
    store = str(output / f"{stage.name}.opd.zarr")
    sampled = SampleStage(
        model=stage.model,
        prompts=stage.prompts,
        store=store,
        num_prompts=stage.num_prompts,
        sampling=stage.sampling,
        encoding=stage.encoding,
    )
    name = f"eval {stage.name}"
    reader = sample_into_store(
        sampled,
        recipe.engine_for(stage.model),
        role="evaluation",
        run_dir=recipe.run_dir,
        name=name,
        lineage=read_lineage(stage.model),
        allow_template_mismatch=stage.allow_template_mismatch,
        extend=None,
    )
    reader.check_complete()
    if not len(reader):
        raise UserError(f"{store}: no response to evaluate: all prompts were excluded; 'megatron-opd inspect {store}' says why")
    result: dict[str, Any] = {
        "name": stage.name,
        "model": reader.manifest.sampler.model_dump(),
        "num_prompts": reader.manifest.prompts.num_prompts,
        "prompts_sha256": reader.manifest.prompts.sha256,
        "sampling": stage.sampling.model_dump(),
        "excluded": sum(len(record.excluded) for record in reader.parts.values()),
        "response_tokens": int(reader.response_lens.sum()),
        "response_length": float(reader.response_lens.mean()),
        "stopped_share": float((reader.finishes == Finish.STOP).mean()),
    }
    figures: dict[str, Totals] = {}
    if stage.grader != "none":
        figures["accuracy"], grading = grade_store(stage, reader, prompts)
        result |= {"grader": stage.grader, "grading": grading, "accuracy": proportion_interval(figures["accuracy"]).record()}
    if stage.teacher is not None:
        score_store(
            ScoreStage(store=store, model=stage.teacher, teacher=TEACHER),
            recipe.engine_for(stage.teacher),
            run_dir=recipe.run_dir,
            name=f"{name} scores",
            check_lineage=False,
        )
        figures["reverse_kl"] = reverse_kl_totals(StoreReader(store, teacher=TEACHER), TEACHER)
        result["reverse_kl"] = ratio_interval(figures["reverse_kl"]).record()
        result["reverse_kl_caveat"] = kl_caveat(result["sampling"])
    if baseline is not None:
        result["against"] = _compare(stage, figures, baseline, prompts)
    result |= {"seconds": time.monotonic() - started, "provenance": provenance()}
    write_json(output / f"{stage.name}.json", result)
    print(f"eval: {describe(result)}")
    return result


def describe(result: dict[str, Any]) -> str:
    """A line with accuracy and reverse KL, each with its 95 % interval; further ones on what was graded 0 unseen, and on the baseline."""
    parts = [f"{result['name']}:"]
    if "accuracy" in result:
        parts.append(f"accuracy {interval(result['accuracy'], '.1%', unit='')}")
    if "reverse_kl" in result:
        parts.append(f"reverse KL {interval(result['reverse_kl'], '.4f', unit='')} nat/token{_caveat(result)}")
    length, stopped = shown(result["response_length"], ".0f"), shown(result["stopped_share"], ".1%")
    parts.append(f"{length} tokens a response, {stopped} ended by themselves")
    lines = ["  ".join(parts), describe_grading(result.get("grading", {"responses": 0}))]
    lines.append(describe_difference(result) if "against" in result else "")
    return "\n".join(line for line in lines if line)


def describe_difference(result: dict[str, Any]) -> str:
    """One line: change of accuracy and reverse KL against the baseline, paired by prompt, each with its 95 % interval."""
    against = result["against"]
    parts = [f"{result['name']} against {against['name']}, paired over {against['num_prompts']} prompts:"]
    if "accuracy" in against:
        parts.append(f"accuracy {interval(against['accuracy'], '.1f', factor=100, signed=True, unit=' points')}")
    if "reverse_kl" in against:
        parts.append(f"reverse KL {interval(against['reverse_kl'], '.4f', signed=True, unit='')} nat/token{_caveat(result)}")
    return "  ".join(parts)


def _caveat(result: dict[str, Any]) -> str:
    caveat = kl_caveat(result["sampling"])
    return f" ({caveat}: not an unbiased estimate)" if caveat else ""


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


def _open_baseline(stage: EvalStage, prompts: PromptFile) -> StoreReader | None:
    """The samples that `stage.baseline` names, if they can be compared with those that this evaluation makes. Raises UserError."""
    if stage.baseline is None:
        return None
    folder = Path(stage.output)
    path = folder / f"{stage.baseline}.opd.zarr"
    make = f"make it first: megatron-opd eval RECIPE eval.name={stage.baseline} eval.model=... eval.baseline=null"
    if not path.exists():
        there = sorted(
            other.name.removesuffix(".opd.zarr") for other in folder.glob("*.opd.zarr") if other.name != f"{stage.name}.opd.zarr"
        )
        listed = f"there are {', '.join(there)}" if there else "there is none yet"
        raise UserError(f"eval.baseline={stage.baseline!r}: no such evaluation in {folder} ({listed}); {make}")
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
            raise UserError(f"{path}: eval.baseline={stage.baseline!r} was evaluated with other {what}{shown_values}; {make}")
    reader.check_complete()
    if stage.teacher is not None:
        reader.check_scored(TEACHER)
        teacher = fingerprint_model(stage.teacher)
        for part in reader.parts:
            scored = reader.score_manifest(part, TEACHER)
            if scored is not None and scored.teacher.weights_sha256 != teacher.weights_sha256:
                raise UserError(
                    f"{path}: eval.baseline={stage.baseline!r} was scored by {scored.teacher.short()}, but eval.teacher is {teacher.short()}; {make}"
                )
    return reader


def _compare(stage: EvalStage, figures: dict[str, Totals], baseline: StoreReader, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """This evaluation minus the baseline, figure by figure, paired by prompt. Raises UserError."""
    before: dict[str, Totals] = {}
    if "accuracy" in figures:
        before["accuracy"] = grade_store(stage, baseline, prompts)[0]
    if "reverse_kl" in figures:
        before["reverse_kl"] = reverse_kl_totals(StoreReader(baseline.location.address, teacher=TEACHER), TEACHER)
    result: dict[str, Any] = {"name": stage.baseline, "num_prompts": 0}
    for name, totals in before.items():
        both = figures[name].keys() & totals.keys()  # without prompts that were excluded from either
        if not both:
            raise UserError(f"{baseline.location.url}: no prompt has a response both here and in eval.baseline={stage.baseline!r}")
        result["num_prompts"] = len(both)
        result[name] = difference_interval({p: figures[name][p] for p in both}, {p: totals[p] for p in both}).record()
    return result
