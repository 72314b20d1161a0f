"""`create_store` and `add_scores`: what Python writes passes the checks of `rollout` and `score`, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_model, write_prompts

from megatron_opd import Finish, ScoreWriter, StoreWriter, UserError, add_scores, create_store, open_store
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import LineageError, QuarantineError, StoreError
from megatron_opd.hf.lineage import fingerprint_model, write_lineage
from megatron_opd.records import Lineage

EOS, LETTER = 1, 70


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher", "stranger")):
        make_model(folder / name, layers=1, seed=seed)
    return folder


def create(models: Path, store: Path, **changes: Any) -> StoreWriter:
    """Three prompts with two samples, two prompts a part."""
    fields = {
        "model": models / "student",
        "prompts": ["one", "two", "three"],
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 5},
        "prompts_per_part": 2,
        "sft_teacher": models / "teacher",
    }
    return create_store(store, **(fields | changes))  # type: ignore[arg-type]


def fill_store(models: Path, store: Path, **changes: Any) -> None:
    with create(models, store, **changes) as writer:
        for request in writer.requests():
            writer.add(request, [LETTER + request.prompt_index, LETTER, EOS], [-0.5, -1.0, -0.1 * request.sample_index])


def test_rollouts_in_and_out(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    fill_store(models, path)
    store = open_store(path, tokenizer=models / "student")
    assert [rollout.text("prompt") for rollout in store] == ["one"] * 2 + ["two"] * 2 + ["three"] * 2
    assert [rollout.finish for rollout in store] == [Finish.STOP] * 6
    np.testing.assert_array_equal(store[3].student_logp, np.float32([-0.5, -1.0, -0.1]))
    manifest = store.manifest
    assert manifest.sampler == fingerprint_model(models / "student")
    assert manifest.lineage.sft_teacher == fingerprint_model(models / "teacher")
    assert manifest.lineage.sft_teacher_declared
    assert manifest.lineage.overrides == [f"rollouts were written from Python: that {manifest.sampler.short()} made them is declared"]
    assert store.reader.missing_parts() == []
    assert store.reader.verify() == []
    assert {record.provenance["engine"]["kind"] for record in store.reader.parts.values()} == {"python"}


def test_a_part_is_sealed_when_it_is_whole(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    writer = create(models, path)
    requests = writer.requests()
    assert [(request.prompt_index, request.sample_index) for request in requests] == [(p, s) for p in range(3) for s in range(2)]
    for request in reversed(requests[:4]):  # in any order
        assert StoreReader(str(path)).parts.keys() == set()
        writer.add(request, [LETTER, EOS], [-1, -1])
    assert StoreReader(str(path)).parts.keys() == {0}
    writer.close()
    writer.add(requests[4], [LETTER], [-1.0])
    with pytest.raises(
        StoreError, match=r"1 of part 1 were given, and 1 were not \(prompt, sample: \[\(2, 1\)\]\).*exclude them with the reason"
    ):
        writer.close()
    again = create(models, path)  # goes on
    assert [(request.prompt_index, request.sample_index) for request in again.requests()] == [(2, 0), (2, 1)]
    again.add(again.requests()[0], [LETTER] * 5, [-1.0] * 5)
    again.exclude(again.requests()[0], "the sampler died")
    store = open_store(path)
    assert [rollout.finish for rollout in store] == [Finish.STOP] * 4 + [Finish.LENGTH]
    (left_out,) = store.reader.parts[1].excluded
    assert (left_out.reason, left_out.quarantined) == ("the sampler died", True)
    assert create(models, path).requests() == []


def test_an_error_inside_is_the_one_that_is_seen(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create(models, tmp_path / "a.opd.zarr") as writer:
        writer.add(writer.requests()[0], [LETTER, EOS], [-1.0, -1.0 / 0])


@pytest.mark.parametrize(
    ("ids", "logp", "finish", "message"),
    [
        ([], [], None, "at least one token"),
        ([LETTER, EOS, LETTER], [-1, -1, -1], None, "1 tokens stand behind the stop id 1"),
        ([LETTER, EOS], [-1, -1], Finish.LENGTH, "it ended by length at token 1"),
        ([LETTER] * 6, [-1] * 6, None, "6 tokens, over sampling.max_new_tokens = 5"),
        ([300], [-1], None, "token id 300 in a vocabulary of 300"),
        ([-1], [-1], None, "negative token id -1"),
        ([1.5], [-1], None, "response_ids must be 1-dimensional, of whole numbers"),
        ([1 << 40], [-1], None, "holds 1099511627776, which is no token id"),
        ([LETTER, EOS], [-1], None, "log-probabilities"),
        ([LETTER, EOS], [-1, 0.5], None, "not a log-probability"),
        ([LETTER, EOS], [-1, float("nan")], None, "not a log-probability"),
        ([LETTER, EOS], [[-1, -1]], None, "logp must be 1-dimensional"),
    ],
)
def test_what_is_no_response(models: Path, tmp_path: Path, ids: Any, logp: Any, finish: Finish | None, message: str) -> None:
    writer = create(models, tmp_path / "a.opd.zarr")
    with pytest.raises(StoreError, match=f"prompt 0, sample 0: .*{message}"):
        writer.add(writer.requests()[0], ids, logp, finish=finish)
    assert len(writer.requests()) == 6


def test_each_request_once(models: Path, tmp_path: Path) -> None:
    writer = create(models, tmp_path / "a.opd.zarr", shard=(0, 2))
    requests = writer.requests()
    assert {request.prompt_index for request in requests} == {0, 1}
    writer.add(requests[0], [LETTER, EOS], [-1, -1])
    for take in (lambda: writer.add(requests[0], [LETTER, EOS], [-1, -1]), lambda: writer.exclude(requests[0], "twice")):
        with pytest.raises(StoreError, match=r"prompt 0, sample 0 was given before; take those of requests\(\)"):
            take()
    other = create(models, tmp_path / "a.opd.zarr", shard=(1, 2)).requests()[0]
    with pytest.raises(StoreError, match="prompt 2, sample 0 is not of this writer's parts"):
        writer.add(other, [LETTER, EOS], [-1, -1])


def test_prompts_of_another_store(models: Path, tmp_path: Path) -> None:
    writer = create(models, tmp_path / "a.opd.zarr")
    other = create(models, tmp_path / "b.opd.zarr", prompts=["one", "six"]).requests()
    writer.add(other[0], [LETTER, EOS], [-1, -1])  # the same prompt
    for take in (lambda: writer.add(other[2], [LETTER, EOS], [-1, -1]), lambda: writer.exclude(other[2], "the sampler died")):
        with pytest.raises(StoreError, match="prompt 1, sample 0 has other tokens here; it is of another store"):
            take()
    with pytest.raises(ValueError, match="read-only"):
        writer.requests()[0].prompt[0] = LETTER


def test_no_more_than_the_model_takes(models: Path, tmp_path: Path) -> None:
    """8 tokens, of which the prompts have 3, 3 and 5."""
    short = make_model(tmp_path / "student", layers=1, max_position_embeddings=8)
    with pytest.raises(UserError, match=r"longer than the 3 tokens that leave room for a response \(rows 2; longest 5\)"):
        create(models, tmp_path / "a.opd.zarr", model=short)
    fill_store(models, tmp_path / "a.opd.zarr", model=short, encoding={"overlong_prompt": "skip"})
    store = open_store(tmp_path / "a.opd.zarr")
    assert store.prompt_indices.tolist() == [0, 0, 1, 1]
    assert [entry.reason for entry in store.reader.parts[1].excluded] == ["prompt of 5 tokens is too long"] * 2
    writer = create(models, tmp_path / "b.opd.zarr", model=short, sampling={"max_new_tokens": 20})
    with pytest.raises(StoreError, match=r"prompt 0, sample 0: prompt and response have 9 tokens, and .*student takes 8; exclude it"):
        writer.add(writer.requests()[0], [LETTER] * 6, [-1] * 6)
    fill_store(models, tmp_path / "c.opd.zarr", sampling={"max_new_tokens": 20})
    scorer = add_scores(tmp_path / "c.opd.zarr", model=make_model(tmp_path / "teacher", layers=1, max_position_embeddings=5), **ANY)
    with pytest.raises(StoreError, match=r"prompt 0, sample 0: prompt and response have 6 tokens, and .*teacher takes 5; exclude it"):
        scorer.add(scorer.requests()[0], [-1] * 3)


def exclude_all(writer: StoreWriter | ScoreWriter, **how: Any) -> None:
    with writer:
        for request in writer.requests():
            writer.exclude(request, "it died", **how)


def test_not_all_may_fail(models: Path, tmp_path: Path) -> None:
    with pytest.raises(QuarantineError, match="create_store is done, but 6 of 6 rollouts were quarantined, over max_quarantined"):
        exclude_all(create(models, tmp_path / "a.opd.zarr"))
    with pytest.raises(QuarantineError, match="create_store is done"):  # as 'rollout' does, run again
        create(models, tmp_path / "a.opd.zarr").close()
    exclude_all(create(models, tmp_path / "b.opd.zarr"), failed=False)
    exclude_all(create(models, tmp_path / "c.opd.zarr", max_quarantined=1))
    fill_store(models, tmp_path / "d.opd.zarr")
    with pytest.raises(QuarantineError, match="add_scores is done, but 6 of 6 rollouts"):
        exclude_all(add_scores(tmp_path / "d.opd.zarr", model=models / "teacher"))


def test_a_part_that_could_not_be_written_is_given_again(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    writer = create(models, path)
    *first, last = writer.requests()[:4]
    for request in first:
        writer.add(request, [LETTER, EOS], [-1, -1])
    (path / "parts").rename(tmp_path / "parts")
    (path / "parts").write_text("")  # no folder can be made here: stands for a disk that is full
    with pytest.raises(StoreError, match="is a file"):
        writer.add(last, [LETTER, EOS], [-1, -1])
    with pytest.raises(StoreError, match=r"3 of part 0 were given, and 1 were not \(prompt, sample: \[\(1, 1\)\]\)"):
        writer.close()
    (path / "parts").unlink()
    (tmp_path / "parts").rename(path / "parts")
    assert writer.requests()[0].prompt_index == 1
    writer.add(last, [LETTER, EOS], [-1, -1])
    assert StoreReader(str(path)).parts.keys() == {0}


def test_lineage_is_required(models: Path, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match=r"no opd_lineage.json .* declare it: sft_teacher=DIR"):
        create(models, tmp_path / "a.opd.zarr", sft_teacher=None)
    assert not (tmp_path / "a.opd.zarr").exists()
    student = make_model(tmp_path / "student", layers=1)
    write_lineage(student, Lineage(base=fingerprint_model(student), sft_teacher=fingerprint_model(models / "teacher")), for_weights=True)
    writer = create(models, tmp_path / "a.opd.zarr", model=student, sft_teacher=None)
    assert not writer.manifest.lineage.sft_teacher_declared
    with pytest.raises(LineageError, match="drop the declaration"):
        create(models, tmp_path / "b.opd.zarr", model=student, sft_teacher=models / "stranger")


def test_another_store_is_not_gone_on_with(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    fill_store(models, path)
    with pytest.raises(StoreError, match="was made with other settings: sampling"):
        create(models, path, sampling={"samples_per_prompt": 2, "max_new_tokens": 6})
    with pytest.raises(StoreError, match="was made with other settings"):
        create(models, path, prompts=["one", "two", "four"])
    more = create(models, path, prompts=["one", "two", "three", "four"], extend=True)
    assert {request.prompt_index for request in more.requests()} == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "judge"}, "'student' .* or 'teacher'"),
        ({"prompts": []}, "no prompts are given"),
        ({"prompts": ["one", 2]}, "prompt 1 is 2; text, or chat messages"),
        ({"sampling": {"max_tokens": 5}}, r"sampling.max_tokens: no such field; did you mean 'max_new_tokens'\?"),
        ({"prompts_per_part": 0}, "prompts_per_part"),
        ({"encoding": {"max_prompt_tokens": 3}}, "longer than the 3 tokens"),
        ({"shard": (2, 2)}, "shard 2/2"),
        ({"role": "teacher"}, "sft_teacher"),
    ],
)
def test_settings_are_those_of_a_recipe(models: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(models, tmp_path / "a.opd.zarr", **changes)


def test_answers_of_a_teacher_from_a_file(models: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", count=4)
    fill_store(models, tmp_path / "sft.opd.zarr", role="teacher", model=models / "teacher", prompts=prompts, sft_teacher=None)
    store = open_store(tmp_path / "sft.opd.zarr", prompts=prompts)
    assert store.manifest.sampler_role == "teacher"
    assert [prompt.answer for prompt in store.prompts] == ["0", "1", "2", "3"]


ANY: dict[str, Any] = {"teacher": "any", "allow_teacher_mismatch": True}


def give(rollout: Any) -> np.ndarray:
    return -np.arange(1, len(rollout.response_ids) + 1) / 4


def test_scores_in_and_out(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    fill_store(models, path)
    first = add_scores(path, model=models / "teacher", shard=(1, 2))
    assert {rollout.prompt_index for rollout in first.requests()} == {2}
    with add_scores(path, model=models / "teacher") as scorer:
        requests = scorer.requests()
        scorer.exclude(requests[0], "not asked for", failed=False)
        for rollout in requests[1:]:
            scorer.add(rollout, give(rollout))
    assert add_scores(path, model=models / "teacher").requests() == []
    store = open_store(path, "teacher")
    store.reader.check_complete("teacher")
    assert len(store) == 5
    for rollout in store:
        np.testing.assert_array_equal(rollout.teacher_logp(), give(rollout).astype(np.float32))
    record = store.reader.score_manifest(0, "teacher")
    assert record is not None
    assert record.teacher == fingerprint_model(models / "teacher")
    assert (record.engine, record.allow_teacher_mismatch, [entry.reason for entry in record.excluded]) == (
        {"kind": "python"},
        False,
        ["not asked for"],
    )


def test_scores_of_another_store(models: Path, tmp_path: Path) -> None:
    """Responses of the same lengths to the same prompts."""
    fill_store(models, tmp_path / "a.opd.zarr")
    with create(models, tmp_path / "b.opd.zarr") as writer:
        for request in writer.requests():
            writer.add(request, [LETTER + request.prompt_index, LETTER - request.sample_index, EOS], [-1, -1, -1])
    scorer, other = add_scores(tmp_path / "a.opd.zarr", model=models / "teacher"), open_store(tmp_path / "b.opd.zarr")
    scorer.add(other[0], give(other[0]))  # the same tokens
    for take in (lambda: scorer.add(other[1], give(other[1])), lambda: scorer.exclude(other[1], "the teacher died")):
        with pytest.raises(StoreError, match="prompt 0, sample 1 has other tokens here; it is of another store"):
            take()
    rollout = scorer.requests()[0]
    for array in (rollout.prompt_ids, rollout.response_ids, rollout.student_logp):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9


def test_candidates(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    fill_store(models, path)
    scorer = add_scores(path, model=models / "teacher", top_k=2)
    rollout = scorer.requests()[0]
    with pytest.raises(StoreError, match="prompt 0, sample 0: 0 candidates a token, but top_k = 2"):
        scorer.add(rollout, give(rollout))
    with pytest.raises(StoreError, match="topk_ids and topk_logp go together"):
        scorer.add(rollout, give(rollout), np.zeros((3, 2), int))
    with pytest.raises(StoreError, match="prompt 0, sample 0: candidate 300 in a vocabulary of 300"):
        scorer.add(rollout, give(rollout), np.full((3, 2), 300), np.full((3, 2), -0.75))
    ids, logp = np.tile([7, 9], (3, 1)), np.full((3, 2), -0.75)
    for rollout in scorer.requests():
        scorer.add(rollout, give(rollout), ids, logp)
    found = open_store(path)[4].scores(topk=True)
    np.testing.assert_array_equal(found.topk_ids, ids)  # type: ignore[arg-type]
    record = StoreReader(str(path)).score_manifest(1, "teacher")
    assert record is not None
    assert (record.top_k, record.largest_candidate) == (2, 9)
    with pytest.raises(StoreError, match="was scored with top_k=2, now top_k=0"):
        add_scores(path, model=models / "teacher")


def test_the_teacher_is_the_students(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.opd.zarr"
    fill_store(models, path)
    with pytest.raises(LineageError, match="was fine-tuned on answers of teacher"):
        add_scores(path, model=models / "stranger")
    with add_scores(path, model=models / "stranger", teacher="other", allow_teacher_mismatch=True) as scorer:
        for rollout in scorer.requests():
            scorer.add(rollout, give(rollout))
    record = StoreReader(str(path)).score_manifest(0, "other")
    assert record is not None
    assert record.allow_teacher_mismatch
    for logp, message in ((-np.ones(2), "teacher log-probabilities of shape"), (np.ones(3), "not a log-probability")):
        scorer = add_scores(path, model=models / "teacher")
        with pytest.raises(StoreError, match=f"prompt 0, sample 0: .*{message}"):
            scorer.add(scorer.requests()[0], logp)
    with pytest.raises(UserError, match=r"(?s)add_scores: .*teacher: .*got 'a/b'"):
        add_scores(path, model=models / "teacher", teacher="a/b")
