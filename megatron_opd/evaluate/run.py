"""eval: sample answers to fresh prompts, grade them, and estimate the reverse KL to the teacher on the model's own samples."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.config import EvalStage, Recipe, SampleStage, ScoreStage
from megatron_opd.cost import provenance
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.grade import grade, mean_interval
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
    reader = sample_into_store(
        sampled, recipe.engine, role="evaluation", run_dir=recipe.run_dir, name="eval", lineage=read_lineage(stage.model)
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
    if stage.grader != "none":
        result |= {"grader": stage.grader, "accuracy": _accuracy(stage, reader)}
    if stage.teacher is not None:
        score_store(
            ScoreStage(store=store, model=stage.teacher, teacher=TEACHER), recipe.engine, run_dir=recipe.run_dir, check_lineage=False
        )
        result["reverse_kl"] = reverse_kl(StoreReader(store), TEACHER)
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
    return "  ".join(parts)


def _accuracy(stage: EvalStage, reader: StoreReader) -> dict[str, float]:
    """Mean score with a 95 % interval over prompts; an excluded prompt is not an answer and counts in 'excluded' only."""
    _, prompts = read_prompts(stage.prompts, limit=stage.num_prompts)
    tokenizer = load_tokenizer(stage.model)
    scores: dict[int, list[float]] = {}
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        text = tokenizer.decode(rollout.tokens[rollout.prompt_len :].tolist(), skip_special_tokens=True)
        scores.setdefault(rollout.prompt_index, []).append(grade(stage.grader, prompts[rollout.prompt_index], text))
    mean, low, high = mean_interval(list(scores.values()))
    return {"mean": mean, "low": low, "high": high}


def reverse_kl(reader: StoreReader, teacher: str) -> dict[str, float]:
    """Mean of log pi_model - log pi_teacher over the model's own samples, nats a token, with a 95 % interval.

    Unbiased for the reverse KL of the sampled prefixes if sampling was at temperature 1 over the whole vocabulary. Sequences, not
    tokens, are the independent units of the interval (ratio estimator).
    """
    gaps, lengths = [], []
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        response = slice(rollout.prompt_len, None)
        gaps.append(float((rollout.student_logp[response].astype(np.float64) - reader.scores(index, teacher).logp[response]).sum()))
        lengths.append(rollout.response_len)
    gap, length = np.array(gaps), np.array(lengths, np.float64)
    mean = gap.sum() / length.sum()
    n = len(gap)
    error = math.sqrt(((gap - mean * length) ** 2).sum() / max(n - 1, 1) / n) / length.mean()
    return {"mean": float(mean), "low": float(mean - 1.96 * error), "high": float(mean + 1.96 * error)}
