"""tools/study with the real language model: its recipes and arms; no model is needed for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_opd.recipe.files import load_recipe

TOOLS = str(Path(__file__).parents[2] / "tools")
sys.path.insert(0, TOOLS)
try:
    from study.plan import Replicate, list_jobs, write_recipes
    from study.subject import SMOLLM2
finally:
    sys.path.remove(TOOLS)


def test_its_arms_share_the_student_and_train_on_every_rollout_once(tmp_path: Path) -> None:
    arms = SMOLLM2.choose(None, quick=False)
    assert [arm.name for arm in arms] == ["offline-plain", "offline-reverse-kl", "naive-plain", "constant"]
    sizes = SMOLLM2.settings
    assert sizes.changed([]) == sizes
    replicate = Replicate(tmp_path / "seed-0", 0, sizes, SMOLLM2)
    write_recipes(replicate)
    recipes = {arm.name: load_recipe(replicate.recipe(arm.name), []) for arm in arms}
    assert {recipe.train.init for recipe in recipes.values()} == {str(tmp_path / "seed-0/start-a/sft-hf")}
    assert {recipe.train.steps * recipe.train.global_batch for recipe in recipes.values()} == {sizes.prompts * sizes.samples}
    assert recipes["naive-plain"].train.allow_off_policy
    assert {name: recipe.score.top_k for name, recipe in recipes.items()} == {arm.name: 8 * (arm.scores == "top_k") for arm in arms}
    for recipe in recipes.values():
        assert set(recipe.eval) == {"sentences", "drift"}
        assert recipe.eval["sentences"].sampling.max_new_tokens == load_recipe("smollm2", []).eval["sentences"].sampling.max_new_tokens
    start = load_recipe(replicate.recipe("start-a"), [])
    assert set(start.eval) == {"sentences"}  # there is no other teacher
    assert not [job.name for job in list_jobs([replicate], arms) if "-b/" in job.name]


def test_an_arm_of_another_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="arm 'a-by-b-plain' needs a teacher B, which smollm2 has not"):
        SMOLLM2.choose(["a-by-b-plain"], quick=False)
