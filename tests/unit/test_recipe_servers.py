"""Servers of a recipe: those of its models, and those that a command line gives."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomli_w
from recipe_folders import BASE, SECRET, write
from recipe_folders import recipe_folder as recipe_folder  # the fixture

from megatron_opd.cli import main
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.files import apply_overrides, load_recipe
from megatron_opd.serve.launch import ServerProcess

pytestmark = pytest.mark.usefixtures("recipe_folder")


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
