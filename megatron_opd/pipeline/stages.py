"""The stages of a recipe in order, each with the command that does it and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_opd.config import EvalStage, Recipe, require
from megatron_opd.errors import ConfigError
from megatron_opd.rounds import round_recipe

RECIPE = "RECIPE"  # stands in a stage's words for the recipe (a file, a name or a run folder) with its overrides


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `words` follow `megatron-opd`; RECIPE among them stands for the recipe. `runs_on`: 'cpu' needs no GPU, 'serve' inference (of
    `serves`, one model after the other), 'train' the ranks of a training, 'one' one process with both. `round`: from 1, None outside of rounds.
    """

    name: str
    words: tuple[str, ...]
    runs_on: Literal["cpu", "serve", "train", "one"]
    serves: tuple[Literal["teacher", "student"], ...] = ()
    round: int | None = None

    @property
    def label(self) -> str:
        """How people name it, also after --from and --until: 'train', and in the third of several rounds 'train@3'."""
        return self.name if self.round is None else f"{self.name}@{self.round}"

    def command(self, recipe: str, overrides: list[str]) -> list[str]:
        """The words behind `megatron-opd` for this recipe and these overrides."""
        filled: list[str] = []
        for word in self.words:
            filled += [recipe, *overrides] if word == RECIPE else [word]
        return filled


def list_stages(recipe: Recipe) -> list[Stage]:
    """Every stage that the recipe has sections for, in order."""
    stages = [Stage("inputs", ("check", RECIPE, "--stage", "inputs"), "cpu")]
    if recipe.generate is not None:
        stages.append(Stage("generate", ("generate", RECIPE), "serve", ("teacher",)))
    stages.append(Stage("sft", ("sft", RECIPE), "train"))
    if recipe.rollout is not None:
        stages.append(Stage("sft-hf", ("convert", "trained", RECIPE, "--stage", "sft"), "cpu"))
    stages += distillation(recipe)
    if recipe.eval is not None:
        stages += evaluations(recipe)
    stages.append(Stage("report", ("report", recipe.run_dir), "cpu"))
    return stages


def distillation(recipe: Recipe) -> list[Stage]:
    """rollout, score, train and the conversion of its result: once, or as often as the recipe has rounds."""
    if recipe.rollout is None:
        return []
    stages: list[Stage] = []
    count = recipe.rounds.count
    for number in range(1, count + 1):
        which, flag = (None, ()) if count == 1 else (number, ("--round", str(number)))
        stages += [
            Stage("rollout", ("rollout", RECIPE, *flag), "serve", ("student",), which),
            Stage("score", ("score", RECIPE, *flag), "serve", ("teacher",), which),
        ]
        if number == 1:  # the engines stay the same
            stages.append(Stage("engines", ("check", RECIPE, "--engines"), "one", ("student",)))
        stages += [
            Stage("train", ("train", RECIPE, *flag), "train", round=which),
            Stage("opd-hf", ("convert", "trained", RECIPE, *flag), "cpu", round=which),
        ]
    return stages


def evaluations(recipe: Recipe) -> list[Stage]:
    """An evaluation of each model that [eval] names, the distilled student compared with the one before."""
    if recipe.eval is None:
        return []
    return [
        Stage(f"eval-{model}", ("eval", RECIPE, "--of", model), "serve", ("teacher",) if model == "teacher" else ("student", "teacher"))
        for model in recipe.eval.models
    ]


def evaluation_of(recipe: Recipe, model: str) -> Recipe:
    """The recipe with its [eval] section made for one of `eval.models`. Raises ConfigError.

    The student after SFT is called 'sft' and the teacher 'teacher'; the distilled one has the section's own name, and is compared with the
    student after SFT unless the section names another baseline.
    """
    stage: EvalStage = require(recipe.eval, "eval")
    if model == "opd":
        baseline = stage.baseline or ("sft" if "sft" in stage.models and stage.name != "sft" else None)
        return _with_eval(recipe, stage, baseline=baseline)
    if stage.name == model:
        raise ConfigError(f"eval.name = {model!r} is the name of another model's evaluation; give the distilled student's another one")
    directory = recipe.models.teacher if model == "teacher" else require(recipe.rollout, "rollout").model
    return _with_eval(recipe, stage, name=model, model=directory, baseline=None)


def _with_eval(recipe: Recipe, stage: EvalStage, **update: str | None) -> Recipe:
    return recipe.model_copy(update={"eval": stage.model_copy(update=update)})


def recipe_of(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe as a stage sees it: one of a round has that round's store and student; engines are compared in the first."""
    return round_recipe(recipe, 1 if stage.name == "engines" else stage.round)


def upstream(stage: Stage, recipe: Recipe) -> list[tuple[str, int | None]]:
    """Names, with their rounds, of the stages whose results a stage reads."""
    count = recipe.rounds.count
    if stage.name == "rollout" and stage.round is not None and stage.round > 1:
        return [("opd-hf", stage.round - 1)]
    if stage.name == "eval-opd":
        baseline = require(evaluation_of(recipe, "opd").eval, "eval").baseline
        return [("opd-hf", None if count == 1 else count), (f"eval-{baseline}", None)]
    if stage.name == "engines":
        return [("rollout", None if count == 1 else 1)]
    names = {"sft": ["generate"], "sft-hf": ["sft"], "rollout": ["sft-hf"], "eval-sft": ["sft-hf"]}.get(stage.name, [])
    within = {"score": ["rollout"], "train": ["rollout", "score"], "opd-hf": ["train"]}.get(stage.name, [])
    before = [("train", stage.round - 1)] if stage.name == "train" and stage.round is not None and stage.round > 1 else []
    return [*((name, None) for name in names), *((name, stage.round) for name in within), *before]
