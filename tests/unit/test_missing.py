"""What is not there yet: the commands that make it, in order."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.cli import main
from megatron_opd.data.missing import require_made
from megatron_opd.errors import UserError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("tiny", [f"run_dir={str(tmp_path / 'run')!r}"])


def refusal(recipe: Recipe, *paths: str, scored: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        require_made(recipe, *paths, scored=scored)
    return str(caught.value)


SFT = "'megatron-opd generate RECIPE', then 'megatron-opd sft RECIPE', then 'megatron-opd convert trained RECIPE --stage sft'"
TRAIN = f"{SFT}, then 'megatron-opd rollout RECIPE', then 'megatron-opd score RECIPE', then 'megatron-opd train RECIPE'"


def test_the_commands_in_order(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert refusal(recipe, f"{run}/sft.opd.zarr") == f"{run}/sft.opd.zarr is not there: run 'megatron-opd generate RECIPE' first"
    assert refusal(recipe, f"{run}/sft-hf") == f"{run}/sft-hf is not there: run {SFT} first"
    both = refusal(recipe, f"{run}/sft-hf", f"{run}/rollouts.opd.zarr", scored=True)
    assert both == (
        f"{run}/sft-hf, {run}/rollouts.opd.zarr are not there: run {SFT}, then 'megatron-opd rollout RECIPE', then 'megatron-opd score RECIPE' first"
    )
    assert refusal(recipe, f"{run}/opd-hf") == f"{run}/opd-hf is not there: run {TRAIN}, then 'megatron-opd convert trained RECIPE' first"


def test_what_is_there_is_not_made_again(recipe: Recipe, tmp_path: Path) -> None:
    make_model(tmp_path / "run/sft-hf")
    require_made(recipe, str(tmp_path / "run/sft-hf"))
    store = f"{tmp_path}/run/rollouts.opd.zarr"
    assert refusal(recipe, store) == f"{store} is not there: run 'megatron-opd rollout RECIPE' first"
    make_scored_store(Path(store), sampler=tmp_path / "run/sft-hf", teacher=tmp_path / "run/sft-hf")
    require_made(recipe, store)
    assert refusal(recipe, f"{tmp_path}/run/opd").endswith("run 'megatron-opd train RECIPE' first")


def test_what_no_stage_makes_is_left_to_others(recipe: Recipe, tmp_path: Path) -> None:
    require_made(recipe, str(tmp_path / "elsewhere"), recipe.models.teacher)
    alone = load_recipe("tiny", ["generate=null", "rollout=null", "eval=null"])
    require_made(alone, "runs/tiny/sft.opd.zarr", "runs/tiny/rollouts.opd.zarr")


@pytest.mark.parametrize(
    ("words", "named", "last"),
    [
        (["check", "--stage", "sft"], "sft.opd.zarr", "generate"),
        (["sft"], "sft.opd.zarr", "generate"),
        (["check"], "sft-hf, {run}/rollouts.opd.zarr", "score"),
        (["train", "--nproc", "2"], "sft-hf, {run}/rollouts.opd.zarr", "score"),
        (["rollout"], "sft-hf", "convert trained RECIPE --stage sft"),
        (["score"], "rollouts.opd.zarr", "rollout"),
        (["eval", "--of", "opd"], "opd-hf", "convert trained"),
        (["convert", "trained"], "opd", "train"),
        (["convert", "trained", "--stage", "sft"], "sft", "sft"),
    ],
)
def test_every_stage_says_what_to_run_first(
    words: list[str], named: str, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what a person brings is there."""
    make_model(tmp_path / "student")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1"}\n')
    student, run = str(tmp_path / "student"), str(tmp_path / "run")
    place = 2 if words[0] == "convert" else 1
    settings = [f"models.student={student}", f"models.teacher={student}", f"run_dir={run}"]
    settings += [f"{stage}.prompts={prompts}" for stage in ("generate", "rollout", "eval.held_out")]
    assert main([*words[:place], "tiny", *settings, *words[place:]]) == 2
    error = capsys.readouterr().err
    assert f"error: {run}/{named.format(run=run)} " in error
    command = last if "RECIPE" in last else f"{last} RECIPE"
    assert error.strip().endswith(f"'megatron-opd {command}' first")
