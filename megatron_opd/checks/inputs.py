"""`check --stage inputs`: what a run starts from (models, prompt files, settings), before anything has cost something.

Every fault is found and named at once. A check raises UserError for its first fault; `Findings.attempt` collects those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.convert.source import open_source
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.evaluate.accuracy import check_answers
from megatron_opd.evaluate.chosen import check_code_allowed
from megatron_opd.evaluate.grade import check_package
from megatron_opd.hf.lineage import fingerprint_model, load_tokenizer
from megatron_opd.hf.model_config import refuse_quantised, remote_code
from megatron_opd.hf.tokenizer import check_rows, compare_tokenizers, fingerprint_tokenizer
from megatron_opd.hf.turns import chat_templates, describe_tokens, own_stop_ids, read_turns, turn_end, visible
from megatron_opd.model.architecture import read_architecture
from megatron_opd.recipe.config import EvalStage, Recipe, SampleStage
from megatron_opd.recipe.rounds import check_keep_alive, check_share, round_recipe, student_after
from megatron_opd.records import Prompt
from megatron_opd.serve.encode import describe_encoding, encode_prompts, uses_template
from megatron_opd.serve.engine import SERVE_QUANTISED
from megatron_opd.serve.opening import uses_sglang

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
            if not any(known in str(error) for known in self.faults):  # several checks may meet the same one
                self.faults.append(str(error))
            return None


def check_inputs(recipe: Recipe, *, ranks: int | None = None) -> Findings:
    """Look at both models (their weights are hashed, which later stages remember) and the prompt files; `ranks` processes will train."""
    found = Findings()
    if ranks is not None:
        for name, stage in (("sft", recipe.sft), ("train", recipe.train)):
            found.attempt(stage.check_ranks, name, ranks)
    found.attempt(check_code_allowed, recipe.eval)
    _check_models(recipe, found)
    _check_turns(recipe, found)
    _check_prompts(recipe, found)
    if recipe.rounds.count > 1:
        found.attempt(round_recipe, recipe, 1)
        if recipe.rounds.keep_alive:
            found.attempt(check_keep_alive, recipe)
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
    """Prompt files, and how each stage will write its first prompt; `generate` comes first, as its format is the student's after SFT."""
    teacher = found.attempt(load_tokenizer, recipe.models.teacher)
    after_sft = recipe.models.student if recipe.generate is None else recipe.generate.model
    stages: list[tuple[str, SampleStage | EvalStage, str, str]] = []
    if recipe.generate is not None:
        stages.append(("generate", recipe.generate, recipe.generate.model, recipe.generate.model))
    if recipe.rollout is not None:
        stages.append(("rollout", recipe.rollout, recipe.rollout.model, after_sft))
    stages += [(f"eval.{name}", stage, student_after(recipe, None), after_sft) for name, stage in recipe.eval.items()]
    for name, stage, model, otherwise in stages:
        unique = isinstance(stage, SampleStage) and stage.unique_prompts
        graded = isinstance(stage, EvalStage) and stage.grader != "none"
        split, notes = "test" if isinstance(stage, EvalStage) else "train", list[str]()
        read = found.attempt(
            read_prompts,
            stage.prompts,
            limit=stage.num_prompts,
            subset_seed=stage.subset_seed,
            dates=stage.dates,
            unique=unique,
            answers=graded,
            split=split,
            say=notes.append,
        )
        if read is None:
            continue
        found.lines += [f"{name}: {read[0].num_prompts} {note}" for note in notes]
        # A model that SFT or distillation will make writes prompts as the teacher does, with the same ids.
        model = model if Path(model).is_dir() else otherwise
        tokenizer = teacher if model == recipe.models.teacher else found.attempt(load_tokenizer, model)
        if tokenizer is not None:
            found.lines += found.attempt(_try_encoding, name, model, tokenizer, read[1], stage) or []
        if name == "rollout":
            found.attempt(check_share, recipe, read[0].num_prompts)
        if isinstance(stage, EvalStage):
            _check_answers(name, stage, read[1], found)


def _try_encoding(name: str, model: str, tokenizer: Any, prompts: list[Prompt], stage: SampleStage | EvalStage) -> list[str]:
    """How `model` would get the prompts. Raises UserError for the first that can't be encoded."""
    encoding, templated = stage.encoding, [uses_template(prompt, stage.encoding) for prompt in prompts]
    try:
        turns = read_turns(model, tokenizer, encoding, templated=templated, stop_token_ids=stage.sampling.stop_token_ids)
        encoded = encode_prompts(tokenizer, prompts, turns.encoding)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    first = f"its first prompt: {visible(tokenizer, encoded[0].tolist())}"
    return [f"{name}: {line}" for line in (first, *describe_encoding(tokenizer, prompts, encoding))]


def _check_turns(recipe: Recipe, found: Findings) -> None:
    """Where turns end, and by which template prompts are written."""
    known: dict[str, tuple[Any, dict[int, list[str]]]] = {}
    for role, directory in (("student", recipe.models.student), ("teacher", recipe.models.teacher)):
        tokenizer = found.attempt(load_tokenizer, directory)
        if tokenizer is None or (own := found.attempt(own_stop_ids, directory, tokenizer)) is None:
            continue
        known[role] = tokenizer, own
        end = turn_end(tokenizer)
        closing = (
            "no chat template"
            if tokenizer.chat_template is None
            else f"its chat template closes a turn with {describe_tokens(tokenizer, [end] if end is not None else [])}"
        )
        found.lines.append(f"{role}: stop ids {describe_tokens(tokenizer, own, own)}; {closing}")
    if len(known) < 2 or recipe.generate is None:
        return
    (student, own), (teacher, _) = known["student"], known["teacher"]
    if chat_templates(student) != chat_templates(teacher):
        found.lines.append("the chat templates differ: after SFT the student has the teacher's, by which 'generate' writes its prompts")
    if (end := turn_end(teacher)) is not None and end not in own:
        found.lines.append(f"after SFT the student stops at {describe_tokens(teacher, [end])} too, which ends the teacher's turns")


def _check_answers(name: str, stage: EvalStage, prompts: list[Prompt], found: Findings) -> None:
    """Can the grader read them all? Where the grader is not installed that is only noted: eval may run in another image, and looks again."""
    try:
        check_package(stage.grader)
    except UserError as error:
        found.lines.append(f"{name}: the answers in {stage.prompts} are not looked at here: {error}")
        return
    if stage.grader != "none":
        found.attempt(check_answers, stage, prompts)


def raise_faults(faults: list[str]) -> None:
    """Raise UserError for all faults together, if there are any."""
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(f"{len(faults)} faults, all to be fixed before anything starts:" + "".join(f"\n  - {fault}" for fault in faults))
