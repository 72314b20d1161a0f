"""Training on responses that the student did not sample: refused, or allowed and recorded; and what it warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import make_scored_store
from tiny_models import make_model
from unit.derived_scores import make

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import LineageError, StoreError, UserError
from megatron_opd.hf.lineage import fingerprint_model, read_lineage, write_lineage
from megatron_opd.recipe.config import ScoreStage
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.records import Lineage
from megatron_opd.serve.score import score_store
from megatron_opd.train.readiness import Readiness, check_train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("off_policy")
    for seed, name in enumerate(("student", "other", "strangers", "teacher", "stranger")):
        make_model(folder / name, "qwen3", seed=seed)
    for name in ("student", "other"):
        write_lineage(
            folder / name, Lineage(sft_teacher=fingerprint_model(folder / "teacher"), overrides=["an earlier one"]), for_weights=True
        )
    make_model(folder / "unknown", "qwen3", seed=5)
    write_lineage(folder / "strangers", Lineage(sft_teacher=fingerprint_model(folder / "stranger")), for_weights=True)
    for name, role in (("student", "student"), ("teacher", "teacher"), ("stranger", "teacher"), ("measured", "evaluation")):
        sampler = folder / ("student" if name == "measured" else name)
        make_scored_store(folder / f"of_{name}", sampler=sampler, teacher=folder / "teacher", prompts=5, sampler_role=role)
    return folder


def check(folder: Path, store: str, *, init: str = "student", **options: Any) -> Readiness:
    return check_train(TrainStage(init=str(folder / init), store=str(folder / store), global_batch=10, **options))


def test_the_teachers_own_answers(folder: Path) -> None:
    with pytest.raises(
        StoreError, match=r"answers of a teacher; .*train\.allow_off_policy=true trains on them all the same, and is recorded"
    ):
        check(folder, "of_teacher")
    ready = check(folder, "of_teacher", allow_off_policy=True)
    earlier, override = ready.lineage.overrides
    assert earlier == "an earlier one"  # the student's own lineage, not the store's
    assert override.startswith("off-policy responses allowed: sampled by the teacher teacher (")
    assert ready.lineage.sft_teacher == ready.lineage.opd_teacher == fingerprint_model(folder / "teacher")
    assert f"WARNING: {override}" in ready.notes
    assert any("--model TEACHER" in note for note in ready.notes)
    assert check(folder, "of_teacher", allow_off_policy=True, loss={"importance_clip": 1.0, "advantage_clip": 0.5}).notes == ready.notes


def test_another_students_rollouts(folder: Path) -> None:
    with pytest.raises(LineageError, match=r"holds rollouts of student \(.*but training starts from other \(.*allow_off_policy"):
        check(folder, "of_student", init="other")
    override = check(folder, "of_student", init="other", allow_off_policy=True).lineage.overrides[-1]
    assert override.startswith("off-policy responses allowed: sampled by student (")
    assert ", trained from other (" in override


def test_its_own_rollouts_need_no_permission_and_are_no_exception(folder: Path) -> None:
    ready = check(folder, "of_student", allow_off_policy=True, loss={"name": "exopd"}, drift={"max_off_share": 0.2})
    assert ready.lineage.overrides == []


def test_what_stays_refused(folder: Path) -> None:
    for options in ({"loss": {"name": "exopd"}}, {"drift": {"max_off_share": 0.5}}, {"drift": {"min_effective_share": 0.5}}):
        with pytest.raises(UserError, match=r"(exopd|_share).* is about pi_ref, the student that training starts from; leave it out"):
            check(folder, "of_teacher", allow_off_policy=True, **options)
    with pytest.raises(StoreError, match="responses of an evaluation; distillation needs rollouts of the student"):
        check(folder, "of_measured", allow_off_policy=True)
    with pytest.raises(LineageError, match=r"fine-tuned on answers of stranger .* but teacher .* scores"):
        check(folder, "of_teacher", init="strangers", allow_off_policy=True)


def test_what_the_store_recorded_goes_on(folder: Path) -> None:
    """Of responses that were imported all is declared: who made them, and what else their store says of it."""
    said = "rollouts were imported: that student (...) made them is declared"
    student = fingerprint_model(folder / "student")
    lineage = Lineage(base=student, sft_teacher=student, overrides=[said, "an earlier one"])
    make_scored_store(folder / "imported", sampler=folder / "student", teacher=folder / "teacher", prompts=5, lineage=lineage)
    ready = check(folder, "imported", init="other", allow_off_policy=True)
    assert ready.lineage.overrides[::2] == ["an earlier one", f"of the responses: {said}"]
    assert ready.lineage.sft_teacher == fingerprint_model(folder / "teacher")  # the student's own
    assert f"WARNING: of the responses: {said}" in ready.notes
    answers = Lineage(sft_teacher_declared=True)
    make_scored_store(
        folder / "told", sampler=folder / "teacher", teacher=folder / "teacher", prompts=5, sampler_role="teacher", lineage=answers
    )
    ready = check(folder, "told", allow_off_policy=True)
    assert ready.lineage.overrides[-1].startswith("off-policy responses allowed: sampled, as declared, by the teacher teacher (")
    assert not ready.lineage.sft_teacher_declared


def test_residualized_scores_mend_for_the_student_that_was_sampled_alone(folder: Path) -> None:
    """What recurs was fitted against pi_ref of that student; of another one it says nothing."""
    lineage = read_lineage(folder / "strangers")
    make_scored_store(folder / "apart", sampler=folder / "strangers", teacher=folder / "teacher", prompts=5, lineage=lineage)
    make(folder / "apart")
    ready = check(folder, "apart", init="strangers", teacher="less")
    assert any("which these scores allow for" in note for note in ready.notes)
    assert ready.lineage.overrides == []
    make(folder / "of_student")
    with pytest.raises(
        LineageError, match=r"fine-tuned on answers of stranger .* but teacher .* scores; score with the SFT teacher, .*answers\. --allow"
    ):
        check(folder, "of_student", init="strangers", teacher="less", allow_off_policy=True)
    ready = check(folder, "of_student", init="strangers", teacher="less", allow_off_policy=True, allow_teacher_mismatch=True)
    assert ready.lineage.overrides[-1].startswith("teacher mismatch allowed: the student was fine-tuned on answers of stranger")
    assert not any("which these scores allow for" in note for note in ready.notes)


def test_a_student_of_which_nothing_is_known(folder: Path) -> None:
    """A declaration is of the student that is sampled, so that it helps only where this one is."""
    with pytest.raises(
        LineageError, match=r"SFT teacher is not known; collect rollouts of this student, with rollout\.sft_teacher=DIR\. --allow"
    ):
        check(folder, "of_student", init="unknown", allow_off_policy=True)


def test_a_teacher_scores_its_own_answers(folder: Path) -> None:
    engine = EngineConfig(kind="transformers", device="cpu")
    stage = ScoreStage(store=str(folder / "of_teacher"), model=str(folder / "teacher"), teacher="again", top_k=2)
    score_store(stage, engine, run_dir=str(folder / "run"))
    reader = StoreReader(str(folder / "of_teacher"), teacher="again")
    scores, rollout = reader.scores(0, "again", topk=True), reader.rollout(0)
    assert np.isfinite(scores.logp[rollout.prompt_len :]).all()
    assert {record.allow_teacher_mismatch for part in reader.parts if (record := reader.score_manifest(part, "again"))} == {False}
    check(folder, "of_teacher", allow_off_policy=True, teacher="again", loss={"name": "reverse_kl"})
    with pytest.raises(LineageError, match=r"answers of stranger .* but teacher .* scores"):
        score_store(stage.model_copy(update={"store": str(folder / "of_stranger")}), engine, run_dir=str(folder / "run"))


@pytest.mark.parametrize(
    ("loss", "warned"),
    [
        ({"importance_clip": 1.0}, True),
        ({"name": "vopd", "importance_clip": 2.5}, True),
        ({"importance_clip": 1.0, "advantage_clip": 0.5}, False),
        ({"name": "constant", "importance_clip": 1.0}, False),
        ({}, False),
    ],
)
def test_unclipped_importance_is_warned_of(folder: Path, loss: dict[str, Any], warned: bool) -> None:
    if loss.get("name") == "vopd":
        make_scored_store(folder / "topk", sampler=folder / "student", teacher=folder / "teacher", prompts=5, top_k=2)
    notes = check(folder, "topk" if loss.get("name") == "vopd" else "of_student", loss=loss).notes
    text = f"WARNING: train.loss.importance_clip = {loss.get('importance_clip', 0):g} without advantage_clip"
    assert any(note.startswith(text) for note in notes) is warned
