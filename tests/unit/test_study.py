"""tools/study: its recipes, its intervals, and what it does when a command fails."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cost.meter import git_commit
from megatron_opd.evaluate.intervals import Interval, difference_interval, proportion_interval, wilson_interval
from megatron_opd.evaluate.rows import Row
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.objective import LossConfig
from megatron_opd.safety.untrusted import read_object

TOOLS = str(Path(__file__).parents[2] / "tools")
sys.path.insert(0, TOOLS)
try:
    from study import arms
    from study.columns import read_columns
    from study.estimates import over_seeds, paired
    from study.plan import Job, Replicate, list_jobs, write_recipes
    from study.report import command
    from study.run import Runner
    from study.settings import Settings
    from study.subject import ARITHMETIC, SMOLLM2
finally:
    sys.path.remove(TOOLS)


@pytest.fixture(scope="module")
def replicate(tmp_path_factory: pytest.TempPathFactory) -> Replicate:
    replicate = Replicate(tmp_path_factory.mktemp("study") / "seed-1", 1, Settings())
    write_recipes(replicate)
    return replicate


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe_with_the_same_budget(arm: Any, replicate: Replicate) -> None:
    recipe = load_recipe(replicate.recipe(arm.name), [])
    assert recipe.train.steps == 200 * arm.times
    assert recipe.train.global_batch == 64
    assert recipe.train.lr == (arm.lr or 1e-3)
    assert recipe.train.loss == LossConfig(**arm.loss)
    assert recipe.train.init == str(replicate.folder / f"start-{arm.student}/sft-hf")
    assert Path(recipe.score.model).name == f"teacher-{arm.teacher}"
    assert recipe.eval["drift"].teacher == recipe.train.init
    assert recipe.rounds.count == (1 if arm.every is None else 200 // arm.every)
    assert recipe.train.loss.needs_topk == (recipe.score.top_k > 0)
    assert (
        recipe.score.allow_teacher_mismatch == recipe.train.allow_teacher_mismatch == (not arm.consistent and arm.scores != "residualize")
    )


def test_names_are_those_of_arms_and_jobs_come_after_what_they_need(replicate: Replicate) -> None:
    names = {arm.name for arm in arms.ARMS} | {"sft-a", "sft-b"}
    assert len(names) == len(arms.ARMS) + 2
    assert {name for pair in arms.COMPARISONS for name in pair} | arms.QUICK <= names
    before: set[str] = set()
    for job in list_jobs([replicate], arms.ARMS):
        assert before.issuperset(job.needs), job.name
        before.add(job.name)


def test_the_quick_arms_have_their_controls() -> None:
    """What differs from an arm in the rate alone, and the student with its own teacher."""
    quick = [arm for arm in arms.ARMS if arm.name in arms.QUICK]
    kinds = [replace(arm, name="", title="", group="") for arm in quick]
    for arm, kind in zip(quick, kinds, strict=True):
        if arm.lr is not None:
            assert replace(kind, lr=None) in kinds, arm.name
        if not arm.consistent and arm.every is None and arm.scores != "residualize":
            assert replace(kind, teacher=arm.student) in kinds, arm.name


def test_a_job_is_the_same_command_whichever_arms_are_chosen(replicate: Replicate) -> None:
    whole = {job.name: job for job in list_jobs([replicate], arms.ARMS)}
    for arm in arms.ARMS:
        for job in list_jobs([replicate], [arm]):
            assert whole[job.name] == job


def test_columns_are_told_by_whose_digit_is_first(tmp_path: Path) -> None:
    responses = ["1+6+0=07,9+3+0=12,7+8+1=16,4+2+1=07,=07627", "6+1+0=07,3+9+0=13,7+5+1=13,", ""]
    rows = [
        Row(0, None, sample, "wrong", 0.0, None, "07627", "", 0.0, {}, "stop", len(text), "", text) for sample, text in enumerate(responses)
    ]
    found = read_columns(["4791+2836:"], rows)  # digits 1 6, 9 3, 7 8, 4 2 of the columns
    assert found.left_first == pytest.approx(4 / 12)
    assert found.right_first == pytest.approx(2 / 12)
    assert found.other_digits == pytest.approx(6 / 12)
    assert found.sums_right == pytest.approx(6 / 12)


def test_an_interval_over_seeds_is_student_s(replicate: Replicate) -> None:
    found = over_seeds([Interval(mean, mean - 0.03, mean + 0.03) for mean in (0.5, 0.6, 0.7)])
    assert found.mean == pytest.approx(0.6)
    assert (found.high - found.low) / 2 == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert found.prompts == pytest.approx(0.03 / math.sqrt(3))
    assert (found.seeds, found.covers) == (3, "seeds and prompts")
    alone = over_seeds([Interval(0.5, 0.4, 0.6)])
    assert (alone.low, alone.high, alone.covers) == (0.4, 0.6, "prompts")
    assert over_seeds([Interval(mean, 0.0, 1.0) for mean in (0.9, 1.0, 0.95)], least=0.0, most=1.0).high == 1.0
    assert over_seeds([Interval(0.001, -0.0009, 0.003)], least=0.0).low == 0.0


def test_seeds_that_agree_are_not_surer_than_their_prompts() -> None:
    """Three seeds at 96.6 % of 600 prompts: the prompts alone give 0.84 points. At 0 % in all of them it is not sure that there is none."""
    found = over_seeds([Interval(mean, mean - 0.0145, mean + 0.0145) for mean in (0.965, 0.967, 0.966)])
    assert (found.high - found.low) / 2 == pytest.approx(0.0145 / math.sqrt(3))
    none = dict.fromkeys(range(600), (0.0, 1.0))
    found = over_seeds([proportion_interval(none)] * 3, least=0.0, most=1.0)
    assert (found.mean, found.low) == (0.0, 0.0)
    assert found.high >= wilson_interval(0, 1800)[1] > 0.002


def test_a_difference_without_one_prompt_that_changed_has_a_width() -> None:
    none, all_right = (dict.fromkeys(range(600), (score, 1.0)) for score in (0.0, 1.0))
    same = paired(none, none)
    assert (same.mean, same.low, same.high) == (0.0, -same.high, pytest.approx(wilson_interval(0, 600)[1]))
    assert paired(all_right, none).low == pytest.approx(1 - 2 * same.high)
    changed = {prompt: (float(prompt % 2), 1.0) for prompt in range(600)}
    assert paired(changed, none) == difference_interval(changed, none)


def test_the_interval_covers_seeds_and_prompts_as_often_as_it_says() -> None:
    """Seeds differ by 5 points, the prompts of an evaluation by 2: what one seed's interval of prompts misses most of the time."""
    rng, hits, alone, times = random.Random(0), 0, 0, 2000
    for _ in range(times):
        means = [0.6 + rng.gauss(0, 0.05) + rng.gauss(0, 0.02) for _ in range(3)]
        found = over_seeds([Interval(mean, mean - 1.96 * 0.02, mean + 1.96 * 0.02) for mean in means])
        hits += found.low <= 0.6 <= found.high
        alone += abs(means[0] - 0.6) <= 1.96 * 0.02
    assert 0.94 <= hits / times <= 0.97
    assert alone / times < 0.7


