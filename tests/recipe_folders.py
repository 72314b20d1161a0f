"""A recipe to extend, in a working folder of its own, and what tests of recipe files do with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.stored import store_recipe

SECRET = "hf_Zq8vXw2Lk9"
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
[eval.a]
prompts = "e.jsonl"
baseline = "sft"
"""


@pytest.fixture
def recipe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def keep(name: str = "tiny", *overrides: str, whole: bool = False) -> Recipe:
    recipe = load_recipe(name, list(overrides))
    store_recipe(recipe, whole=whole)
    return recipe
