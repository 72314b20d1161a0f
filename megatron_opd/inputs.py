"""`check --stage inputs`: what a run starts from (models, prompt files, settings), before anything has cost something.

Every fault is found and named at once. A check raises UserError for its first fault; `Findings.attempt` collects those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.config import Recipe
from megatron_opd.convert.source import open_source
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.hf_config import refuse_quantised, remote_code
from megatron_opd.lineage import fingerprint_model
from megatron_opd.model.architecture import read_architecture
from megatron_opd.serve.engine import SERVE_QUANTISED, uses_sglang
from megatron_opd.tokenizer import check_rows, compare_tokenizers, fingerprint_tokenizer

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
            if str(error) not in self.faults:  # two checks may meet the same one
                self.faults.append(str(error))
            return None


def check_inputs(recipe: Recipe) -> Findings:
    """Look at both models (their weights are hashed, which later stages remember) and the prompt files."""
    found = Findings()
    _check_models(recipe, found)
    _check_prompts(recipe, found)
    return found


def _check_models(recipe: Recipe, found: Findings) -> None:
    arch = found.attempt(read_architecture, recipe.models.student)
    if arch is not None:
        for name, stage in (("sft", recipe.sft), ("train", recipe.train)):
            found.attempt(arch.check_stage, stage, name)
        found.attempt(open_source, recipe.models.student, arch)
    if not uses_sglang(recipe.engine):
        found.attempt(refuse_quantised, recipe.models.teacher, "engine 'transformers'", SERVE_QUANTISED)
    for name, directory in (("student", recipe.models.student), ("teacher", recipe.models.teacher)):
        if (code := found.attempt(remote_code, directory)) is not None:
            found.lines.append(f"{name}: {code}")
        if (model := found.attempt(fingerprint_model, directory)) is not None:
            size = f", {arch.num_parameters / 1e9:.2f} billion parameters" if name == "student" and arch is not None else ""
            found.lines.append(f"{name}: {model.short()}{size}")
            found.attempt(check_rows, model)
    _check_tokenizers(recipe.models.student, recipe.models.teacher, found)


def _check_tokenizers(student: str, teacher: str, found: Findings) -> None:
    """Also of models without sound weights."""
    left, right = found.attempt(fingerprint_tokenizer, student), found.attempt(fingerprint_tokenizer, teacher)
    if (
        left is not None
        and right is not None
        and (foreign := found.attempt(compare_tokenizers, Path(student).name, left, Path(teacher).name, right))
    ):
        tokens = ", ".join(f"{token!r} ({number})" for number, token in sorted(foreign.items())[:5])
        found.lines.append(f"tokenizers: {len(foreign)} added tokens are known to one model alone and must not occur in the data: {tokens}")


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
