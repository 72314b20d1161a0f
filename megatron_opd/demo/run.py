"""`megatron-opd demo`: models and prompts of a demo, then its recipe, as `megatron-opd run` does any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_opd.convert.staging import whole_directory
from megatron_opd.demo import arithmetic, smollm2
from megatron_opd.durable import make_folder, write_file
from megatron_opd.pipeline.run import run_recipe
from megatron_opd.recipe_files import load_recipe


@dataclass(frozen=True)
class Demo:
    """A recipe and what makes its models and prompts; `prepare` may be run again."""

    recipe: str
    prepare: Callable[[Path], None]


def run_demo(model: str, *, run_dir: str | None = None, overrides: list[str]) -> int:
    """Prepare a demo's models and prompts, and run its recipe; returns the exit code of the first stage that fails. Raises UserError."""
    demo = DEMOS[model]
    folder = Path(run_dir or f"runs/demo-{model}")
    typed = [demo.recipe, f"run_dir={str(folder)!r}", *overrides]
    recipe = load_recipe(demo.recipe, typed[1:])
    make_folder(folder)
    demo.prepare(folder)
    return run_recipe(recipe, typed=typed)


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
