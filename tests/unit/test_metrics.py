"""What a step reports: sums by position, drift, rows without NaN, and where rows go."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.recipe.objective import DriftConfig, LossConfig
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.records import LossSums
from megatron_opd.train import metrics
from megatron_opd.train.batches import MicroBatch
from megatron_opd.train.drift import DriftRule, Watch, Watched, advice
from megatron_opd.train.metrics import MetricsLog, Pace, StepFacts, console_line, step_row
from megatron_opd.train.step import StepResult


def batch_of(lengths: list[int], student: np.ndarray, teacher: np.ndarray) -> MicroBatch:
    nothing = torch.empty(0)
    values: dict[str, Any] = dict.fromkeys(MicroBatch.__dataclass_fields__, nothing)
    values["response_positions"] = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    return MicroBatch(**values | {"student_logp": torch.from_numpy(student), "teacher_logp": torch.from_numpy(teacher)})


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=4), seed=st.integers(0, 9), ratio=st.floats(1.01, 10))
def test_sums_by_position_against_a_loop(lengths: list[int], seed: int, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    logp, student, teacher = (-rng.exponential(2.0, sum(lengths)).astype(np.float32) for _ in range(3))
    found = Watched.of(Watch(ratio).sums(torch.from_numpy(logp), batch_of(lengths, student, teacher)).tolist())
    off, kl, tokens = 0, [0.0] * 18, [0] * 18
    token = 0
    for length in lengths:
        for position in range(length):
            off += abs(float(logp[token]) - float(student[token])) > math.log(ratio)
            kl[int(math.log2(position + 1))] += float(logp[token]) - float(teacher[token])
            tokens[int(math.log2(position + 1))] += 1
            token += 1
    assert abs(found.off - off) <= 1  # a ratio within rounding of the limit
    assert found.tokens_by_position == tokens
    assert found.kl_by_position == pytest.approx(kl, abs=1e-3)
    means = found.means_by_position()
    assert len(means) == int(math.log2(max(lengths))) + 1
    assert sum(mean * n for mean, n in zip(means, tokens, strict=False) if mean is not None) == pytest.approx(sum(kl), abs=1e-3)


def test_overlap_is_a_mean_over_the_tokens_it_was_measured_on() -> None:
    logp = np.zeros(4, np.float32)
    watched = Watched.of(Watch().sums(torch.zeros(4), batch_of([4], logp, logp), torch.tensor([0.5, 1.0])).tolist())
    assert (watched.overlap, watched.overlap_tokens) == (1.5, 2.0)
    assert watched.tokens_by_position[:3] == [1, 2, 1]


def test_the_last_class_holds_all_that_follow() -> None:
    logp = np.zeros(1, np.float32)
    batch = batch_of([1], logp, logp - 1)
    for position in (2**17 - 1, 2**17 + 5, 2**30):
        sums = Watch().sums(torch.zeros(1), MicroBatch(**vars(batch) | {"response_positions": torch.tensor([position])}))
        assert Watched.of(sums.tolist()).means_by_position()[-1] == 1.0
        assert Watched.of(sums.tolist()).tokens_by_position[17] == 1


def test_drift_is_counted_in_a_row() -> None:
    config = DriftConfig(max_off_share=0.1, min_effective_share=0.5, patience=2)
    rule = DriftRule(config)
    good, off, thin = ({"off_share": o, "effective_sample_share": e} for o, e in ((0.1, 0.5), (0.2, 0.9), (0.0, 0.4)))
    assert [bool(rule.check(row)) for row in (off, good, thin, off, off, good, off, off)] == [
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    rule = DriftRule(config.model_copy(update={"stop": True}), beyond=4)
    reason = rule.check(thin)
    assert reason == "the effective sample share is 40.0% (limit 50.0%) for 5 steps"
    assert DriftRule(DriftConfig()).check(thin) is None
    rule = DriftRule(config.model_copy(update={"patience": 1}))
    assert rule.check(good | {"effective_sample_share": None}) == "the effective sample share is 0.0% (limit 50.0%) for 1 steps"


@pytest.mark.parametrize(("loss", "first"), [("opd", True), ("vopd", True), ("constant", True), ("reverse_kl", False), ("jsd", False)])
def test_advice_is_what_was_measured(loss: Any, first: bool) -> None:
    """New rollouts at the rate of one store can ruin a student; candidates on the stored ones did most."""
    stage = TrainStage(init="x", store="y", output="runs/x/opd", global_batch=1, lr=1e-3, loss=LossConfig(name=loss))
    text = advice("9 % are off", stage, "mine")
    assert text.startswith("the student has left its rollouts: 9 % are off.")
    candidates, fresh = text.find("train.loss.name=reverse_kl"), text.index("megatron-opd rollout mine rollout.model=runs/x/opd-hf")
    assert (0 < candidates < fresh) is first
    assert "at a lower rate (train.lr, here 0.001)" in text


def result(**sums: float) -> StepResult:
    base = LossSums(
        loss=6.0, denominator=2.0, tokens=4.0, sequences=2.0, nll=8.0, reverse_kl=2.0, entropy=4.0, ratio=4.0, ratio_squared=4.0
    )
    values = vars(base) | sums
    return StepResult(LossSums(**values), Watched(1.0, [2.0, 0.0], [3.0, 0.0]), 0.5, 1e-3, skipped="loss" in sums)


FACTS = StepFacts(
    step=3, epoch=0.5, lengths=np.array([5, 3]), response_lengths=np.array([3, 1]), flops=2e12, micro_batches=2, seconds=2.0,
    data_seconds=0.1, num_ranks=4,
)  # fmt: skip


def test_a_row() -> None:
    row = step_row(result(), FACTS, {"memory_gib": 1.0, "power_watts": 300.0})
    assert (row["loss"], row["nll"], row["reverse_kl"], row["entropy"], row["ratio"]) == (3.0, 2.0, 0.5, 1.0, 1.0)
    assert (row["effective_sample_share"], row["off_share"], row["response_length"], row["response_length_max"]) == (1.0, 0.25, 2.0, 3)
    assert (row["tokens_per_second"], row["model_tflops_per_rank"]) == (4.0, 0.25)
    assert row["reverse_kl_by_position"] == [2 / 3]
    line = console_line(row, total=10, distils=True)
    assert line.startswith("step     3/10  loss +3.0000  reverse KL 0.5000 nat/token")
    assert "300 W/GPU" in line


def test_a_row_has_the_horizon_of_its_step() -> None:
    assert "horizon" not in step_row(result(), FACTS, {"memory_gib": 1.0})
    assert step_row(result(), replace(FACTS, horizon=5), {"memory_gib": 1.0})["horizon"] == 5


def test_a_skipped_step_has_no_nan_in_its_row() -> None:
    row = step_row(result(loss=math.nan), FACTS, {"memory_gib": 1.0})
    assert row["loss"] is None
    assert row["skipped"] is True
    json.loads(json.dumps(row, allow_nan=False))
    assert "SKIPPED" in console_line(row, total=10, distils=True)
    assert console_line(row, total=10, distils=True, left=3725.4).partition("left")[0].endswith("/10  1:02:05 ")
    assert "\n" not in console_line(row, total=10, distils=True, left=3725.4)


def test_the_time_left_is_by_the_last_steps_of_this_process() -> None:
    pace = Pace(over=3)
    now, lefts = 1000.0, []
    for step, seconds in ((101, 60.0), (102, 2.0), (103, 4.0), (104, 6.0), (105, 8.0)):  # a resumed run, whose first step is slow
        now += seconds
        pace.made(step, seconds, now)
        lefts.append(pace.left(110))
    assert lefts == [9 * 60.0, 8 * 2.0, 7 * 3.0, 6 * 4.0, 5 * 6.0], "of the first step its own time; then the mean since, over three"
    pace.made(110, 1.0, now + 5)
    assert pace.left(110) == 0


def config_of(folder: Path) -> TrainStage:
    return TrainStage(init="", store="", output=str(folder))


def write(folder: Path, *, first_step: int, steps: range) -> None:
    log = MetricsLog(folder, config_of(folder), first_step=first_step, settings={})
    for step in steps:
        log.write({"step": step, "loss": 1.0 / step})
    assert log.close() == {}


def test_a_resume_cuts_rows_that_will_be_made_again(tmp_path: Path) -> None:
    write(tmp_path, first_step=0, steps=range(1, 6))
    write(tmp_path, first_step=3, steps=range(4, 7))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_resume_goes_on_over_damaged_rows(tmp_path: Path) -> None:
    write(tmp_path, first_step=0, steps=range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n\xff\n{"loss": 1.0}\n{"step": "two"}\n{"step": null}\n')
    write(tmp_path, first_step=2, steps=range(3, 4))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_rows_are_on_disk_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop asks before a checkpoint, not at each step."""
    log, synced = MetricsLog(tmp_path, config_of(tmp_path), first_step=0, settings={}), []
    log.sync()  # no row yet, no file
    log.write({"step": 1})
    monkeypatch.setattr(metrics, "sync", synced.append)
    log.write({"step": 2})
    assert not synced
    log.sync()
    assert synced == [tmp_path / "metrics.jsonl"]


def test_rows_that_find_no_room_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, config_of(tmp_path), first_step=0, settings={})
    log.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append_jsonl", lambda *args, **options: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log.write({"step": 2})
        assert "No space left on device; rows that are not written are kept until the next checkpoint" in capsys.readouterr().out
        with pytest.raises(OSError, match="No space left"):
            log.sync()
    log.sync()
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
