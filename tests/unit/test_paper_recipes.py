"""The shipped recipes, field by field, against the paper's values; what differs stands in docs/recipes.md, "Deviations", and there alone.

The values are those of Lightning OPD, arXiv 2604.13010, version 2: its tables of hyperparameters (SFT, OPD) and its evaluation settings.
"""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.recipe.files import load_recipe, read_tree, shipped_recipes

TEXT = (Path(__file__).resolve().parents[2] / "docs/recipes.md").read_text()
RECIPES = [name for name in shipped_recipes() if name.startswith("opd_")]
MATH = {"temperature": 0.6, "top_p": 0.95, "samples_per_prompt": 32, "max_new_tokens": 32768}
CODE = {"temperature": 0.6, "top_p": 0.95, "samples_per_prompt": 4, "max_new_tokens": 40960}
PAPER: dict[str, Any] = {
    "generate.num_prompts": 300_000,
    "generate.prompts": "data/openthoughts3",
    "sft.lr": 8e-5,
    "sft.schedule.decay": "cosine",
    "sft.schedule.warmup_steps": 300,  # a ratio of 0.1
    "sft.schedule.min_lr": 0.0,
    "sft.steps": 3000,
    "rollout.prompts": "data/dapo_math_17k",
    "rollout.sampling.temperature": 0.8,
    "rollout.sampling.top_p": 1.0,
    "rollout.sampling.samples_per_prompt": 1,
    "rollout.sampling.max_new_tokens": 4096,
    "train.lr": 2e-6,
    "train.schedule.decay": "constant",
    "train.schedule.warmup_steps": 0,
    "train.schedule.min_lr": 0.0,  # nothing, at a constant rate
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.98,
    "train.weight_decay": 0.1,
    "train.global_batch": 256,
    "train.steps": 150,
    "train.max_response_tokens": 4096,
    "train.loss.name": "opd",
    "train.loss.advantage_clip": 10.0,
    "train.loss.normalization": "sequence",  # its code
    "train.loss.importance_clip": None,  # its code: one update a batch, so that the weight is 1
    "train.loss.entropy_bonus": 0.0,
    "rounds.count": 1,
    **{f"eval.{name}.sampling.{key}": value for name in ("aime24", "aime25", "hmmt25") for key, value in MATH.items()},
    **{f"eval.{name}.sampling.{key}": value for name in ("lcb_v5", "lcb_v6") for key, value in CODE.items()},
}
QWQ, QWEN = "models/QwQ-32B", "models/Qwen3-32B"
CODE_PROMPTS = {"rollout.prompts": "data/epicoder_func_380k", "rollout.num_prompts": 30_000}
# Of the model: SFT batches in packed sequences of 16,384 tokens, tensor parallelism of the layout that is the paper's, teachers.
OF_MODEL: dict[str, dict[str, Any]] = {
    "opd_4b": {"sft.global_batch_tokens": 256 * 16384, "models.teacher": "models/Qwen3-8B", "models.student": "models/Qwen3-4B-Base"},
    "opd_8b": {"sft.global_batch_tokens": 128 * 16384, "models.teacher": QWEN, "models.student": "models/Qwen3-8B-Base"},
    "opd_30b_a3b": {"models.teacher": "models/Qwen3-30B-A3B-Thinking-2507", "models.student": "models/Qwen3-30B-A3B-Base"},
    "opd_4b_paper": {"train.parallel.tp": 2, "train.micro_batch_tokens": 16384, "train.recompute": "full"},
    "opd_8b_paper": {"train.parallel.tp": 4, "train.micro_batch_tokens": 16384, "train.recompute": "full"},
    "opd_30b_a3b_paper": {"train.parallel.tp": 4, "train.parallel.ep": 8, "train.micro_batch_tokens": 12288, "train.recompute": "full"},
    "opd_4b_code": CODE_PROMPTS,
    "opd_8b_code": CODE_PROMPTS,
    "opd_8b_qwq": {"models.teacher": QWQ, "generate.model": QWQ},
    "opd_8b_sft32b_opdqwq": {"models.teacher": QWQ, "generate.model": QWEN, "score.model": QWQ},
    "opd_8b_sft32b_opdqwq_residual": {"models.teacher": QWQ, "generate.model": QWEN, "score.model": QWQ},
    "opd_8b_sftqwq_opd32b": {"models.teacher": QWEN, "generate.model": QWQ, "score.model": QWEN},
}
# How and where a run is made, not what comes out of it.
HOW = (
    "name", "models.*", "engine.*", "slurm.*", "*.micro_batch_tokens", "*.parallel.*", "*.recompute", "*.save_every", "*.store", "*.output", "*.model",
    "*.init", "*.prompts", "*.precision_aware_optimizer", "*.optimizer_offload", "*.grader", "score.teacher", "train.teacher",
    "*.allow_teacher_mismatch", "score.derived.*",
    "*.seed", "*.epochs", "*.packing", "*.dtype", "*_dtype", "*.loss_chunk_tokens", "*.distributed_optimizer", "*.recompute_modules", "*.async_save",
    "*.keep_last", "*.log_every", "*.wandb_project", "*.process_group_minutes", "*.max_skipped_steps", "*.prompts_per_part", "*.grading_seconds",
    "eval.*.code.*", "eval.*.models", "eval.*.teacher", "run_dir",
    # What would be refused or dropped, and options of other losses and of what is switched off.
    "*.overlong", "*.overlong_prompt", "*.assistant_last", "*.row_system", "*.max_quarantined", "train.max_engine_gap", "score.top_k",
    "train.loss.exopd_scale", "train.loss.constant_advantage", "train.loss.jsd_beta", "train.drift.*", "rounds.*",
)  # fmt: skip


