"""Recipes as files: they extend each other, are written down as they were given, and a run's folder stands for its recipe."""

from __future__ import annotations

import os
import random
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_opd.cli import main
from megatron_opd.config import Recipe
from megatron_opd.errors import ConfigError, QuarantineError, UserError
from megatron_opd.recipe_files import apply_overrides, build_recipe, load_recipe, merge, read_tree, shipped_recipes
from megatron_opd.serve.launch import ServerProcess
from megatron_opd.stored_recipe import differences, store_recipe, storing

BASE = """name = "base"
run_dir = "$OUT/{name}"
[models]
teacher = "~/models/big"
student = "{run_dir}/small"
[engine]
urls = ["http://a:1"]
[rollout]
prompts = "{run_dir}/p.jsonl"
sampling = { temperature = 0.7, stop_token_ids = [1, 2] }
[train]
lr = 1e-6
steps = 10
loss = { name = "opd", advantage_clip = 5.0 }
[eval]
prompts = "e.jsonl"
baseline = "sft"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base.toml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", "/scratch/out")
    monkeypatch.setenv("HOME", "/home/me")
    write("base.toml", BASE)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


OVERRIDES = [
    *("train.lr=1e-5", "train.steps=7", "train.steps=null", "train.loss.name=exopd", "train.store=$OUT/{name}.zarr", "run_dir=~/{name}/runs"),
    *("models.teacher=${OUT}/t", "models.student={run_dir}/s", "generate=null", "rollout.num_prompts=3", "eval=null", "score.top_k=4"),
    *('rollout.encoding.system="~ of {someone} costs $5"', "engine.launch.tp=4", "engine.launch.teacher.dp=2", "engine.context_length=64"),
    *('engine.launch.options=["--x=$UNSET"]', 'engine.launch.environment={A = "$OUT"}', "sft.lr=3e-4", "rounds.count=2", "eval.teacher=none"),
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
unset = ["eval.baseline", "train.loss", "rollout.sampling.temperature"]
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
    assert recipe.eval is not None
    assert recipe.eval.baseline is None
    without = load_recipe(write("no_eval.toml", 'name = "n"\nextends = "base.toml"\nunset = ["eval", "run_dir"]\n'))
    assert (without.eval, without.run_dir) == (None, "runs/n")


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
        ('name = "c"\nextends = "base.toml"\nunset = ["eval.basline"]', r"child.toml: unset names 'eval.basline', which 'base.toml' does not set"),
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


# What stands against each other

ENGINES = """
[engine.launch.teacher]
tp = 2
dp = 4
options = ["--big"]
[engine.launch.student]
dp = 8
"""


@pytest.mark.parametrize(
    ("overrides", "teacher", "student"),  # servers, tp, dp
    [
        ([], (1, 2, 4), (1, 1, 8)),
        (["engine.launch.tp=4"], (1, 4, 1), (1, 4, 1)),
        (["engine.launch.servers=2"], (2, 2, 1), (2, 1, 1)),  # --launch 2
        (["engine.launch.servers=2", "engine.launch.tp=4"], (2, 4, 1), (2, 4, 1)),
        (["engine.launch.tp=2", "engine.launch.dp=4"], (1, 2, 4), (1, 2, 4)),  # of a Slurm job
        (["engine.launch.teacher.tp=8"], (1, 8, 4), (1, 1, 8)),
        (["engine.launch.tp=4", "engine.launch.teacher.tp=8"], (1, 8, 1), (1, 4, 1)),
        (["engine.launch.teacher.tp=8", "engine.launch.tp=4"], (1, 8, 1), (1, 4, 1)),
        (["engine.launch.restarts=1"], (1, 2, 4), (1, 1, 8)),
        (["engine.launch={tp = 2}"], (1, 2, 1), (1, 2, 1)),
    ],
)  # fmt: skip
def test_sizes_given_for_all_models_are_not_hidden_by_those_of_one(
    overrides: list[str], teacher: tuple[int, ...], student: tuple[int, ...]
) -> None:
    write("launch.toml", BASE.replace('[engine]\nurls = ["http://a:1"]\n', ENGINES))
    recipe = load_recipe("launch.toml", overrides)
    child = 'name = "child"\nextends = "launch.toml"\n' + tomli_w.dumps(apply_overrides({}, overrides))
    extending = load_recipe(write("child.toml", child)) if overrides != ["engine.launch={tp = 2}"] else recipe
    for made in (recipe, extending):
        for model, wanted in ((made.models.teacher, teacher), (f"{made.run_dir}/sft-hf", student), (made.models.student, student)):
            launch = made.engine_for(model).launch
            assert launch is not None
            assert (launch.servers, launch.tp, launch.dp) == wanted
            assert (launch.teacher, launch.student) == (None, None)


def test_options_of_a_model(tmp_path: Path) -> None:
    write("launch.toml", BASE.replace('[engine]\nurls = ["http://a:1"]\n', ENGINES))

    def options(model: str, *overrides: str) -> list[str] | None:
        launch = load_recipe("launch.toml", list(overrides)).engine_for(model).launch
        return None if launch is None else launch.options

    teacher = "/home/me/models/../models/big"  # the same directory
    assert (options(teacher), options("x")) == (["--big"], [])
    assert options(teacher, "engine.launch.options=['--all']") == ["--all"]
    assert options("/copy", "score.model=/copy") == ["--big"]  # what scores is a teacher, wherever it lies
    assert options("x", 'engine.launch.student={options = ["--small"]}') == ["--small"]
    with pytest.raises(ConfigError, match=r"(?s)with --enable-dp-attention .* engine.launch.teacher.dp counts copies"):
        options("x", "engine.launch.teacher.options=['--enable-dp-attention']")


def test_servers_are_started_with_the_models_own_sizes(tmp_path: Path) -> None:
    write("launch.toml", BASE.replace('[engine]\nurls = ["http://a:1"]\n', ENGINES))
    recipe = load_recipe("launch.toml", ["engine.launch.command=['serve']"])
    for model, wanted in (
        (recipe.models.teacher, "--tp-size 2 --dp-size 4 --base-gpu-id 8 --big"),
        ("x", "--tp-size 1 --dp-size 8 --base-gpu-id 8"),
    ):
        engine = recipe.engine_for(model)
        assert engine.launch is not None
        second = ServerProcess(engine, engine.launch, Path(model), number=1, log_dir=tmp_path)
        assert " ".join(second.command(30000)) == f"serve --model-path {model} --host 127.0.0.1 --port 30000 {wanted}"


SECRET = "hf_Zq8vXw2Lk9"


def test_secrets_of_a_models_options_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("tiny", [f"engine.launch.teacher.options=['--api-key', '{SECRET}', '--other']"])
    text = recipe.to_toml()
    assert SECRET not in text + str(recipe.recorded())
    assert "--other" in text
    again = load_recipe(write("again.toml", text))
    for model, refused in ((again.models.teacher, True), ("x", False)):
        launch = again.engine_for(model).launch
        assert launch is not None
        if refused:
            with pytest.raises(ConfigError, match=r"^engine\.launch\.teacher\.options: a word is \(not kept\)"):
                launch.words()
        else:
            assert launch.words() == ([], [])
    for override in (f"engine.launch.student.options=--api-key={SECRET}", f"engine.launch.student=['{SECRET}']"):
        assert main(["train", "tiny", override]) == 2
        assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "overrides", "kept", "said"),
    [
        ("launch = { tp = 2 }", ["engine.urls=['http://a:1']"], "urls", "engine.launch is not used, as engine.urls is given over it"),
        ('urls = ["http://a:1"]', ["engine.launch.servers=2"], "launch", "engine.urls is not used, as engine.launch is given over it"),
        ("launch = { tp = 2 }", ["engine.kind=transformers"], None, "engine.launch is not used, as engine.kind = 'transformers' is given over it"),
        ('urls = ["http://a:1"]', ["engine.kind=transformers"], None, "engine.urls is not used"),
        ("launch = { tp = 2 }", ["engine.urls=[]"], "launch", ""),
        ("launch = { tp = 2 }", ["engine.urls=['http://a:1']", "engine.launch.tp=1"], "both", ""),
        ('launch = { tp = 2 }\nurls = ["http://a:1"]', [], "both", ""),
        ('launch = { tp = 2 }\nurls = ["http://a:1"]', ["engine.dtype=float32"], "both", ""),
    ],
)  # fmt: skip
def test_servers_that_are_given_go_before_those_of_the_recipe(engine: str, overrides: list[str], kept: str | None, said: str) -> None:
    write("served.toml", BASE.replace('urls = ["http://a:1"]', engine))
    lines: list[str] = []
    recipe = load_recipe("served.toml", overrides, say=lines.append)
    have = {name for name in ("urls", "launch") if getattr(recipe.engine, name)}
    assert have == {"urls": {"urls"}, "launch": {"launch"}, None: set(), "both": {"urls", "launch"}}[kept]
    assert [said in line and line.startswith("served.toml: ") for line in lines] == [True] * bool(said)


def test_a_shipped_recipe_extends_a_shipped_one_whatever_files_there_are() -> None:
    write("opd_8b", 'name = "x"\n[models]\nteacher = "a"\nstudent = "b"\n')
    assert load_recipe("opd_8b_paper").models.student == "models/Qwen3-8B-Base"
    assert load_recipe("opd_8b_paper").train.parallel.tp == 4


def test_addresses_of_the_command_line_serve_a_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "opd_8b", "--url", "http://a:1", "--dry-run"]) == 0
    printed = capsys.readouterr()
    tree = tomllib.loads(printed.out)
    assert tree["engine"]["urls"] == ["http://a:1"]
    assert "launch" not in tree["engine"]
    assert "opd_8b: engine.launch is not used, as engine.urls is given over it" in printed.err
    assert main(["score", "opd_8b", "--launch", "4", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "opd_8b: engine.launch.teacher: dp not used, as engine.launch.servers is given over it" in printed.err
    write("opd.toml", printed.out)
    launch = load_recipe("opd.toml").engine_for("models/Qwen3-32B").launch
    assert launch is not None
    assert (launch.servers, launch.tp, launch.dp) == (4, 2, 1)


def test_the_shipped_servers_fill_a_node() -> None:
    for name in ("opd_4b", "opd_8b", "opd_30b_a3b", "opd_32b_4nodes"):
        recipe = load_recipe(name)
        for model in (recipe.models.teacher, recipe.models.student):
            launch = recipe.engine_for(model).launch
            assert launch is not None
            assert launch.servers * launch.tp * launch.dp == 8


# The folder of a run


def keep(name: str = "tiny", *overrides: str, whole: bool = False) -> Recipe:
    recipe = load_recipe(name, list(overrides))
    store_recipe(recipe, whole=whole)
    return recipe


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
    keep("tiny", "engine.urls=['http://b:2']", "eval.name=other", "train.steps=3")
    assert capsys.readouterr().out == ""
    assert path.read_text() == first
    keep("tiny", "engine.urls=['http://b:2']", "eval.name=other", "train.lr=1e-4", "generate=null")
    lines = capsys.readouterr().out.splitlines()
    assert "recipe.toml: train.lr 0.001 -> 0.0001" in lines
    assert "recipe.toml: train.steps 3 -> (not given)" in lines
    assert "recipe.toml: generate.prompts prompts.jsonl -> (not given)" in lines
    assert not any(section in line for line in lines for section in ("engine", "eval."))
    tree = tomllib.loads(path.read_text())
    assert tree["engine"]["urls"] == ["http://a:1"]
    assert tree["run_dir"] == "runs/{name}"
    keep("tiny", "engine.urls=['http://b:2']", "eval.name=other", "train.lr=1e-4", "generate=null", whole=True)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["recipe.toml: engine.urls ['http://a:1'] -> ['http://b:2']", "recipe.toml: eval.name opd -> other"]
    keep("runs/tiny", "train.lr=1e-4")  # the folder's own recipe, as it is
    assert capsys.readouterr().out == ""


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
        ("name = ", "not TOML.*mend it, or move it away"),
        ("[engine]\nkindd = 3\n", "engine.kindd: no such field.*mend it"),
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


# recipe new


def test_a_new_recipe_extends_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "new", "mine", "--like", "opd_8b", "train.lr=1e-6", "eval.teacher=null", "generate=null"]) == 0
    assert capsys.readouterr().out == "wrote mine.toml, which extends opd_8b\nnext: megatron-opd check mine.toml --stage inputs\n"
    text = 'name = "mine"\nextends = "opd_8b"\nunset = [\n    "generate",\n]\n\n[train]\nlr = 1e-06\n\n[eval]\nteacher = "none"\n'
    assert Path("mine.toml").read_text() == text
    wanted = ["name=mine", "train.lr=1e-6", "eval.teacher=none", "generate=null"]
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
    assert (mine.rollout.sampling.max_new_tokens, mine.rollout.sampling.temperature, opd.rollout.sampling.temperature) == (2048, 1.0, 0.7)
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
