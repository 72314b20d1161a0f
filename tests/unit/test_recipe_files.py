"""Recipes as files: they extend each other, are written down as they were given, and new ones are made."""

from __future__ import annotations

import os
import random
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from recipe_folders import BASE, keep, write
from recipe_folders import recipe_folder as recipe_folder  # the fixture

from megatron_opd.cli import main
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.files import apply_overrides, build_recipe, load_recipe, merge, read_tree, shipped_recipes

pytestmark = pytest.mark.usefixtures("recipe_folder")


OVERRIDES = [
    *("train.lr=1e-5", "train.steps=7", "train.steps=null", "train.loss.name=exopd", "train.store=$OUT/{name}.zarr", "run_dir=~/{name}/runs"),
    *("models.teacher=${OUT}/t", "models.student={run_dir}/s", "generate=null", "rollout.num_prompts=3", "eval=null", "score.top_k=4"),
    *('rollout.encoding.system="~ of {someone} costs $5"', "engine.launch.tp=4", "engine.launch.teacher.dp=2", "engine.context_length=64"),
    *('engine.launch.options=["--x=$UNSET"]', 'engine.launch.environment={A = "$OUT"}', "sft.lr=3e-4", "rounds.count=2", "eval.a.teacher=none"),
]  # fmt: skip


def drawn(seed: int) -> list[str]:
    generator = random.Random(seed)
    picked = generator.sample(OVERRIDES, generator.randrange(8))
    return [word for word in picked if not (word.startswith("eval.") and "eval=null" in picked)]


# Written down


@pytest.mark.parametrize("name", [*shipped_recipes(), "base.toml"])
def test_what_is_written_down_is_the_recipe_under_any_name(name: str) -> None:
    """`build(to_toml(x)) == x`, and with another name it is what the overrides make under that name."""
    for seed in range(8):
        overrides = drawn(seed)
        recipe = load_recipe(name, overrides)
        tree = tomllib.loads(recipe.to_toml())
        assert build_recipe(tree) == recipe, overrides
        assert build_recipe(tree).to_toml() == recipe.to_toml()
        renamed = build_recipe(tree | {"name": "other"})
        assert renamed == load_recipe(name, [*overrides, "name=other"]), overrides
        assert "base" not in str(renamed.model_dump(include={"run_dir", "sft", "train"}))


def test_placeholders_and_variables_are_written_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("base.toml")
    assert recipe.run_dir == "/scratch/out/base"
    assert (recipe.models.teacher, recipe.models.student) == ("/home/me/models/big", "/scratch/out/base/small")
    tree = tomllib.loads(recipe.to_toml())
    assert tree["run_dir"] == "$OUT/{name}"
    assert tree["models"] == {"teacher": "~/models/big", "student": "{run_dir}/small"}
    assert tree["score"]["model"] == "{teacher}"
    assert tree["sft"]["init"] == "{student}"
    assert tree["train"]["schedule"]["decay"] == "constant"
    monkeypatch.setenv("OUT", "/elsewhere")
    assert build_recipe(tree | {"name": "b"}).rollout.prompts == "/elsewhere/b/p.jsonl"  # pyright: ignore[reportOptionalMemberAccess]


def test_a_changed_copy_is_written_as_it_was_changed() -> None:
    recipe = load_recipe("base.toml")
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 0.5, "init": "/round1"})})
    tree = tomllib.loads(changed.to_toml())
    assert (tree["train"]["lr"], tree["train"]["init"]) == (0.5, "/round1")
    assert tree["train"]["output"] == "/scratch/out/base/opd"  # a section that was given
    assert tree["sft"]["output"] == "{run_dir}/sft"
    assert build_recipe(tree).model_dump() == changed.model_dump()
    moved = recipe.model_copy(update={"name": "moved"})
    tree = tomllib.loads(moved.to_toml())
    assert tree["sft"]["output"] == "/scratch/out/base/sft"  # what was filled in with another name stays so
    assert build_recipe(tree).model_dump() == moved.model_dump()
    assert recipe.model_copy() == recipe
    assert recipe.model_copy(deep=True).to_toml() == recipe.to_toml()


