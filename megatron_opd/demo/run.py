"""`megatron-opd demo`: models and prompts of a demo, then its recipe, as `megatron-opd run` does any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_opd.convert.staging import whole_directory
from megatron_opd.demo import arithmetic, programs, sentences, smollm2
from megatron_opd.demo.language import Language
from megatron_opd.pipeline.run import CommandLine, run_recipe
from megatron_opd.recipe.files import load_recipe
from megatron_opd.safety.durable import make_folder, write_file


@dataclass(frozen=True)
class Demo:
    """A recipe and what makes its models and prompts; `prepare` may be run again."""

    recipe: str
    prepare: Callable[[Path], None]


def run_demo(model: str, command_line: CommandLine, *, run_dir: str | None = None, overrides: list[str]) -> int:
    """Prepare a demo's models and prompts, and run its recipe; returns the exit code of the first stage that fails. Raises UserError."""
    demo = DEMOS[model]
    typed = [demo.recipe, f"run_dir={run_dir or f'runs/demo-{model}'!r}", *overrides]
    recipe = load_recipe(demo.recipe, typed[1:])
    folder = Path(recipe.run_dir)  # an override may have another
    make_folder(folder)
    demo.prepare(folder)
    return run_recipe(recipe, command_line, typed=typed)


def _prepare_arithmetic(folder: Path) -> None:
    """The shipped teacher, a random student, and prompts of splits that do not overlap."""
    _prepare_models(folder, "teacher", arithmetic.LANGUAGE, STUDENT)
    for split, count in PROMPTS.items():
        if not (folder / "prompts" / f"{split}.jsonl").exists():
            arithmetic.write_prompts(folder / "prompts" / f"{split}.jsonl", split=split, count=count, seed=0)


def _prepare_programs(folder: Path) -> None:
    """The same; to train on, rows of all layouts in one file, and a file of each layout to evaluate with."""
    _prepare_models(folder, "programs_teacher", programs.LANGUAGE, STUDENT | programs.ROPE)
    files = {split: (split, programs.LAYOUTS, count) for split, count in PROGRAMS.items() if split != "eval"}
    files |= {layout: ("eval", (layout,), PROGRAMS["eval"]) for layout in programs.LAYOUTS}
    for name, (split, layouts, count) in files.items():
        if not (folder / "prompts" / f"{name}.jsonl").exists():
            programs.write_rows(folder / "prompts" / f"{name}.jsonl", split=split, layouts=layouts, count=count, seed=0)


def _prepare_models(folder: Path, shipped: str, language: Language, student: dict[str, Any]) -> None:
    """The teacher as it is shipped, and a student of random weights."""
    copy_teacher(shipped, folder / "teacher")
    if not (folder / "student").exists():
        language.make_model_dir(folder / "student", **student)


def copy_teacher(shipped: str, target: Path) -> None:
    """Write a teacher of the package (a folder of megatron_opd/demo) as a model directory, where there is none yet."""
    if not target.exists():
        with whole_directory(target) as staging:
            for path in (resources.files("megatron_opd") / "demo" / shipped).iterdir():
                write_file(staging / path.name, path.read_bytes())


def _prepare_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from its package, fifteen of its thirty layers, and prompts of splits that do not overlap."""
    smollm2.make_teacher(folder / "teacher")
    smollm2.make_student(folder / "teacher", folder / "student", **CUT)
    for split, count in SENTENCES.items():
        if not (folder / "prompts" / f"{split}.jsonl").exists():
            sentences.write_prompts(folder / "prompts" / f"{split}.jsonl", split=split, count=count, seed=0)


STUDENT: dict[str, Any] = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "seed": 0}
PROMPTS = {"sft": 500, "rollout": 1600, "eval": 600}
CUT = {"first": 7, "last": 8}  # layers of SmolLM2's thirty
SENTENCES = {"sft": 192, "rollout": 320, "eval": 150}
PROGRAMS = {"sft": 600, "rollout": 800, "eval": 200}
DEMOS = {
    "arithmetic": Demo("demo", _prepare_arithmetic),
    "programs": Demo("programs", _prepare_programs),
    "smollm2": Demo("smollm2", _prepare_smollm2),
}
