"""Rollouts that a teacher could not score, or not to their end: named in the manifest, left out or cut by the reader, never zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from unit.store_parts import fake_fingerprint, fill, make_manifest, make_scores, score

from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.errors import StoreError
from megatron_opd.records import Finish, Rollout, TeacherScores
from megatron_opd.serve.engine import Failed
from megatron_opd.serve.score import PartWork
from megatron_opd.show.inspect import inspect_store
from megatron_opd.store_records import Excluded, ScoreManifest

LIMIT = 30


def score_in_part(url: str, part: int, overlong: str, failed: tuple[int, ...] = (), top_k: int = 0) -> ScoreManifest:
    """As the stage does, with a teacher that takes LIMIT tokens; `failed` are positions among the requests."""
    reader = StoreReader(url)
    rollouts = reader.part_rollouts(part)
    work = PartWork(rollouts, LIMIT, overlong)
    outcomes: list[TeacherScores | Failed] = list(make_scores(work.asked(), seed=part, top_k=top_k))
    for position in failed:
        outcomes[position] = Failed("no answer")
    scores = work.sort_out(outcomes)
    record = ScoreManifest(
        part=part,
        teacher=fake_fingerprint("teacher"),
        top_k=top_k,
        max_tokens=work.max_tokens,
        excluded=work.excluded,
        part_crc32c=reader.parts[part].crc32c,
        crc32c={},
    )
    write_scores(reader.location, "teacher", record, rollouts, scores)
    return record


@pytest.fixture
def url(tmp_path: Path) -> str:
    fill(str(tmp_path / "store"), make_manifest(num_prompts=12, per_part=6), longest=30)
    return str(tmp_path / "store")


@pytest.mark.parametrize("top_k", [0, 3])
def test_cut(url: str, top_k: int) -> None:
    for part in range(2):
        record = score_in_part(url, part, "cut", failed=(1, 4), top_k=top_k)
        assert record.max_tokens == LIMIT
        assert sum(entry.quarantined for entry in record.excluded) == 2
    everything, usable = StoreReader(url), StoreReader(url, teacher="teacher")
    usable.check_complete("teacher")
    names = list(zip(everything.prompt_indices.tolist(), everything.sample_indices.tolist(), strict=True))
    kept = list(zip(usable.prompt_indices.tolist(), usable.sample_indices.tolist(), strict=True))
    assert len(kept) < len(names)
    cut = 0
    for index, name in enumerate(names):
        whole = everything.rollout(index)
        if name not in kept:
            with pytest.raises(StoreError, match=r"has no scores: (no answer|\d+ tokens \(30|\d+ tokens)"):
                everything.scores(index, "teacher")
            continue
        rollout = usable.rollout(kept.index(name))
        scores = usable.scores(kept.index(name), "teacher", topk=top_k > 0)
        scores.check_against(rollout)
        assert len(rollout.tokens) == min(len(whole.tokens), LIMIT) == len(everything.scores(index, "teacher").logp)
        np.testing.assert_array_equal(rollout.tokens, whole.tokens[:LIMIT])
        np.testing.assert_array_equal(rollout.student_logp, whole.student_logp[:LIMIT])
        if len(whole.tokens) > LIMIT:
            cut += 1
            assert rollout.finish is Finish.LENGTH
    assert cut > 2
    assert int(usable.lengths.max()) == LIMIT
    assert everything.verify() == []


def test_skip_and_error(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreError, match=r"has \d+ tokens, but the teacher takes 30; .*score.overlong to 'cut' or 'skip'"):
        score_in_part(url, 0, "error")
    for part in range(2):
        record = score_in_part(url, part, "skip")
        assert record.max_tokens is None
        assert record.excluded
        assert not any(entry.quarantined for entry in record.excluded)
    usable = StoreReader(url, teacher="teacher")
    lengths = StoreReader(url).lengths
    assert usable.lengths.tolist() == [length for length in lengths if length <= LIMIT]
    assert inspect_store(url) == 0
    printed = capsys.readouterr().out
    assert f"{(lengths > LIMIT).sum()} rollouts have none" in printed
    assert "the teacher takes 30" in printed


def test_a_reader_for_a_teacher_that_scored_all_or_nothing_is_as_ever(url: str) -> None:
    assert len(StoreReader(url, teacher="teacher")) == len(StoreReader(url))
    with pytest.raises(StoreError, match="has not scored 2 of 2 parts"):
        StoreReader(url, teacher="teacher").check_scored("teacher")
    score(url)
    whole, usable = StoreReader(url), StoreReader(url, teacher="teacher")
    assert whole.lengths.tolist() == usable.lengths.tolist()
    assert whole.finishes.tolist() == usable.finishes.tolist()


@pytest.mark.parametrize(("wrong", "message"), [("unnamed", "no scores, and not excluded"), ("named", "excluded, but scored")])
def test_the_account_must_be_right(url: str, wrong: str, message: str) -> None:
    reader = StoreReader(url)
    rollouts: list[Rollout] = reader.part_rollouts(0)
    scores: list[TeacherScores | None] = list(make_scores(rollouts))
    excluded = []
    if wrong == "named":
        excluded = [Excluded(prompt_index=rollouts[2].prompt_index, sample_index=rollouts[2].sample_index, reason="?")]
    else:
        scores[2] = None
    record = ScoreManifest(part=0, teacher=fake_fingerprint("teacher"), excluded=excluded, part_crc32c=reader.parts[0].crc32c, crc32c={})
    with pytest.raises(StoreError, match=message):
        write_scores(reader.location, "teacher", record, rollouts, scores)


def test_the_lowest_finite_number_is_no_log_probability() -> None:
    logp = np.array([np.nan, np.finfo(np.float32).min], np.float32)
    with pytest.raises(ValueError, match="not a log-probability"):
        Rollout(np.array([1, 2], np.int32), 1, 0, 0, Finish.STOP, logp)
