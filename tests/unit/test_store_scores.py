"""Teachers' scores beside the rollouts: complete, aligned, of the right rollouts, and by one model a name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit.store_parts import VOCAB, fake_fingerprint, fill, make_manifest, make_rollouts, make_scores, same_scores, score, scored_store

from megatron_opd.data.location import Location
from megatron_opd.data.manifests import score_group
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.errors import StoreError
from megatron_opd.records import Finish, Rollout, TeacherScores
from megatron_opd.store_records import ScoreManifest


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three sealed parts without scores; for what is refused, so that it stays like that."""
    path = str(tmp_path_factory.mktemp("stores") / "unscored.opd.zarr")
    fill(path, make_manifest())
    return path


@pytest.fixture
def url(unscored: str, tmp_path: Path) -> str:
    """The same, to write scores into."""
    return str(shutil.copytree(unscored, tmp_path / "store.opd.zarr"))


def record_for(url: str, part: int = 0, **changes: object) -> ScoreManifest:
    fields = {"part": part, "teacher": fake_fingerprint("teacher"), "part_crc32c": StoreReader(url).parts[part].crc32c, "crc32c": {}}
    return ScoreManifest(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("topk_dtype", ["float32", "float16"])
def test_round_trip_with_candidates(url: str, topk_dtype: str) -> None:
    score(url, top_k=5, topk_dtype=topk_dtype)
    reader = StoreReader(url)
    reader.check_complete("teacher")
    assert reader.verify() == []
    for part in range(3):
        wanted = make_scores(make_rollouts(reader.manifest, part), seed=part, top_k=5)
        for index, want in zip(np.flatnonzero(reader.part_ids == part), wanted, strict=True):
            same_scores(reader.scores(int(index), "teacher", topk=True), want)
            same_scores(reader.scores(int(index), "teacher"), TeacherScores(want.logp))
    assert str(reader.location.open_array(score_group(0, "teacher"), "topk_logp").dtype) == topk_dtype
    assert reader.score_manifest(0, "teacher").top_k == 5  # type: ignore[union-attr]


def test_several_teachers_of_one_store(url: str) -> None:
    score(url)
    score(url, teacher="large", model=fake_fingerprint("large"), top_k=2, parts=[0, 2])
    reader = StoreReader(url)
    assert reader.teachers() == ["large", "teacher"]
    reader.check_complete("teacher")
    assert reader.unscored_parts("large") == [1]
    with pytest.raises(StoreError, match=r"teacher 'large' has not scored 1 of 3 parts \(first: \[1\]\); .* \(scored by: large, teacher\)"):
        reader.check_complete("large")
    assert reader.scores(0, "large", topk=True).topk_ids.shape[1] == 2  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="parts/000001: not scored by teacher 'large'; run 'megatron-opd score'"):
        reader.scores(8, "large")
    with pytest.raises(StoreError, match=r"parts/000000/teacher/teacher: no top-k scores; score with score.top_k > 0"):
        reader.scores(0, "teacher", topk=True)


def test_nobody_has_scored(unscored: str) -> None:
    reader = StoreReader(unscored)
    assert reader.teachers() == []
    with pytest.raises(StoreError, match=r"has not scored 3 of 3 parts .*'megatron-opd score' \(scored by: nobody\)"):
        reader.check_scored("teacher")


def test_two_models_under_one_name(url: str) -> None:
    score(url, parts=[0, 1])
    score(url, parts=[2], model=fake_fingerprint("another", weights="another"))
    with pytest.raises(StoreError, match=r"teacher 'teacher' is 2 different models: teacher \(.*another \(.*delete the odd parts"):
        StoreReader(url).check_scored("teacher")


def test_a_model_by_another_name_is_the_same(url: str) -> None:
    score(url, parts=[0, 1])
    score(url, parts=[2], model=fake_fingerprint("renamed", weights="teacher"))
    StoreReader(url).check_complete("teacher")


def test_sealed_scores_are_left_as_they_are(url: str) -> None:
    score(url)
    before = StoreReader(url).scores(0, "teacher")
    rollouts = StoreReader(url).part_rollouts(0)
    write_scores(Location(url), "teacher", record_for(url), rollouts, make_scores(rollouts, seed=99))
    same_scores(StoreReader(url).scores(0, "teacher"), before)


