"""`megatron-opd demo`: the whole way through the same subcommands that a cluster user runs, then a table and a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_opd.config import Recipe
from megatron_opd.convert.staging import whole_directory
from megatron_opd.cost import read_stages
from megatron_opd.data.joined import store_list
from megatron_opd.demo import arithmetic, smollm2
from megatron_opd.durable import make_folder, write_file
from megatron_opd.evaluate.report import evaluation_cells, stage_cells, write_report
from megatron_opd.evaluate.run import describe_difference
from megatron_opd.recipe_files import load_recipe
from megatron_opd.untrusted import read_object


@dataclass(frozen=True)
class Demo:
    """A recipe and what makes its models and prompts; `prepare` may be run again."""

    recipe: str
    prepare: Callable[[Path], None]


def run_demo(model: str, *, run_dir: str | None = None, overrides: list[str]) -> int:
    """Run, or go on with, a demo; returns the exit code of the first stage that fails. Raises UserError."""
    demo = DEMOS[model]
    folder = Path(run_dir or f"runs/demo-{model}")
    settings = [f"run_dir={str(folder)!r}", *overrides]
    recipe = load_recipe(demo.recipe, settings)
    started = time.monotonic()
    make_folder(folder)
    demo.prepare(folder)
    for stage in _stages(recipe):
        command = stage if stage[0] == "inspect" else [*stage, *settings]
        print(f"\n$ megatron-opd {' '.join(command)}", flush=True)
        code = _run(command)
        if code:
            return code
    page = write_report([str(folder)])
    print(summary(folder, seconds=time.monotonic() - started))
    print(f"report: {page}")
    return 0


def _stages(recipe: Recipe) -> list[list[str]]:
    """Subcommands in order."""
    name, folder = recipe.name, recipe.run_dir

    def evaluate(label: str, model: str, *options: str) -> list[str]:
        return ["eval", name, f"eval.name={label}", f"eval.model={model!r}", *options]

    return [
        ["generate", name],
        ["sft", name],
        ["convert", "trained", name, "--stage", "sft"],
        ["rollout", name],
        ["score", name],
        *(["inspect", store] for store in store_list(recipe.train.store)),
        ["check", name],
        ["train", name],
        ["convert", "trained", name],
        evaluate("teacher", recipe.models.teacher),
        evaluate("sft", f"{folder}/sft-hf"),
        evaluate("opd", f"{folder}/opd-hf", "eval.baseline=sft"),
    ]


def _run(command: list[str]) -> int:
    from megatron_opd.cli import main

    return main(command)


def summary(folder: Path, *, seconds: float) -> str:
    """The closing table: models, then the cost of every stage."""
    evaluations = [read_object(folder / "eval" / f"{name}.json") for name in ("teacher", "sft", "opd")]
    models = [["model", "accuracy (95 % interval)", "reverse KL to the teacher, nat/token", "tokens a response", "ended by itself"]]
    models += [evaluation_cells(evaluation) for evaluation in evaluations]
    stages = [["stage", "seconds", "tokens", "tokens/s", "GPU hours"], *(stage_cells(row) for row in read_stages(folder / "stages.jsonl"))]
    return f"\n{_table(models)}\n\n{describe_difference(evaluations[-1])}\n\n{_table(stages)}\n\n{seconds:.0f} s in all"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _prepare_arithmetic(folder: Path) -> None:
    """The shipped teacher, a random student, and prompts of splits that do not overlap."""
    if not (folder / "teacher").exists():
        with whole_directory(folder / "teacher") as staging:
            for path in (resources.files("megatron_opd") / "demo" / "teacher").iterdir():
                write_file(staging / path.name, path.read_bytes())
    if not (folder / "student").exists():
        arithmetic.make_model_dir(folder / "student", **STUDENT)
    for split, count in PROMPTS.items():
        if not (folder / "prompts" / f"{split}.jsonl").exists():
            arithmetic.write_prompts(folder / "prompts" / f"{split}.jsonl", split=split, count=count, seed=0)


def _prepare_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from its package, a cut of ten of its thirty layers, and questions from reasoning-gym."""
    smollm2.make_teacher(folder / "teacher")
    smollm2.make_student(folder / "teacher", folder / "student", layers=10)
    for seed, (split, count) in enumerate({"sft": 384, "rollout": 240, "eval": 60}.items()):
        smollm2.write_prompts(folder / "prompts" / f"{split}.jsonl", count=count, seed=seed)


STUDENT = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "seed": 0}
PROMPTS = {"sft": 500, "rollout": 1600, "eval": 600}
DEMOS = {"arithmetic": Demo("demo", _prepare_arithmetic), "smollm2": Demo("smollm2", _prepare_smollm2)}