def test_a_dry_run_prints_what_can_be_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "base.toml", "--dry-run", "train.lr=0.25"]) == 0
    printed = capsys.readouterr()
    assert 'run_dir = "$OUT/{name}"' in printed.out
    write("again.toml", printed.out)
    assert load_recipe("again.toml") == load_recipe("base.toml", ["train.lr=0.25"])
    assert sorted(os.listdir()) == ["again.toml", "base.toml"]


# extends


def test_a_child_wins_field_by_field() -> None:
    child = """name = "child"
extends = "base.toml"
unset = ["eval.a.baseline", "train.loss", "rollout.sampling.temperature"]
[rollout.sampling]
stop_token_ids = [7]
[train]
lr = 3e-6
loss = { name = "forward_kl" }
"""
    recipe = load_recipe(write("child.toml", child))
    assert recipe.run_dir == "/scratch/out/child"
    assert (recipe.train.lr, recipe.train.steps, recipe.train.loss.name, recipe.train.loss.advantage_clip) == (3e-6, 10, "forward_kl", None)
    assert recipe.rollout is not None
    assert (recipe.rollout.sampling.stop_token_ids, recipe.rollout.sampling.temperature) == ([7], 1.0)
    assert recipe.rollout.prompts == "/scratch/out/child/p.jsonl"
    assert recipe.eval["a"].baseline is None
    without = load_recipe(write("no_eval.toml", 'name = "n"\nextends = "base.toml"\nunset = ["eval", "run_dir"]\n'))
    assert (without.eval, without.run_dir) == ({}, "runs/n")


def test_a_chain_is_what_its_recipes_make_laid_over_each_other() -> None:
    layers: list[dict[str, Any]] = [apply_overrides({}, [word for word in drawn(seed) if "null" not in word]) for seed in range(20, 26)]
    layers = [{key: value for key, value in layer.items() if key not in ("engine", "rounds")} for layer in layers]
    write("0.toml", tomli_w.dumps(tomllib.loads(BASE) | {"run_dir": "runs/{name}"}))
    whole: dict[str, Any] = tomllib.loads(Path("0.toml").read_text())
    for number, layer in enumerate(layers, start=1):
        layer |= {"run_dir": f"r{number}/{{name}}"}
        write(f"{number}.toml", tomli_w.dumps({"name": f"n{number}", "extends": f"{number - 1}.toml"} | layer))
        whole = merge(whole, layer) | {"name": f"n{number}"}
        assert load_recipe(f"{number}.toml") == build_recipe(whole)


