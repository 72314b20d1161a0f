"""docs/data.md: the download lines put everything where the shipped recipes look for it, and what it says of sizes and columns holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_opd.data.prompts import read_prompts
from megatron_opd.known_models import known_config, known_prompts
from megatron_opd.model.architecture import parse_architecture
from megatron_opd.recipe_files import load_recipe

TEXT = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
RECIPES = ("opd_4b", "opd_8b", "opd_30b_a3b", "opd_32b_4nodes")


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
    assert recipe.eval is not None
    for model in (recipe.models.teacher, recipe.models.student):
        assert lines[model][1:] == (f"Qwen/{Path(model).name}", False)
        assert re.search(rf"^# {name}\n(hf .*\n)*?hf download \S+ --local-dir {re.escape(model)}$", TEXT, re.MULTILINE), "under its recipe"
    for prompts in (recipe.generate.prompts, recipe.rollout.prompts, recipe.eval.prompts):
        assert lines[prompts][0] == "", "for every recipe"
        assert lines[prompts][2]
        assert known_prompts(prompts) is not None


def test_nothing_is_downloaded_that_no_recipe_reads() -> None:
    recipes = [load_recipe(name) for name in RECIPES]
    read = {model for recipe in recipes for model in (recipe.models.teacher, recipe.models.student)}
    read |= {stage.prompts for recipe in recipes for stage in (recipe.generate, recipe.rollout, recipe.eval) if stage is not None}
    assert set(downloads()) == read


def test_the_sizes_are_arithmetic() -> None:
    rows = re.findall(r"^\| (Qwen3-[^|]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    said = {name: (float(billions), float(size)) for names, billions, size in rows for name in names.split(", ")}
    assert set(said) == {Path(folder).name for folder in downloads() if folder.startswith("models/")}
    for name, figures in said.items():
        config = known_config(name)
        assert config is not None
        parameters = parse_architecture(config, name).num_parameters
        assert figures == (round(parameters / 1e9, 1), round(2 * parameters / 1e9, 1)), name


@pytest.mark.parametrize("name", RECIPES)
def test_the_steps_of_sft_see_each_answer_once(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.generate is not None
    assert recipe.generate.num_prompts == 300_000 == (recipe.sft.steps or 0) * recipe.sft.global_batch


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
