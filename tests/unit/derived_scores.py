"""Derived teachers for the unit tests: made, read, and their source scored again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.store_parts import fake_fingerprint, make_scores, scored_store

from megatron_opd.data.derived import derive, plan_derived
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.recipe.derivation import DerivedConfig
from megatron_opd.records import Rollout, TeacherScores
from megatron_opd.store_records import ScoreManifest

SMALL: dict[str, Any] = {"folds": 3, "position_bins": 4, "surprisal_bins": 5, "smoothing": 7.0, "seed": 11}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three parts of four prompts with two samples each."""
    path = str(tmp_path_factory.mktemp("stores") / "scored.opd.zarr")
    scored_store(path, num_prompts=12)
    return path


@pytest.fixture
def url(scored: str, tmp_path: Path) -> str:
    """A copy of it, to be changed."""
    return str(shutil.copytree(scored, tmp_path / "store.opd.zarr"))


def make(url: str | Path, name: str = "less", method: str = "residualize", source: str = "teacher", **settings: Any) -> list[int]:
    """Derive; returns the parts that were made."""
    reader = StoreReader(str(url))
    config = DerivedConfig.model_validate({"method": method} | (SMALL if method == "residualize" else {}) | settings)
    plan = plan_derived(reader, name, config.derivation(source))
    derive(reader, plan)
    return plan.parts


def write_again(url: str, part: int, scores: Sequence[TeacherScores | None], **changes: Any) -> None:
    """Scores of 'teacher' for a part that has none."""
    reader = StoreReader(url)
    record = ScoreManifest(part=part, teacher=fake_fingerprint("teacher"), part_crc32c=reader.parts[part].crc32c, crc32c={}, **changes)
    write_scores(reader.location, "teacher", record, reader.part_rollouts(part), scores)


def score_again(url: str, part: int) -> None:
    """Other scores of the teacher for one part."""
    shutil.rmtree(Path(url, f"parts/{part:06d}/teacher/teacher"))
    write_again(url, part, make_scores(StoreReader(url).part_rollouts(part), seed=99))


def scored_of(url: str, teacher: str = "teacher") -> list[tuple[Rollout, TeacherScores]]:
    """Rollouts as training sees them, with the scores."""
    reader = StoreReader(url, teacher=teacher)
    return [(reader.rollout(index), reader.scores(index, teacher)) for index in range(len(reader))]


def by_name(url: str, teacher: str) -> dict[tuple[int, int], bytes]:
    return {(rollout.prompt_index, rollout.sample_index): scores.logp.tobytes() for rollout, scores in scored_of(url, teacher)}
