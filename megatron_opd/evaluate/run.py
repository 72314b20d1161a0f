"""eval: sample answers to fresh prompts, grade them, and estimate the reverse KL to the teacher on the model's own samples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.config import EvalStage, Recipe, SampleStage, ScoreStage
from megatron_opd.cost import provenance
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import grade
from megatron_opd.evaluate.intervals import Totals, difference_interval, proportion_interval, ratio_interval
from megatron_opd.lineage import load_tokenizer, read_lineage, write_json_atomic
from megatron_opd.records import Finish
from megatron_opd.serve.sample import sample_into_store
from megatron_opd.serve.score import score_store

TEACHER = "teacher"


def evaluate(stage: EvalStage, recipe: Recipe) -> dict[str, Any]:
    """Evaluate one model; writes OUTPUT/NAME.json beside the store of its samples. Goes on where it was stopped. Raises UserError."""
    started = time.time()
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
        recipe.engine,
        role="evaluation",
        run_dir=recipe.run_dir,
        name=name,
        lineage=read_lineage(stage.model),
        allow_template_mismatch=stage.allow_template_mismatch,
    )
    reader.check_complete()
    result: dict[str, Any] = {
        "name": stage.name,
        "model": reader.manifest.sampler.model_dump(),
        "num_prompts": reader.manifest.prompts.num_prompts,
        "prompts_sha256": reader.manifest.prompts.sha256,
        "sampling": stage.sampling.model_dump(),
        "excluded": sum(len(record.excluded) for record in reader.parts.values()),
        "response_tokens": int(reader.response_lens.sum()),
        "response_length": float(reader.response_lens.mean()) if len(reader) else 0.0,
        "stopped_share": float((reader.finishes == Finish.STOP).mean()) if len(reader) else 0.0,
    }
    figures: dict[str, Totals] = {}
    if stage.grader != "none":
        figures["accuracy"] = accuracy_totals(stage, reader)
        result |= {"grader": stage.grader, "accuracy": proportion_interval(figures["accuracy"])._asdict()}
    if stage.teacher is not None:
        score_store(
            ScoreStage(store=store, model=stage.teacher, teacher=TEACHER),
            recipe.engine,
            run_dir=recipe.run_dir,
            name=f"{name} scores",
            check_lineage=False,
        )
        figures["reverse_kl"] = reverse_kl_totals(StoreReader(store, teacher=TEACHER), TEACHER)
        result["reverse_kl"] = ratio_interval(figures["reverse_kl"])._asdict()
    if stage.baseline is not None:
        result["against"] = _compare(stage, figures, reader)
    result |= {"seconds": time.time() - started, "provenance": provenance()}
    write_json_atomic(output / f"{stage.name}.json", result)
    print(f"eval: {describe(result)}")
    return result


def describe(result: dict[str, Any]) -> str:
    """One line: accuracy and reverse KL, each with its 95 % interval."""
    parts = [f"{result['name']}:"]
    if "accuracy" in result:
        accuracy = result["accuracy"]
        parts.append(f"accuracy {accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]")
    if "reverse_kl" in result:
        kl = result["reverse_kl"]
        parts.append(f"reverse KL {kl['mean']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}] nat/token")
    parts.append(f"{result['response_length']:.0f} tokens a response, {result['stopped_share']:.1%} ended by themselves")
    return "  ".join(parts) + (f"\n{describe_difference(result)}" if "against" in result else "")


def describe_difference(result: dict[str, Any]) -> str:
    """One line: change of accuracy and reverse KL against the baseline, paired by prompt, each with its 95 % interval."""
    against = result["against"]
    parts = [f"{result['name']} against {against['name']}, paired over {against['num_prompts']} prompts:"]
    if "accuracy" in against:
        mean, low, high = (100 * against["accuracy"][key] for key in ("mean", "low", "high"))
        parts.append(f"accuracy {mean:+.1f} points [{low:+.1f}, {high:+.1f}]")
    if "reverse_kl" in against:
        mean, low, high = (against["reverse_kl"][key] for key in ("mean", "low", "high"))
        parts.append(f"reverse KL {mean:+.4f} [{low:+.4f}, {high:+.4f}] nat/token")
    return "  ".join(parts)


def accuracy_totals(stage: EvalStage, reader: StoreReader) -> Totals:
    """Scores and samples by prompt; an excluded prompt is not an answer and is not there. Raises UserError."""
    _, prompts = read_prompts(stage.prompts, limit=stage.num_prompts)
    tokenizer = load_tokenizer(stage.model)
    totals: dict[int, tuple[float, float]] = {}
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        text = tokenizer.decode(rollout.tokens[rollout.prompt_len :].tolist(), skip_special_tokens=True)
        score, samples = totals.get(rollout.prompt_index, (0.0, 0.0))
        totals[rollout.prompt_index] = (score + grade(stage.grader, prompts[rollout.prompt_index], text), samples + 1)
    return totals


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


def _compare(stage: EvalStage, figures: dict[str, Totals], reader: StoreReader) -> dict[str, Any]:
    """This evaluation minus the one that `stage.baseline` names, figure by figure, paired by prompt. Raises UserError."""
    baseline = stage.baseline
    path = Path(stage.output) / f"{baseline}.opd.zarr"
    other = StoreReader(str(path))
    for what, here, there in (
        ("prompts", reader.manifest.prompts.sha256, other.manifest.prompts.sha256),
        ("sampling parameters", reader.manifest.sampling, other.manifest.sampling),
        ("tokens", reader.manifest.sampler.tokenizer.vocab_sha256, other.manifest.sampler.tokenizer.vocab_sha256),
    ):
        if here != there:
            raise UserError(f"{path}: eval.baseline={baseline!r} was evaluated with other {what}; evaluate it again with these")
    before: dict[str, Totals] = {}
    if "accuracy" in figures:
        before["accuracy"] = accuracy_totals(stage, other)
    if "reverse_kl" in figures:
        other.check_scored(TEACHER)
        before["reverse_kl"] = reverse_kl_totals(StoreReader(str(path), teacher=TEACHER), TEACHER)
    result: dict[str, Any] = {"name": baseline}
    for name, totals in before.items():
        both = figures[name].keys() & totals.keys()  # without prompts that were excluded from either
        result["num_prompts"] = len(both)
        result[name] = difference_interval({p: figures[name][p] for p in both}, {p: totals[p] for p in both})._asdict()
    return result
