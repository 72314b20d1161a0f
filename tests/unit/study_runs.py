"""Folders of runs as trainings and evaluations leave them, small: groups with seeds, rows by prompt, recipes, curves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from unit.graded_rows import graded

from megatron_opd.evaluate.intervals import proportion_interval
from megatron_opd.evaluate.passk import prompt_means

STEPS, PROMPTS = 40, 60
RECIPE = """name = "study"
run_dir = "{run_dir}"
[train]
output = "{run_dir}/opd"
lr = 0.001
seed = {seed}
[train.loss]
name = "{loss}"
[slurm]
partition = "p{seed}"
"""


def make_study_run(folder: Path, loss: str, seed: int, solved: float, *, evaluations: tuple[str, ...] = ("sums",)) -> Path:
    """A run whose student solves about this share of the prompts; all runs begin with one SFT model that solves a third."""
    rng = np.random.default_rng([seed, *loss.encode()])
    (folder / "opd").mkdir(parents=True)
    (folder / "sft").mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(run_dir=folder, seed=seed, loss=loss))
    for name in evaluations:
        write_evaluation(folder, name, "sft", [prompt % 3 == 0 for prompt in range(PROMPTS)], weights="s" * 64)
        write_evaluation(folder, name, "opd", (rng.random(PROMPTS) < solved).tolist(), weights=f"{loss}{seed}")
    for stage in ("sft", "opd"):
        rows = [_step(step, rng, distils=stage == "opd", evaluations=evaluations) for step in range(1, STEPS + 1)]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"stage": "train", "seconds": 50.0 + seed, "tokens": 10, "num_gpus": 0, "gpu_hours": 0.0, "started": 1.7e9}]
    stages.append({"stage": "eval.sums.opd", "seconds": 9.0, "tokens": 10, "num_gpus": 0, "gpu_hours": 0.0})
    (folder / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stages))
    return folder


def write_evaluation(run: Path, evaluation: str, model: str, right: list[bool], *, weights: str, **changes: Any) -> None:
    """MODEL.json and MODEL.prompts.jsonl, a sample a prompt."""
    place = run / "eval" / evaluation
    place.mkdir(parents=True, exist_ok=True)
    rows = [graded(prompt, 0, "7" if hit else "8", "7") for prompt, hit in enumerate(right)]
    (place / f"{model}.prompts.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    record = {
        "evaluation": evaluation, "name": model, "model": {"weights_sha256": weights}, "prompts_sha256": "p" * 64, "answers_sha256": "a" * 64,
        "grader": "exact", "response_length": 5.0, "stopped_share": 1.0, "grading": {"responses": len(rows)},
        "accuracy": proportion_interval(prompt_means({row.prompt: [row] for row in rows})).record(),
        "reverse_kl": {"mean": 0.5, "low": 0.4, "high": 0.6}, "provenance": {"created": "2026-01-01T00:00:00Z", "git_commit": "c" * 40},
    }  # fmt: skip
    (place / f"{model}.json").write_text(json.dumps(record | changes))


def _step(step: int, rng: np.random.Generator, *, distils: bool, evaluations: tuple[str, ...]) -> dict[str, Any]:
    loss = math.exp(-step / 20) + 0.05 * float(rng.standard_normal())
    row: dict[str, Any] = {
        "step": step,
        "loss": loss,
        "nll": 1 + loss,
        "entropy": 0.5,
        "grad_norm": 10 ** float(rng.normal()),
        "tokens_per_second": 900.0,
    }
    if distils:
        row |= {"reverse_kl": loss, "abs_advantage": 0.5, "off_share": 0.1, "effective_sample_share": 0.9}
        row |= {"reverse_kl_by_position": [loss, loss / 2, 9.0], "tokens_by_position": [64, 128, 3]}
    if step % 20 == 0:
        for name in evaluations:
            row |= {f"eval/{name}/accuracy": 0.5, f"eval/{name}/accuracy_low": 0.4, f"eval/{name}/accuracy_high": 0.6}
    return row
