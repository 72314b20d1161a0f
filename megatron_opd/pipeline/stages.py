"""The stages of a recipe in order, each with the command that does it and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_opd.evaluate.chosen import evaluation_of, list_evaluations
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.evaluation import Evaluation, round_number
from megatron_opd.recipe.rounds import round_recipe

RECIPE = "RECIPE"  # stands in a stage's words for the recipe (a file, a name or a run folder) with its overrides


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `words` follow `megatron-opd`; RECIPE among them stands for the recipe. `runs_on`: 'cpu' needs no GPU, 'serve' inference (of
    `serves`, one model after the other), 'train' the ranks of a training, 'one' one process with both. `round`: from 1, None outside of rounds.
    `evaluation` and `model`: of an evaluation its name and the model's label.
    """

    name: str
    words: tuple[str, ...]
    runs_on: Literal["cpu", "serve", "train", "one"]
    serves: tuple[Literal["teacher", "student"], ...] = ()
    round: int | None = None
    evaluation: str | None = None
    model: str | None = None

    @property
    def label(self) -> str:
        """How people name it, also after --from and --until: 'train', and in the third of several rounds 'train@3'."""
        return self.name if self.round is None else f"{self.name}@{self.round}"

    def is_meant(self, text: str) -> bool:
        """Whether `text` names it, or several of which it is one: 'train' of rounds, 'eval', 'eval-aime24', 'eval-sft'."""
        if text in (self.label, self.name):
            return True
        return self.evaluation is not None and text in ("eval", f"eval-{self.evaluation}", f"eval-{self.model}")

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
    stages += [*distillation(recipe), *map(evaluation_stage, list_evaluations(recipe))]
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
        if recipe.score.derived:
            stages.append(Stage("derive", ("derive", RECIPE, *flag), "cpu", round=which))
        if number == 1:  # the engines stay the same
            stages.append(Stage("engines", ("check", RECIPE, "--engines"), "one", ("student",)))
        stages += [
            Stage("train", ("train", RECIPE, *flag), "train", round=which),
            Stage("opd-hf", ("convert", "trained", RECIPE, *flag), "cpu", round=which),
        ]
    return stages


def evaluation_stage(evaluation: Evaluation) -> Stage:
    """An evaluation of one model."""
    name, label = evaluation.name, evaluation.label
    own = "teacher" if label == "teacher" else "student"
    serves = (own,) if evaluation.teacher is None or own == "teacher" else (own, "teacher")
    return Stage(f"eval-{name}-{label}", ("eval", RECIPE, name, "--of", label), "serve", serves, evaluation=name, model=label)


def evaluation_at(recipe: Recipe, stage: Stage) -> Evaluation:
    """What a stage evaluates."""
    assert stage.evaluation is not None
    assert stage.model is not None
    return evaluation_of(recipe, stage.evaluation, stage.model)


def recipe_of(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe as a stage sees it: one of a round has that round's store and student; engines are compared in the first."""
    return round_recipe(recipe, 1 if stage.name == "engines" else stage.round)


def upstream(stage: Stage, recipe: Recipe) -> list[tuple[str, int | None]]:
    """Names, with their rounds, of the stages whose results a stage reads."""
    count = recipe.rounds.count
    if stage.name == "rollout" and stage.round is not None and stage.round > 1:
        return [("opd-hf", stage.round - 1)]
    if stage.evaluation is not None:
        baseline = evaluation_at(recipe, stage).baseline
        return [*made_by(recipe, stage), *([(f"eval-{stage.evaluation}-{baseline}", None)] if baseline else [])]
    if stage.name == "engines":
        return [("rollout", None if count == 1 else 1)]
    names = {"sft": ["generate"], "sft-hf": ["sft"], "rollout": ["sft-hf"]}.get(stage.name, [])
    within = {"score": ["rollout"], "derive": ["rollout", "score"], "opd-hf": ["train"]}.get(stage.name, [])
    if stage.name == "train":
        within = ["rollout", "derive" if recipe.train.teacher in recipe.score.derived else "score"]
    before = [("train", stage.round - 1)] if stage.name == "train" and stage.round is not None and stage.round > 1 else []
    return [*((name, None) for name in names), *((name, stage.round) for name in within), *before]


def made_by(recipe: Recipe, stage: Stage) -> list[tuple[str, int | None]]:
    """Name and round of the stage that makes the model of an evaluation; none where the user brings it."""
    if stage.model == "sft":
        return [("sft-hf", None)]
    if stage.model in ("teacher", "base"):
        return []
    count = recipe.rounds.count
    return [("opd-hf", None if count == 1 else round_number(stage.model or "") or count)]
