"""docs/recipe-reference.md and `recipe explain`: every field is described, and what they say is what the recipe's classes hold to."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field as Setting
from unit.test_paper_recipes import PAPER

from megatron_opd.cli import main
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import build_recipe, load_recipe
from megatron_opd.recipe.layout import Section
from megatron_opd.recipe.reference.explain import explain_field
from megatron_opd.recipe.reference.fields import BELOW, NAME, Field, all_fields, as_toml, fields_of, find_field
from megatron_opd.recipe.reference.page import reference_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe-reference.md"
FIELDS = {field.path: field for field in all_fields()}


def test_every_field_has_a_description() -> None:
    without = [path for path, field in FIELDS.items() if not field.description]
    assert without == [], "give these fields of a recipe a description, with the unit: Field(..., description=...)"


def test_the_page_is_what_the_command_makes() -> None:
    again = "it is not what the code says: megatron-opd recipe reference > docs/recipe-reference.md"
    assert PAGE.read_text(encoding="utf-8") == reference_page(), again


def test_defaults_are_those_of_a_checked_recipe() -> None:
    """And every field of it is listed."""
    stages = {name: {"prompts": "p"} for name in ("generate", "rollout")}
    given = {"name": "a", "models": {"teacher": "t", "student": "s"}, **stages, "eval": {NAME: {"prompts": "p"}}, "engine": {"launch": {}}}
    todo = [("", tomllib.loads(build_recipe(given).to_toml()))]
    seen = 0
    while todo:
        where, tree = todo.pop()
        for key, value in tree.items():
            path = f"{where}.{key}".lstrip(".")
            if FIELDS[path].section is not None:
                todo.append((path, value))
            elif FIELDS[path].default != "required":
                assert FIELDS[path].default == as_toml(value), path
                seen += 1
    assert seen > 150


def test_sources_of_defaults() -> None:
    """A default that names a source has its value: the paper's as the shipped recipes' test has them, Megatron-Core's as it is installed."""
    from megatron_opd.model.student import TransformerConfig
    from megatron_opd.train.optim import OptimizerConfig

    named = {path: (field.source, tomllib.loads(f"value = {field.default}")["value"]) for path, field in FIELDS.items() if field.source}
    own = ("train.", "sft.lr", "sft.schedule", "rollout.")  # of the sections that the paper has the value for
    paper = {path: value for path, (source, value) in named.items() if source.startswith("arXiv 2604.13010") and path.startswith(own)}
    assert paper == {path: PAPER[path] for path in paper.keys() - {"train.clip_grad"}} | {"train.clip_grad": 1.0}
    assert paper.keys() >= {"train.lr", "sft.lr", "train.schedule.decay", "sft.schedule.decay", "train.adam_beta2", "train.loss.name"}
    megatron = {path: value for path, (source, value) in named.items() if source == "Megatron-Core" and path.startswith("train.")}
    theirs = OptimizerConfig()
    assert megatron == {
        "train.adam_eps": theirs.adam_eps,
        "train.main_grads_dtype": str(theirs.main_grads_dtype).removeprefix("torch."),
        "train.moments_dtype": str(theirs.exp_avg_dtype).removeprefix("torch."),
        "train.recompute_modules": TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1).recompute_modules,
    }
    assert FIELDS["train.loss.exopd_scale"].source == ""
    assert "  default  2e-06, from arXiv 2604.13010\n" in explain_field("train.lr")
    row = next(line for line in reference_page().splitlines() if line.startswith("| `clip_grad` |"))
    assert "| `1.0` | [arXiv 2604.13010](https://arxiv.org/abs/2604.13010) (its code) |" in row


def test_types_bounds_and_defaults() -> None:
    assert FIELDS["train.loss.name"].kind.startswith('"opd", "vopd"')
    assert FIELDS["train.drift.max_off_share"].kind == "number > 0, < 1"
    assert (FIELDS["sft.lr"].default, FIELDS["train.lr"].default) == ("8e-05", "2e-06")
    assert (FIELDS["sft.schedule.decay"].default, FIELDS["train.schedule.decay"].default) == ('"cosine"', '"constant"')
    assert FIELDS["train.store"].kind == "path or list of text"
    assert FIELDS["train.loss_chunk_tokens"].kind == 'whole number > 0 or "all"'
    assert FIELDS["rollout.share"].kind == "[whole number > 0, whole number > 0]"
    assert (FIELDS["rollout.prompts"].default, FIELDS["rollout.num_prompts"].default) == ("required", "off")
    assert (FIELDS["train.fp8"].default, FIELDS["train.parallel"].default) == ("off", BELOW)
    assert find_field("engine.launch.tp", all_bounds=True).kind == "whole number > 0, at most 1048576"
    assert find_field("score.teacher", all_bounds=True).kind == "text of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$"


def test_sections_in_tables_and_unions() -> None:
    class Inner(Section):
        """An inner section.

        More of it."""

        size: int = Setting(default=1, ge=1, description="bytes")

    class Outer(Section):
        """An outer one."""

        by_name: dict[str, Inner] = Setting(default_factory=dict, description="some")
        either: Annotated[Inner | None, "mark"] = None
        words: dict[str, list[Literal["a"]]] = Setting(default={"x": ["a"]}, description="words")

    root = Field("", "", "required", "", section=Outer)
    found = {field.path: field for field in all_fields(root)}
    assert list(found) == ["by_name", "by_name.NAME", "by_name.NAME.size", "either", "either.size", "words"]
    assert found["either"].description == "An inner section."
    assert (found["words"].kind, found["words"].default) == ('table of list of "a" by name', '{ x = ["a"] }')
    assert [field.name for field in fields_of(found["by_name"])] == [NAME]


def test_explain_a_field() -> None:
    text = explain_field("train.loss.advantage_clip")
    assert text.splitlines()[:4] == [
        "train.loss.advantage_clip",
        "  type     number > 0",
        "  default  off",
        f"  what     {FIELDS['train.loss.advantage_clip'].description}",
    ]
    recipe = load_recipe("opd_8b")
    assert f"  {recipe.train.loss.advantage_clip:g}   opd_30b_a3b, " in text
    assert "No shipped recipe sets it otherwise." in explain_field("train.adam_eps")
    assert "(eval.aime24.sampling.top_p," in explain_field("eval.NAME.sampling.top_p")
    assert "(eval" not in explain_field("eval.aime24.sampling.top_p")


def test_explain_a_section() -> None:
    text = explain_field("train.loss")
    assert text.startswith("[train.loss]\n")
    loss: Any = Recipe.model_fields["train"].annotation.model_fields["loss"].annotation  # type: ignore[union-attr]
    assert all(f"\n  {name} " in text or f"\n  [{name}] " in text for name in loss.model_fields)
    assert '  name = "reverse_kl"   demo, ' in text
    assert "\n  aime24   opd_" in explain_field("eval")
    assert "\n  [train]\n" in explain_field("")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("train.los", "did you mean train.loss"),
        ("advantage_clip", "did you mean train.loss.advantage_clip?"),
        ("train.lr.x", "no field 'train.lr.x'"),
        ("zzzz", "'megatron-opd recipe explain' lists the sections"),
    ],
)
def test_what_is_no_field(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        explain_field(path)


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "explain", "rounds.count"]) == 0
    assert capsys.readouterr().out == explain_field("rounds.count") + "\n"
    assert main(["recipe", "reference"]) == 0
    assert capsys.readouterr().out == reference_page()
    assert main(["recipe", "explain", "rounds.cuont"]) == 2
    assert "did you mean rounds.count" in capsys.readouterr().err