def test_a_command_that_fails_stops_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    jobs = [
        Job("fails", "score", ("inspect", str(tmp_path / "nothing"))),
        Job("needs-it", "train", ("--help",), ("fails",)),
        Job("alone", "eval", ("--help",)),
    ]
    runner = Runner(tmp_path, lanes=2, say=lambda _: None)
    assert [job.name for job in runner.run(jobs)] == ["fails"]
    assert [job.name for job in runner.left(jobs)] == ["fails", "needs-it"]
    assert "nothing" in runner.log(jobs[0]).read_text()
    assert not runner.log(jobs[1]).exists()
    assert read_object(runner.record(jobs[2]))["commits"] == [git_commit() or "unknown"]
    for other in (Job("alone", "eval", ("--version",)), Job("alone", "eval", ("--help",), recipe_sha256="f" * 64)):
        with pytest.raises(ValueError, match="take another --folder"):
            runner.left([other])


def test_a_recipe_that_changed_is_not_what_was_done(replicate: Replicate, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {job.name: job.recipe_sha256 for job in list_jobs([replicate], arms.ARMS)}
    changed = [replace(arm, loss=arm.loss | {"advantage_clip": 9.0}) if arm.name == "offline-plain" else arm for arm in arms.ARMS]
    monkeypatch.setattr("study.subject.ARMS", changed)
    after = {job.name: job.recipe_sha256 for job in list_jobs([replicate], changed)}
    assert {name for name in before if before[name] != after[name]} >= {"seed-1/offline-plain/train", "seed-1/offline-plain/eval"}
    assert before["seed-1/offline-reverse-kl/train"] == after["seed-1/offline-reverse-kl/train"]


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ([], "make study"),
        (["--quick", "--seeds", "1", "2"], "make study STUDY_ARGS='--quick --seeds 1 2'"),
        (["--subject", "smollm2", "--seeds", "0"], "make study-smollm2 STUDY_ARGS='--seeds 0'"),
    ],
)
def test_the_report_names_a_command_that_works(words: list[str], typed: str) -> None:
    assert command(SMOLLM2 if "smollm2" in words else ARITHMETIC, words) == typed
