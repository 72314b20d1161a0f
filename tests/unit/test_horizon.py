"""Which tokens count under `train.loss.horizon`, and in which step."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import make_scored_store
from tiny_models import make_model

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.data.order import cut_lengths
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import build_recipe, load_recipe
from megatron_opd.recipe.objective import Horizon, LossConfig
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.train.batches import BatchSource, MicroBatch, check_lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("horizon")
    make_model(folder / "student", "qwen3", seed=1)
    make_model(folder / "teacher", "qwen3", seed=2)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher", top_k=3)
    return folder


def source_of(folder: Path, horizon: Any = None, **options: Any) -> BatchSource:
    loss = LossConfig.model_validate({"name": "reverse_kl", "horizon": horizon})
    config = TrainStage(
        init=str(folder / "student"), store=str(folder / "store"), global_batch=8, loss=loss, **{"micro_batch_tokens": 96, **options}
    )
    reader = StoreReader(str(folder / "store"), teacher="teacher")
    return BatchSource(
        reader, config, teacher="teacher", sequence_mean=True, dp_rank=0, dp_size=1, pad_multiple=1, topk=True, horizon=loss.horizon
    )


def recipe(loss: dict[str, Any]) -> Recipe:
    return build_recipe({"models": {"teacher": "t", "student": "s"}, "name": "x", "train": {"loss": loss}})


def test_a_constant_horizon_is_a_cut(folder: Path) -> None:
    """Every tensor and count of every micro-batch, and so the loss and its gradient, as with max_response_tokens."""
    ours, theirs = source_of(folder, 7), source_of(folder, max_response_tokens=7)
    assert (ours.all_lengths < source_of(folder).all_lengths).any()
    for step in range(3):
        for mine, other in zip(ours.micro_batches(step), theirs.micro_batches(step), strict=True):
            assert mine.tensors.keys() == other.tensors.keys()
            for name, tensor in mine.tensors.items():
                assert torch.equal(tensor, other.tensors[name]), name
            assert (mine.denominator, mine.sum_squared_lengths) == (other.denominator, other.sum_squared_lengths)


def rows_of(batches: list[MicroBatch]) -> list[tuple[float, ...]]:
    """Of every token that counts: its stored log-probabilities, which tell it apart, and its weight."""
    columns = [[batch.response_positions, batch.student_logp, batch.teacher_logp, batch.weights] for batch in batches]
    return sorted(
        tuple(row) for pieces in columns for row in torch.stack([piece.double() for piece in pieces if piece is not None], 1).tolist()
    )


@pytest.mark.parametrize("step", [0, 2, 5, 9])
def test_each_step_has_the_tokens_of_its_horizon_alone(folder: Path, step: int) -> None:
    """However it is packed; the denominators are those of the tokens that count."""
    schedule = {"start": 2, "end": 17, "steps": 6}
    source, n = source_of(folder, schedule), [2, 2 + 5, 2 + 12, 17][[0, 2, 5, 9].index(step)]
    batches = source.micro_batches(step)
    assert rows_of(batches) == rows_of(source_of(folder, schedule, packing=False).micro_batches(step))
    assert rows_of(batches) == rows_of(source_of(folder, schedule, micro_batch_tokens=400).micro_batches(step))
    counted = 0
    for index in source.step_rollouts(step):
        rollout, scores = source.reader.rollout(int(index)), source.reader.scores(int(index), "teacher")
        kept = min(n, rollout.response_len)
        counted += kept
        at = slice(rollout.prompt_len, rollout.prompt_len + kept)
        expected = np.stack([np.arange(kept), rollout.student_logp[at], scores.logp[at], np.full(kept, np.float32(1 / kept))], 1)
        assert {tuple(row) for row in expected.tolist()} <= set(rows_of(batches))
    assert sum(int(batch.counts[1]) for batch in batches) == counted == len(rows_of(batches))
    assert sum(batch.denominator for batch in batches) == 8
    assert source.lengths(source.step_rollouts(step), step).sum() == sum(batch.num_tokens for batch in batches)


@given(start=st.integers(1, 5000), end=st.integers(1, 5000), steps=st.integers(1, 300))
def test_a_schedule_goes_from_start_to_end_and_stays(start: int, end: int, steps: int) -> None:
    horizon = Horizon(start=start, end=end, steps=steps)
    values = [horizon.at(step) for step in range(steps + 3)]
    assert values[0] == start
    assert set(values[steps:]) == {end}
    assert values == sorted(values, reverse=end < start)
    for step, value in enumerate(values[:steps]):
        assert abs(value - (start + (end - start) * step / steps)) < 1


def test_what_lies_behind_the_longest_horizon_need_not_fit(folder: Path) -> None:
    source = source_of(folder, {"start": 9, "end": 3, "steps": 2}, micro_batch_tokens=30)
    check_lengths(source.reader, source.config)
    assert cut_lengths(source.reader, source.config).max() <= 29


def test_how_a_recipe_says_it() -> None:
    assert recipe({"horizon": 256}).train.loss.horizon == Horizon(start=256, end=256, steps=1)
    assert load_recipe(
        "tiny", ["train.loss.horizon={ start = 4, end = 9, steps = 5 }", "train.loss.horizon.steps=7"]
    ).train.loss.horizon == Horizon(start=4, end=9, steps=7)
    written = recipe({"horizon": {"start": 1, "end": 2, "steps": 3}})
    assert build_recipe(tomllib.loads(written.to_toml())) == written
    assert written.train.longest_response == 2
    assert recipe({}).train.longest_response is None
    for wrong, message in (
        (0, r"train\.loss\.horizon\.start: .*greater than 0 \(got 0\)"),
        (True, r"train\.loss\.horizon: .*\(got True\)"),
        ({"start": 3}, r"train\.loss\.horizon\.end: Field required"),
        ({"start": 3, "end": 4, "stepz": 1}, r"train\.loss\.horizon\.stepz: no such field; did you mean 'steps'"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe({"horizon": wrong})