def spoil(scores: TeacherScores, rollout: Rollout, how: str) -> TeacherScores:
    """Scores with one fault."""
    start, logp = rollout.prompt_len, scores.logp.copy()
    assert scores.topk_ids is not None
    assert scores.topk_logp is not None
    ids, values = scores.topk_ids.copy(), scores.topk_logp.copy()
    if how == "nan":
        logp[-1] = np.nan
    elif how == "minus infinity":
        logp[start] = -np.inf
    elif how == "positive":
        logp[start] = 0.1
    elif how == "shifted":  # the values of position t at t - 1: the mistake that the alignment rule is there for
        logp = np.append(logp[1:], np.float32(np.nan)).astype(np.float32)
    elif how == "prompt":
        logp[start - 1] = -1.0
    elif how == "short":
        logp = logp[:-1]
    elif how == "no candidates":
        return TeacherScores(logp)
    elif how == "candidates without values":
        return TeacherScores(logp, ids, None)
    elif how == "no candidate ids":
        ids[start] = -1
    elif how == "candidate out of range":
        ids[-1, 0] = VOCAB
    elif how == "candidate nan":
        values[-1, 1] = np.nan
    elif how == "candidate positive":
        values[-1, 1] = 0.5
    elif how == "candidates at the prompt":
        ids[0], values[0] = 1, -1.0
    elif how == "fewer candidates":
        ids, values = ids[:, :-1], values[:, :-1]
    elif how == "candidates short":
        ids, values = ids[:-1], values[:-1]
    elif how == "flat candidates":
        ids, values = ids[:, 0], values[:, 0]
    return TeacherScores(logp, ids, values)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"teacher logp\[\d+\] is nan, not a log-probability \(1 such"),
        ("minus infinity", "is -inf, not a log-probability"),
        ("positive", "is 0.1.*, not a log-probability"),
        ("shifted", r"values at prompt tokens; position t must hold log p\(tokens\[t\]\)"),
        ("prompt", "values at prompt tokens"),
        ("short", "tokens but teacher log-probabilities of shape"),
        ("no candidates", "top-k scores were asked for and the engine gave none"),
        ("candidates without values", "topk_ids and topk_logp go together"),
        ("no candidate ids", "a response position has no top-k ids"),
        ("candidate out of range", f"candidate {VOCAB} in a vocabulary of {VOCAB}"),
        ("candidate nan", "a top-k value that is not a log-probability"),
        ("candidate positive", "a top-k value that is not a log-probability"),
        ("candidates at the prompt", "top-k arrays have values at prompt tokens"),
        ("fewer candidates", "2 candidates a position, 3 were asked for"),
        ("candidates short", "top-k arrays of shape"),
        ("flat candidates", "top-k arrays of shape"),
    ],
)
def test_wrong_scores_are_refused_by_name(unscored: str, how: str, message: str) -> None:
    rollouts = StoreReader(unscored).part_rollouts(1)
    scores = make_scores(rollouts, top_k=3)
    scores[5] = spoil(scores[5], rollouts[5], how)
    with pytest.raises(StoreError, match=rf"part 1, prompt 6, sample 1: .*{message}"):
        write_scores(Location(unscored), "teacher", record_for(unscored, 1, top_k=3), rollouts, scores)
    assert StoreReader(unscored).teachers() == []


def test_scores_of_other_counts_or_order_are_refused(unscored: str) -> None:
    rollouts = StoreReader(unscored).part_rollouts(0)
    scores = make_scores(rollouts)
    other = StoreReader(unscored).part_rollouts(1)
    for wrong_rollouts, wrong_scores in (
        (rollouts, scores[:-1]),
        (rollouts[:-1], scores[:-1]),
        (rollouts[::-1], scores[::-1]),
        (rollouts, [*scores, scores[0]]),
        ([], []),
        (other, make_scores(other)),
    ):
        with pytest.raises(StoreError, match=r"parts/000000: \d scores of \d rollouts, which are not all of the part's in their order"):
            write_scores(Location(unscored), "teacher", record_for(unscored), wrong_rollouts, wrong_scores)
    assert StoreReader(unscored).teachers() == []


def test_a_part_that_was_made_again_needs_new_scores(url: str) -> None:
    """Scores that were under way while their part was deleted and sampled again are seen when they are read."""
    reader = StoreReader(url)
    rollouts, record = reader.part_rollouts(0), record_for(url)
    reader.location.fs.rm(reader.location.path("parts/000000"), recursive=True)
    fill(url, reader.manifest, parts=[0], seed=3)
    write_scores(reader.location, "teacher", record, rollouts, make_scores(rollouts))
    with pytest.raises(StoreError, match="scores of other rollouts than part 0 now holds"):
        StoreReader(url).check_scored("teacher")


def test_scoring_in_any_order_gives_the_same_arrays(tmp_path: Path) -> None:
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    scored_store(left)
    fill(right, make_manifest(), parts=[2, 0])
    score(right, parts=[2])
    fill(right, make_manifest(), parts=[1])
    score(right, parts=[1])
    score(right, parts=[0])
    for part in range(3):
        ours, theirs = (StoreReader(url).score_manifest(part, "teacher") for url in (left, right))
        assert ours == theirs


ROLLOUT = Rollout(np.array([3, 4, 5], np.int32), 1, 0, 0, Finish.STOP, np.array([np.nan, -1, -2], np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.array([3, 4, 5])}, "tokens must be int32"),
        ({"student_logp": np.array([np.nan, -1, -2])}, "student_logp float32"),
        ({"student_logp": np.array([np.nan, -1], np.float32)}, "3 tokens but 2 log-probabilities"),
        ({"tokens": np.array([3, -4, 5], np.int32)}, "negative token id -4"),
        ({"prompt_len": 0}, "prompt_len 0 of 3 tokens"),
        ({"prompt_len": 3}, "prompt_len 3 of 3 tokens"),
        ({"student_logp": np.array([-1, -1, -2], np.float32)}, "student_logp has values at prompt tokens"),
        ({"student_logp": np.array([np.nan, np.nan, -2], np.float32)}, r"student_logp\[1\] is nan"),
        ({"student_logp": np.array([np.nan, -1, 0.5], np.float32)}, r"student_logp\[2\] is 0.5"),
        ({"student_logp": np.array([np.nan, -1, -np.inf], np.float32)}, r"student_logp\[2\] is -inf"),
    ],
)
def test_a_rollout_checks_itself(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ROLLOUT, **changes)
