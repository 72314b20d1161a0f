"""The folder of a run stands for its recipe: what is stored there, when, and what of it is said."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_folders import SECRET, keep, write
from recipe_folders import recipe_folder as recipe_folder  # the fixture

from megatron_opd.cli import main
from megatron_opd.errors import ConfigError, QuarantineError, UserError
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.stored import differences, storing

pytestmark = pytest.mark.usefixtures("recipe_folder")


def test_the_folder_of_a_run_stands_for_its_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = keep("tiny", "name=x", "train.lr=0.25", "models.teacher=$OUT/t")
    assert "runs/x/recipe.toml: the settings are kept; later commands take runs/x for the recipe" in capsys.readouterr().out
    for given in ("runs/x", "./runs/x/"):
        assert load_recipe(given).model_dump() == recipe.model_dump()
    os.rename("runs/x", "moved")
    moved = load_recipe("moved", ["train.steps=3"])
    assert (moved.run_dir, moved.train.output, moved.train.steps, moved.train.lr) == ("moved", "moved/opd", 3, 0.25)
    assert load_recipe("moved", ["run_dir=else/{name}"]).run_dir == "else/x"
    monkeypatch.chdir("moved")
    assert load_recipe(".").train.store == "./rollouts.opd.zarr"
    monkeypatch.chdir("..")
    for command in ("generate", "sft", "rollout", "score", "train", "eval", "check", "progress"):
        assert main([command, "moved", "--dry-run"]) == 0
        assert tomllib.loads(capsys.readouterr().out)["run_dir"] == "moved"
    assert main(["convert", "trained", "moved", "--dry-run"]) == 0
    Path("empty").mkdir()
    assert main(["train", "empty"]) == 2
    assert "empty: no recipe.toml in this folder; if a run of an older version made it, give the recipe" in capsys.readouterr().err
    Path("tiny").mkdir()
    assert load_recipe("tiny").run_dir == "runs/tiny"  # a shipped recipe goes before a folder
    with pytest.raises(ConfigError, match=r"tiny: no recipe\.toml"):
        load_recipe("./tiny")


def test_what_changes_in_a_stored_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("runs/tiny/recipe.toml")
    keep("tiny", "engine.urls=['http://a:1']", "train.steps=3")
    first = path.read_text()
    capsys.readouterr()
    keep("tiny", "engine.urls=['http://b:2']", "eval.held_out.num_prompts=7", "train.steps=3")
    assert capsys.readouterr().out == ""
    assert path.read_text() == first
    keep("tiny", "engine.urls=['http://b:2']", "eval.held_out.num_prompts=7", "train.lr=1e-4", "generate=null")
    lines = capsys.readouterr().out.splitlines()
    assert "recipe.toml: train.lr 0.001 -> 0.0001" in lines
    assert "recipe.toml: train.steps 3 -> (not given)" in lines
    assert "recipe.toml: generate.prompts prompts.jsonl -> (not given)" in lines
    assert not any(section in line for line in lines for section in ("engine", "eval."))
    tree = tomllib.loads(path.read_text())
    assert tree["engine"]["urls"] == ["http://a:1"]
    assert tree["run_dir"] == "runs/{name}"
    keep("tiny", "engine.urls=['http://b:2']", "eval.held_out.num_prompts=7", "train.lr=1e-4", "generate=null", whole=True)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [
        "recipe.toml: engine.urls ['http://a:1'] -> ['http://b:2']",
        "recipe.toml: eval.held_out.num_prompts (not given) -> 7",
    ]
    keep("runs/tiny", "train.lr=1e-4")  # the folder's own recipe, as it is
    assert capsys.readouterr().out == ""


def test_the_folder_of_a_version_without_named_evaluations_can_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    """Without its [eval], which is then no longer kept, or with one of now."""
    keep("tiny", "eval=null")
    path = Path("runs/tiny/recipe.toml")
    old = path.read_text() + '\n[eval]\nname = "sft"\nprompts = "p"\n'
    path.write_text(old)
    with pytest.raises(ConfigError, match="or do without it: eval=null"):
        load_recipe("runs/tiny")
    assert main(["progress", "runs/tiny", "eval=null"]) in (0, 3)
    capsys.readouterr()
    keep("runs/tiny", "eval=null")
    assert "recipe.toml: eval.prompts p -> (not given)" in capsys.readouterr().out
    assert load_recipe("runs/tiny").eval == {}
    path.write_text(old)
    keep("tiny", "eval.held_out.num_prompts=3")
    assert load_recipe("runs/tiny").eval["held_out"].num_prompts == 3


def test_a_stored_recipe_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    secret = [f"engine.launch.environment.HF_TOKEN='{SECRET}'", f"engine.launch.command=['x', '--api-key={SECRET}']"]
    keep("tiny", *secret)
    keep("tiny", *secret, "engine.launch.command=['y', '--token=abc']", "train.steps=1", whole=True)
    printed = capsys.readouterr().out
    assert "engine.launch.command ['x', '--api-key=(not kept)'] -> ['y', '--token=(not kept)']" in printed
    assert SECRET not in printed + Path("runs/tiny/recipe.toml").read_text()
    launch = load_recipe("runs/tiny").engine.launch
    assert launch is not None
    with pytest.raises(
        ConfigError, match=r"engine\.launch\.environment\.HF_TOKEN: the value is not kept in a recipe that a run wrote; give it again"
    ):
        launch.variables()
    with pytest.raises(ConfigError, match=r"engine\.launch\.command: a word is \(not kept\)"):
        launch.words()
    again = load_recipe("runs/tiny", secret).engine.launch
    assert again is not None
    assert again.variables()["HF_TOKEN"] == SECRET


def ending_with(error: UserError, work: Callable[[], object], *overrides: str) -> None:
    """A stage that does `work` and ends with `error`."""
    with storing(load_recipe("tiny", list(overrides))):
        work()
        raise error


def test_a_command_that_is_refused_leaves_the_stored_settings(capsys: pytest.CaptureFixture[str]) -> None:
    refused, path = UserError("refused"), Path("runs/tiny/recipe.toml")
    there: list[bool] = []
    with pytest.raises(UserError):
        ending_with(refused, lambda: there.append(path.exists()))
    assert there == [True]
    assert not Path("runs/tiny").exists()
    keep("tiny")
    before = path.read_text()
    with pytest.raises(UserError):
        ending_with(refused, lambda: None, "train.lr=0.5")
    assert path.read_text() == before
    assert capsys.readouterr().out.endswith("recipe.toml: train.lr 0.001 -> 0.5\nrecipe.toml: as it was before this command\n")
    with pytest.raises(UserError):  # another command's settings, meanwhile
        ending_with(refused, lambda: keep("tiny", "train.lr=0.75"), "train.lr=0.5")
    assert load_recipe("runs/tiny").train.lr == 0.75
    with pytest.raises(QuarantineError):
        ending_with(QuarantineError("done, but"), lambda: None, "train.lr=0.5")
    assert load_recipe("runs/tiny").train.lr == 0.5
    with pytest.raises(UserError):  # something was made
        ending_with(refused, lambda: write("busy/logs/x", ""), "run_dir=busy")
    assert load_recipe("busy").run_dir == "busy"


def test_who_writes_a_stored_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    keep("tiny")
    assert not Path("runs").exists()
    monkeypatch.setenv("RANK", "0")
    keep("tiny")
    assert Path("runs/tiny/recipe.toml").exists()
    monkeypatch.delenv("RANK")
    capsys.readouterr()
    write("blocked", "a file where a folder should be")
    keep("tiny", "run_dir=blocked")
    assert capsys.readouterr().out.startswith("WARNING: blocked/recipe.toml is not kept (")
    for broken, message in (
        ("name = ", "not TOML.*fix it, or move it away"),
        ("[engine]\nkindd = 3\n", "engine.kindd: no such field.*fix it"),
    ):
        write("runs/tiny/recipe.toml", broken)
        with pytest.raises(ConfigError, match=f"(?s)runs/tiny/recipe.toml: .*{message}"):
            keep("tiny")
        assert Path("runs/tiny/recipe.toml").read_text() == broken
    write("runs/tiny/recipe.toml", "old_field = 3\n")  # of another version, and of no other command
    keep("tiny")
    assert "recipe.toml: old_field 3 -> (not given)" in capsys.readouterr().out


def test_differences() -> None:
    before = {"a": 1, "b": {"c": [1], "d": {"e": "x\n"}}, "f": 3}
    now = {"a": 1, "b": {"c": [2]}, "f": {"g": 1}, "h": False}
    lines = [r"b.c [1] -> [2]", r"b.d.e x\n -> (not given)", "f 3 -> {'g': 1}", "h (not given) -> False"]
    assert differences(before, now) == lines
    assert differences(now, now) == []
