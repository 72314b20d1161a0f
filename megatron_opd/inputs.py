"""`check --stage inputs`: what a run starts from (models, prompt files, settings), before anything has cost something.

Every fault is found and named at once. A check raises UserError for its first fault; `Findings.attempt` collects those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_opd.config import Recipe
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.lineage import check_same_tokenizer, fingerprint_model
from megatron_opd.model.architecture import read_architecture

T = TypeVar("T")


@dataclass
class Findings:
    """What the checks found: lines for people, and the faults that must be mended."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """The check's result; None if it found a fault, which is kept."""
        try:
            return check(*args, **options)
        except UserError as error:
            self.faults.append(str(error))
            return None


def check_inputs(recipe: Recipe, *, ranks: int | None = None) -> Findings:
    """Look at both models (their weights are hashed, which later stages remember) and the prompt files; `ranks` processes will train."""
    found = Findings()
    if ranks is not None:
        from megatron_opd.train.readiness import check_ranks  # brings torch

        for name, stage in (("sft", recipe.sft), ("train", recipe.train)):
            found.attempt(check_ranks, stage, name, ranks)
    _check_models(recipe, found)
    _check_prompts(recipe, found)
    return found


def _check_models(recipe: Recipe, found: Findings) -> None:
    arch = found.attempt(read_architecture, recipe.models.student)
    if arch is not None:
        for name, stage in (("sft", recipe.sft), ("train", recipe.train)):
            found.attempt(arch.check_stage, stage, name)
    student = found.attempt(fingerprint_model, recipe.models.student)
    teacher = found.attempt(fingerprint_model, recipe.models.teacher)
    if student is not None and arch is not None:
        found.lines.append(f"student: {student.short()}, {arch.num_parameters / 1e9:.2f} billion parameters")
    if teacher is not None:
        found.lines.append(f"teacher: {teacher.short()}")
    if student is not None and teacher is not None:
        found.attempt(check_same_tokenizer, student, teacher)


def _check_prompts(recipe: Recipe, found: Findings) -> None:
    for name, stage in (("generate", recipe.generate), ("rollout", recipe.rollout), ("eval", recipe.eval)):
        if stage is not None and (read := found.attempt(read_prompts, stage.prompts, limit=stage.num_prompts)) is not None:
            found.lines.append(f"{name}: {read[0].num_prompts} prompts in {stage.prompts}")


def raise_faults(faults: list[str]) -> None:
    """Raise UserError for all faults together, if there are any."""
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(f"{len(faults)} faults, all to be mended before anything starts:" + "".join(f"\n  - {fault}" for fault in faults))