def test_a_base_is_found_from_the_file_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write("shared/site.toml", 'extends = "../base.toml"\n[train]\nsteps = 3\n')  # a layer between needs no name
    write("mine/one.toml", 'name = "one"\nextends = "../shared/site.toml"\n')
    assert load_recipe("mine/one.toml").train.steps == 3
    monkeypatch.chdir("mine")
    assert load_recipe("one.toml").name == "one"
    monkeypatch.setenv("RECIPES", str(Path("../shared").resolve()))
    write("two.toml", 'name = "two"\nextends = "$RECIPES/site.toml"\n')
    assert load_recipe("two.toml").train.steps == 3
    for name in ("tiny", "tiny.toml"):
        write("three.toml", f'name = "three"\nextends = "{name}"\n[train]\nlr = 0.5\n')
        assert load_recipe("three.toml") == load_recipe("tiny", ["name=three", "train.lr=0.5"])
    write("tiny.toml", 'name = "x"\n[models]\nteacher = "a"\nstudent = "b"\n')  # a file goes before a shipped recipe
    assert load_recipe("three.toml").models.teacher == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "base.toml"', r"child.toml extends 'base.toml', and needs a name of its own"),
        ('name = "base"\nextends = "base.toml"', r"child.toml extends 'base.toml', but has the name of base.toml, 'base'"),
        ('name = "c"\nextends = "gone.toml"', r"child.toml extends 'gone.toml': no file gone.toml, and no shipped recipe of that name; there are .*tiny"),
        ('name = "c"\nextends = "broken.toml"', r"child.toml extends 'broken.toml': broken.toml: not TOML"),
        ('name = "c"\nextends = "latin.toml"', r"child.toml extends 'latin.toml': latin.toml: not TOML"),
        ('name = "c"\nextends = "child.toml"', r"child.toml extends 'child.toml': recipes extend each other in a circle: child.toml -> child.toml"),
        ('name = "c"\nextends = "around.toml"', r"child.toml extends 'around.toml': around.toml extends 'child.toml': .* circle: child.toml -> around.toml -> "),
        ('name = "c"\nextends = "$NOWHERE/base.toml"', r"child.toml extends '\$NOWHERE/base.toml': the environment variable \$NOWHERE is not set"),
        ('name = "c"\nextends = ["base.toml"]', r"child.toml: extends must be the path of a recipe"),
        ('name = "c"\nextends = ""', r"child.toml: extends must be the path of a recipe"),
        ('name = "c"\nextends = "."', r"child.toml extends '.': no file"),
        ('name = "c"\nextends = "base.toml"\nunset = "rollout"', r"child.toml: unset must be a list of fields"),
        ('name = "c"\nextends = "base.toml"\nunset = ["eval.a.basline"]', r"child.toml: unset names 'eval.a.basline', which 'base.toml' does not set"),
        ('name = "c"\nextends = "base.toml"\nunset = ["name.x.y"]', r"child.toml: unset names 'name.x.y', which"),
        ('name = "c"\nunset = ["rollout"]', r"child.toml: unset takes fields from the recipe that this one extends, and it extends none"),
        ('name = "c"\nextends = "fixed.toml"', r"child.toml extends 'fixed.toml', whose run_dir = '/data/run' is without \{name\}.*give run_dir here"),
        ('name = "c"\nextends = "below.toml"', r"child.toml extends 'below.toml', whose run_dir = '/data/run' is without \{name\}"),
        ('name = "c"\nextends = "base.toml"\n[train]\nlrr = 3', r"child.toml: 1 field\(s\) wrong\n  train.lrr: no such field; did you mean 'lr'"),
        ('name = "c"\n[models]\nextends = "base.toml"', r"child.toml: 3 .*models.extends: no such field"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_extending_names_both_files(text: str, message: str) -> None:
    write("broken.toml", "name = ")
    Path("latin.toml").write_bytes(b'name = "\xff"')
    write("around.toml", 'name = "a"\nextends = "child.toml"\n')
    write("fixed.toml", BASE.replace("$OUT/{name}", "/data/run"))
    write("below.toml", 'extends = "fixed.toml"\n')
    write("child.toml", text)
    with pytest.raises(ConfigError, match=f"(?s)^{message}"):
        load_recipe("child.toml")
    if "fixed" in text:
        write("child.toml", f'{text}\nrun_dir = "mine"\n')
        assert load_recipe("child.toml").run_dir == "mine"


def test_a_chain_has_a_bound() -> None:
    for number in range(1, 15):
        write(f"{number}.toml", f'name = "n{number}"\nextends = "{f"{number - 1}.toml" if number > 1 else "base.toml"}"\n')
    assert load_recipe("9.toml").train.steps == 10
    with pytest.raises(ConfigError, match=r"14.toml extends .*more than 10 recipes extend each other"):
        load_recipe("14.toml")


# recipe new


def test_a_new_recipe_extends_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["recipe", "new", "mine", "--like", "opd_8b", "train.lr=1e-6", "eval.aime24.teacher=null", "eval.lcb_v6=null", "generate=null"]
        )
        == 0
    )
    assert capsys.readouterr().out == "wrote mine.toml, which extends opd_8b\nnext: megatron-opd check mine.toml --stage inputs\n"
    text = 'name = "mine"\nextends = "opd_8b"\nunset = [\n    "eval.lcb_v6",\n    "generate",\n]\n\n[train]\nlr = 1e-06\n'
    text += '\n[eval.aime24]\nteacher = "none"\n'
    assert Path("mine.toml").read_text() == text
    wanted = ["name=mine", "train.lr=1e-6", "eval.aime24.teacher=none", "eval.lcb_v6=null", "generate=null"]
    assert load_recipe("mine.toml") == load_recipe("opd_8b", wanted)
    assert main(["recipe", "new", "mine", "--like", "tiny"]) == 2
    assert "mine.toml is there already" in capsys.readouterr().err
    assert Path("mine.toml").read_text() == text


