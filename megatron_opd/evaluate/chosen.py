"""Which evaluations a recipe has, and of which models; and whether code that models write may run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from megatron_opd.errors import ConfigError, UserError
from megatron_opd.recipe.config import EvalStage, Recipe, require
from megatron_opd.recipe.evaluation import Evaluation, is_model, is_name, model_order, output_of, round_number
from megatron_opd.recipe.paths import expand_path
from megatron_opd.recipe.rounds import student_after


def directory_of(recipe: Recipe, label: str) -> str:
    """Where the recipe's model called `label` is. Raises ConfigError for one that the recipe does not have."""
    if label in ("teacher", "base"):
        return recipe.models.teacher if label == "teacher" else recipe.models.student
    if label == "sft":
        return require(recipe.rollout, "rollout").model
    number = round_number(label)
    if number is not None and number > recipe.rounds.count:
        raise ConfigError(f"{label}: the recipe has rounds.count = {recipe.rounds.count}")
    return student_after(recipe, number)


def evaluation_of(recipe: Recipe, name: str, label: str, directory: str | None = None) -> Evaluation:
    """The evaluation `name` of one model: of the recipe's own called `label`, or of the one in `directory`. Raises ConfigError."""
    stage = section_of(recipe, name)
    update = {"name": name, "label": label, "model": directory or directory_of(recipe, label), "baseline": stage.baseline_of(label)}
    return Evaluation.model_validate(dict(stage) | update | {"output": str(output_of(recipe.run_dir))})


def section_of(recipe: Recipe, name: str) -> EvalStage:
    """[eval.NAME]. Raises ConfigError where the recipe has none."""
    if (stage := recipe.eval.get(name)) is None:
        listed = f"there are {', '.join(recipe.eval)}" if recipe.eval else "it has none"
        raise ConfigError(f"no evaluation {name!r} in this recipe ({listed}); add a section [eval.{name}], or give its fields as overrides")
    return stage


def list_evaluations(recipe: Recipe, names: Iterable[str] = (), models: Sequence[str] = ()) -> list[Evaluation]:
    """Evaluations model by model, in the order that a run makes those: of `names` (all of the recipe), of each the `models` (its own).

    A model is a label of the run, or LABEL=DIRECTORY. Raises ConfigError.
    """
    given: dict[str, str | None] = {}
    for label, directory in map(_read_model, models):
        if given.setdefault(label, directory) != directory:
            raise ConfigError(f"--of {label}={given[label]} {label}={directory}: one label for two models; give each a label of its own")
    sections = {name: section_of(recipe, name) for name in names or recipe.eval}
    labels = sorted(given or {label for stage in sections.values() for label in stage.models}, key=model_order)
    return [
        evaluation_of(recipe, name, label, given.get(label))
        for label in labels
        for name, stage in sections.items()
        if given or label in stage.models
    ]


def _read_model(text: str) -> tuple[str, str | None]:
    """Label and directory, None for a model of the run. Raises ConfigError."""
    label, sign, directory = text.partition("=")
    if sign and directory and is_name(label) and not is_model(label):
        return label, expand_path(directory)
    if not sign and is_model(label):
        return label, None
    why = f": {label!r} is what a model of the run is called" if sign and is_model(label) else ""
    raise ConfigError(
        f"--of {text}{why}: teacher, base, sft, opd, round-N, or LABEL=DIRECTORY for another model is expected; names of evaluations go before --of"
    )


def check_code_allowed(sections: Mapping[str, EvalStage]) -> None:
    """Raise ConfigError where an evaluation would run programs of models and was not told that it may."""
    if (refusal := code_refusal(sections)) is not None:
        raise ConfigError(refusal)


def code_refusal(sections: Mapping[str, EvalStage]) -> str | None:
    """What would run that was not allowed, how it would be isolated here, and the two ways on; None if there is nothing."""
    names = [name for name, stage in sections.items() if stage.grader == "code" and not stage.allow_code_execution]
    if not names:
        return None
    one, unset = len(names) == 1, ", ".join(f"'eval.{name}'" for name in names)
    allow = " ".join(f"eval.{name}.allow_code_execution=true" for name in names)
    leave = " ".join(f"eval.{name}=null" for name in names)
    return (
        f"{', '.join(f'eval.{name}' for name in names)}: the grader 'code' runs every program that a model answers with, as you, against the "
        f"tests of its prompt; {'it needs' if one else 'they need'} allow_code_execution = true. {_isolation(sections[names[0]])}\n"
        f"  to allow it: {allow}\n"
        f"  to leave {'it' if one else 'them'} out: {leave}, or in a recipe that extends this one unset = [{unset}]"
    )


def _isolation(stage: EvalStage) -> str:
    from megatron_opd.evaluate.code.pool import describe_isolation

    try:
        return f"On this machine programs are kept apart by {describe_isolation(stage.code)}"
    except UserError as error:
        return f"On this machine nothing keeps them apart, and they would not run: {error}"
