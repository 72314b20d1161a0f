"""docs/data.md: the download lines put everything where the shipped recipes look for it, and what it says of sizes and columns holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from benchmark_rows import MATH
from pyarrow import parquet

from megatron_opd.data.prompts import read_prompts
from megatron_opd.estimate.known_models import known_config, known_prompts
from megatron_opd.evaluate.code.cases import AssertCase, CallCase, StdinCase
from megatron_opd.evaluate.code.tests_of import tests_of as read_tests
from megatron_opd.model.architecture import parse_architecture
from megatron_opd.recipe.files import load_recipe, shipped_recipes
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import Prompt

TEXT = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
RECIPES = ("opd_4b", "opd_8b", "opd_30b_a3b", "opd_32b_4nodes")
ALL = [name for name in shipped_recipes() if name.startswith("opd_")]


def downloads() -> dict[str, tuple[str, str, bool]]:
    """Folder -> (recipe it stands under or '', repository, whether a data set)."""
    found: dict[str, tuple[str, str, bool]] = {}
    recipe = ""
    for line in TEXT.splitlines():
        if line.startswith("# ") and line[2:] in (*RECIPES, "every one of them"):
            recipe = line[2:] if line[2:] in RECIPES else ""
        words = shlex.split(line) if line.startswith("hf download ") else []
        if words:
            found[words[words.index("--local-dir") + 1]] = (recipe, words[2], "--repo-type" in words)
            assert "--repo-type" not in words or words[words.index("--repo-type") + 1] == "dataset"
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_path_of_a_recipe_is_downloaded_to(name: str) -> None:
    recipe, lines = load_recipe(name), downloads()
    assert recipe.generate is not None
    assert recipe.rollout is not None
    for model in (recipe.models.teacher, recipe.models.student):
        assert lines[model][1:] == (f"Qwen/{Path(model).name}", False)
        assert re.search(rf"^# {name}\n(hf .*\n)*?hf download \S+ --local-dir {re.escape(model)}$", TEXT, re.MULTILINE), "under its recipe"
    for prompts in (recipe.generate.prompts, recipe.rollout.prompts, *(stage.prompts for stage in recipe.eval.values())):
        assert lines[prompts][0] == "", "for every recipe"
        assert lines[prompts][2]
        assert known_prompts(prompts) is not None or "livecodebench" in prompts, "whose window of dates says how many"


def test_what_no_recipe_reads_is_said_to_be_further() -> None:
    recipes = [load_recipe(name) for name in ALL]
    read = {model for recipe in recipes for model in (recipe.models.teacher, recipe.models.student)}
    read |= {stage.prompts for recipe in recipes for stage in (recipe.generate, recipe.rollout, *recipe.eval.values()) if stage is not None}
    before, _, further = TEXT.partition("\n# further benchmarks\n")
    assert read <= set(downloads())
    assert not [folder for folder in set(downloads()) - read if folder in before or folder not in further]


def test_the_sizes_are_arithmetic() -> None:
    rows = re.findall(r"^\| (Qwen3-[^|]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    said = {name: (float(billions), float(size)) for names, billions, size in rows for name in names.split(", ")}
    assert set(said) == {Path(folder).name for folder in downloads() if folder.startswith("models/")}
    for name, figures in said.items():
        config = known_config(name)
        assert config is not None
        parameters = parse_architecture(config, name).num_parameters
        assert figures == (round(parameters / 1e9, 1), round(2 * parameters / 1e9, 1)), name


QUESTION = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("file", "row", "content", "answer"),
    [
        (
            "data/train-00000-of-00001.parquet",
            {"difficulty": 5, "source": "x", "domain": "math", "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
            QUESTION,
            None,
        ),
        (
            "data/dapo-math-17k.parquet",
            {"data_source": "x", "prompt": QUESTION, "ability": "MATH", "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"index": "7"}},
            QUESTION,
            "2",
        ),
        ("data/train-00000-of-00001.parquet", {"instruction": "Write f.", "output": "def f(): ..."}, "Write f.", None),
        (
            "data/train-00000-of-00001.parquet",
            {"id": 60, "problem": "1+1?", "solution": "It is 2.", "answer": "204", "url": "https://example.com", "year": "2024"},
            "1+1?",
            "204",
        ),
    ],
)  # fmt: skip
def test_the_columns_that_are_read(file: str, row: dict[str, Any], content: Any, answer: str | None, tmp_path: Path) -> None:
    """With what `hf download` leaves beside the data."""
    path = tmp_path / file
    path.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist([row, row]), path)
    hidden = tmp_path / ".cache/huggingface/download"
    hidden.mkdir(parents=True)
    (hidden / "train.parquet.metadata").write_text("commit")
    (hidden / "train.parquet").write_text("not a Parquet file")
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / ".gitattributes").write_text("")
    file_read, prompts = read_prompts(tmp_path, unique=True)
    assert file_read.num_prompts == 1
    assert (prompts[0].content, prompts[0].answer) == (content, answer)


def test_every_layout_of_the_table_is_one_that_is_tested() -> None:
    """tests/unit/test_benchmarks.py reads rows of these; a recipe can name the folders below."""
    table = TEXT[TEXT.index("| benchmark | published as |") :].partition("\n\n")[0]
    named = set(re.findall(r"`([\w-]+/[\w-]+)`", table))
    programs = {"livecodebench/code_generation_lite", "openai/openai_humaneval", "google-research-datasets/mbpp"}
    assert named == set(MATH) | programs
    further = [repository for repository in TEXT.partition("\n# further benchmarks\n")[2].partition("```")[0].split() if "/" in repository]
    assert {repository for repository in further if not repository.startswith("data/")} <= named


def test_the_examples_of_the_page_are_read() -> None:
    (question,) = re.findall(r"question = '''\n(.*?)'''", TEXT, re.DOTALL)
    assert EncodingConfig(question=question).put("1+1?").startswith("Question: 1+1?\n")
    examples = re.findall(r'^\{"kind".*$', TEXT, re.MULTILINE)
    assert [type(read_tests(Prompt(0, "", None, {"tests": example})).cases[0]) for example in examples] == [StdinCase, CallCase, AssertCase]