@pytest.mark.parametrize("seed", range(6))
def test_a_new_recipe_is_the_old_one_with_these_fields(seed: int) -> None:
    overrides = [word for word in drawn(seed) if "{someone}" not in word]
    keep("base.toml", "run_dir=runs/{name}")
    for like in ("tiny", "opd_30b_a3b", "base.toml", "runs/base"):
        name = f"new-{like.replace('/', '-').removesuffix('.toml')}"
        assert main(["recipe", "new", name, "--like", like, *overrides]) == 0
        tree = read_tree("runs/base/recipe.toml" if like == "runs/base" else like)
        Path("whole.toml").write_text(tomli_w.dumps(tree))
        assert load_recipe(f"{name}.toml") == load_recipe("whole.toml", [f"name={name}", *overrides])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "--like", "opd_9b"], "no recipe 'opd_9b'"),
        (["base", "--like", "base.toml"], "base.toml is there already"),
        (["opd_8b", "--like", "opd_8b"], "opd_8b.toml.* has the name of opd_8b"),
        (["a b", "--like", "tiny"], r"name: .*\(got 'a b'\)"),
        (["mine", "--like", "tiny", "train.lrr=3"], "train.lrr: no such field; did you mean 'lr'"),
        (["mine", "--like", "tiny", "name=x"], "name is not given as FIELD=VALUE"),
        (["mine", "--like", "tiny", "extends=x"], "extends is not given as FIELD=VALUE"),
        (["mine", "--like", "fixed.toml"], "run_dir = '/data/run' is without"),
        (["mine", "--like", "."], "no recipe.toml in this folder"),
        (["mine", "--like", "tiny", "=oops"], "is not of the form section.field=value"),
    ],
)
def test_a_new_recipe_that_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("fixed.toml", BASE.replace("$OUT/{name}", "/data/run"))
    before = sorted(os.listdir())
    assert main(["recipe", "new", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir()) == before


# The documentation

RECIPES_MD = (Path(__file__).resolve().parents[2] / "docs/recipes.md").read_text()


def test_the_recipes_of_the_documentation() -> None:
    for block in re.findall(r"```toml\n# (\S+)\n(.*?)```", RECIPES_MD, flags=re.DOTALL):
        write(*block)
    mine, served, opd = load_recipe("mine.toml"), load_recipe("served.toml"), load_recipe("opd_8b")
    assert (mine.run_dir, mine.train.lr, mine.train.loss.name, mine.score.top_k, mine.sft.steps) == (
        "runs/mine",
        1e-6,
        "forward_kl",
        64,
        None,
    )
    assert mine.rollout is not None
    assert opd.rollout is not None
    assert (mine.rollout.prompts, mine.models) == (opd.rollout.prompts, opd.models)
    assert (mine.rollout.sampling.max_new_tokens, mine.rollout.sampling.temperature, opd.rollout.sampling.temperature) == (2048, 1.0, 0.8)
    teacher, student = served.engine_for(served.models.teacher).launch, served.engine_for("x").launch
    assert teacher is not None
    assert student is not None
    assert (teacher.tp, teacher.dp, student.tp, student.dp) == (4, 2, 1, 8)
    assert teacher.command == student.command == [".venv-serve/bin/python", "-m", "sglang.launch_server"]
    assert student.options == ["--mem-fraction-static", "0.7"]


def test_the_commands_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for line in re.findall(r"^megatron-opd (.*?)(?: +#.*)?$", RECIPES_MD, flags=re.MULTILINE):
        words = line.split()
        if words[1] == "runs/mine":
            keep("mine.toml")
        capsys.readouterr()
        assert main(words if words[0] == "recipe" else [*words, "--dry-run"]) == 0, line
        printed = capsys.readouterr().out
        if words[:2] == ["score", "opd_8b"]:
            launch = build_recipe(tomllib.loads(printed)).engine_for("models/Qwen3-32B").launch
            assert launch is not None
            sizes.append((launch.servers, launch.tp, launch.dp))
    assert sizes == [(1, 2, 4), (4, 2, 1), (2, 4, 1), (1, 4, 2)]