def flat(node: dict[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def paper_of(name: str) -> dict[str, Any]:
    """What the paper has for a recipe: that of the recipe that it extends, and its own. The paper has no run of 32B."""
    base = next((found for found in ("opd_4b", "opd_8b", "opd_30b_a3b") if name.startswith(found)), "")
    return PAPER | OF_MODEL.get(base, {}) | OF_MODEL.get(name, {})


@cache
def deviations() -> list[tuple[str, list[str], Any]]:
    """Of each row of the table: a pattern of fields, the recipes that it is of, and our value."""
    table = TEXT[TEXT.index("### Deviations") :]
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| `(.+?)` \| .+ \| .+ \|$", table.partition("\n## ")[0], re.MULTILINE)
    return [(field, recipes_of(recipes), tomllib.loads(f"value = {ours}")["value"]) for field, recipes, ours in rows]


def recipes_of(column: str) -> list[str]:
    """The recipes of "all", of patterns, or of "all but" patterns."""
    patterns = re.findall(r"`([^`]+)`", column)
    named = [name for name in RECIPES if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in RECIPES if name not in named] if column.startswith("all") else named


def deviation(name: str, field: str) -> list[Any]:
    """Our value of the rows that are of this field and recipe."""
    return [ours for pattern, recipes, ours in deviations() if fnmatchcase(field, pattern) and name in recipes]


@cache
def values_of(name: str) -> dict[str, Any]:
    """Every field of a recipe, defaults included, as TOML has it; a section that is off is None."""
    values = flat(load_recipe(name).model_dump())
    return {field: list(value) if isinstance(value, tuple) else value for field, value in values.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_each_field_is_the_papers_or_a_deviation(name: str) -> None:
    values, paper = values_of(name), paper_of(name)
    for field, wanted in paper.items():
        if field.startswith("generate.") and "generate" in values:  # off
            continue
        ours = deviation(name, field)
        assert len(ours) < 2, f"{field} stands in the table twice"
        assert values[field] == (ours[0] if ours else wanted), field
        assert not ours or ours[0] != wanted, f"{field}: the table has the paper's value"
    given = flat(read_tree(name))
    for field, value in values.items():  # the defaults too, but for what is off
        if field in paper or (field not in given and (value is None or value is False or value == [])):
            continue
        ours = deviation(name, field)
        assert ours or any(fnmatchcase(field, pattern) for pattern in HOW), f"{field} = {value!r} is neither the paper's nor in the table"


@pytest.mark.parametrize("name", RECIPES)
def test_each_row_is_what_its_recipes_have(name: str) -> None:
    values = values_of(name)
    for pattern, recipes, ours in deviations():
        found = {field: value for field, value in values.items() if fnmatchcase(field, pattern)}
        if name not in recipes or (pattern.startswith("generate.") and "generate" in values):  # off
            continue
        assert found, pattern
        for field, value in found.items():
            assert value == (None if field.endswith(".teacher") and ours == "none" else ours), field


def test_each_row_of_the_table_is_of_a_recipe() -> None:
    assert len(deviations()) > 10
    assert all(recipes for _, recipes, _ in deviations())


def test_the_defaults_of_the_papers_sft_tool() -> None:
    """LLaMA-Factory's SFT is built on transformers' Trainer, whose defaults count where the paper names nothing."""
    from transformers import TrainingArguments

    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    sft = load_recipe("opd_8b").sft
    names = {"adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2", "adam_eps": "adam_epsilon", "weight_decay": "weight_decay"}
    for ours, theirs in (names | {"clip_grad": "max_grad_norm"}).items():
        assert getattr(sft, ours) == defaults[theirs], ours


def test_how_often_sft_sees_an_answer() -> None:
    """docs/recipes.md says it for answers of 9,000 tokens on average."""
    for name, tokens, epochs in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE):
        sft = load_recipe(name).sft
        assert sft.steps is not None
        assert sft.global_batch_tokens is not None
        assert round(sft.steps * sft.global_batch_tokens / 1e9, 1) == float(tokens)
        assert round(sft.steps * sft.global_batch_tokens / (300_000 * 9000), 1) == float(epochs)
