"""Derived teachers in a recipe: what it can get wrong, its stages, rounds and jobs."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_opd.errors import ConfigError
from megatron_opd.pipeline.slurm import Cluster, plan_jobs
from megatron_opd.pipeline.stages import list_stages
from megatron_opd.recipe.files import build_recipe, load_recipe
from megatron_opd.recipe.rounds import round_recipe

TREE = {"name": "x", "models": {"teacher": "t", "student": "s"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": {"derived": {"less": {}}}}, r"score\.derived\.less\.method: Field required"),
        ({"score": {"derived": {"less": {"method": "residualize", "fold": 3}}}}, r"score\.derived\.less\.fold: no such field; did you mean 'folds'"),
        ({"score": {"derived": {"less": {"method": "shuffle", "folds": 3}}}}, "method 'shuffle' has no folds; leave it out"),
        ({"score": {"derived": {"teacher": {"method": "shuffle"}}}}, "that is the name of the teacher that it would be made of"),
        ({"score": {"derived": {"a.b": {"method": "shuffle"}}}}, r"derived\.a\.b: this can't be the name of a teacher"),
        ({"score": {"derived": 3}}, r"tables \[score\.derived\.NAME\] are expected"),
        (
            {"score": {"derived": {"less": {"method": "shuffle"}}}, "train": {"teacher": "less", "loss": {"name": "reverse_kl"}}},
            "'reverse_kl' needs a teacher's candidates, and derived scores have none",
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_can_get_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe(TREE | changes)


def test_a_derived_teacher_is_switched_off() -> None:
    recipe = build_recipe(TREE | {"score": {"derived": {"less": {"method": "shuffle"}, "off": None}}})
    assert list(recipe.score.derived) == ["less"]
    assert not recipe.trains_on_any_teacher


def test_slurm_has_a_job_without_gpus() -> None:
    sections = ["score.derived.less.method=residualize", "score.derived.mixed.method=shuffle", "eval=null"]
    recipe = load_recipe("opd_8b", sections)
    jobs = {job.label: job for job in plan_jobs(recipe, "opd_8b", sections, Cluster(recipe.slurm))}
    derive_job = jobs["derive"]
    assert (derive_job.kind, derive_job.after, derive_job.words[:2]) == ("cpu", ("score",), ("derive", "opd_8b"))
    assert not any("gpu" in option for option in derive_job.options)
    order = list(jobs)
    assert order.index("score") < order.index("derive") < order.index("check") < order.index("train")
    assert "derive" not in {job.label for job in plan_jobs(load_recipe("opd_8b", sections[2:]), "opd_8b", [], Cluster(recipe.slurm))}


def test_each_round_has_its_own() -> None:
    recipe = load_recipe("tiny", ["score.derived.less.method=residualize", "train.teacher=less", "rounds.count=2", "rounds.steps=3"])
    labels = [stage.label for stage in list_stages(recipe)]
    assert labels[labels.index("score@2") :][:3] == ["score@2", "derive@2", "train@2"]
    assert round_recipe(recipe, 2).score.derived == recipe.score.derived
    assert round_recipe(recipe, 2).trains_on_any_teacher
