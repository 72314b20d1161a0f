"""`open_store`: records, slices, prompts and tables say what the store's reader says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tokenizer, write_prompts
from unit.derived_scores import make, score_again
from unit.store_parts import fake_fingerprint, fill, make_manifest, make_scores, score, scored_store

from megatron_opd import Finish, Store, UserError, open_store
from megatron_opd.api import store as api_store
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.errors import LineageError, StoreError
from megatron_opd.hf.tokenizer import fingerprint_tokenizer
from megatron_opd.store_records import Excluded, ScoreManifest

CUT = 20  # tokens that 'other' takes; prompts have fewer


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Scored with candidates by 'teacher', and in part 0 alone by 'other', which leaves one rollout out."""
    url = str(tmp_path_factory.mktemp("stores") / "a.opd.zarr")
    fill(url, make_manifest(), longest=20)
    score(url, top_k=3)
    reader = StoreReader(url)
    rollouts = reader.part_rollouts(0)
    scores = [None if number == 2 else make_scores([rollout.cut(CUT)])[0] for number, rollout in enumerate(rollouts)]
    left_out = Excluded(prompt_index=rollouts[2].prompt_index, sample_index=rollouts[2].sample_index, reason="too long")
    record = ScoreManifest(
        part=0, teacher=fake_fingerprint("other"), excluded=[left_out], part_crc32c=reader.parts[0].crc32c, crc32c={}, max_tokens=CUT
    )
    write_scores(reader.location, "other", record, rollouts, scores)
    return url


def test_a_record_is_what_the_reader_says(url: str) -> None:
    store, reader = open_store(url), StoreReader(url)
    assert len(store) == len(reader) == 20
    for index, rollout in enumerate(store):
        found, start = reader.rollout(index), reader.prompt_lens[index]
        assert (rollout.index, rollout.prompt_index, rollout.sample_index, rollout.finish) == (
            index,
            found.prompt_index,
            found.sample_index,
            found.finish,
        )
        np.testing.assert_array_equal(np.concatenate([rollout.prompt_ids, rollout.response_ids]), found.tokens)
        np.testing.assert_array_equal(rollout.student_logp, found.student_logp[start:])
        scores = reader.scores(index, "teacher", topk=True)
        np.testing.assert_array_equal(rollout.advantage("teacher"), scores.logp[start:] - found.student_logp[start:])
        own = rollout.scores("teacher", topk=True)
        assert scores.topk_ids is not None
        assert own.topk_ids is not None
        np.testing.assert_array_equal(own.topk_ids, scores.topk_ids[start:])
        assert (own.topk_ids >= 0).all()


def test_slices_are_stores(url: str) -> None:
    store = open_store(url)
    part = store[5:15][::2]
    assert isinstance(part, Store)
    assert [rollout.index for rollout in part] == part.indices.tolist() == [5, 7, 9, 11, 13]
    assert part[-1].index == store[[3, 13]][1].index == 13
    cut = store[store.finishes == Finish.LENGTH]
    assert {rollout.finish for rollout in cut} == {Finish.LENGTH}
    assert len(cut) + len(store[store.finishes == Finish.STOP]) == len(store)
    assert part.response_lens.tolist() == [len(rollout.response_ids) for rollout in part]
    assert len(store[[]]) == len(store[[False] * 20]) == 0
    assert list(store[[]]) == []
    for odd in (20, -21):
        with pytest.raises(IndexError, match="of 20"):
            _ = store[odd]
    assert "5 of 20 rollouts" in repr(part)


def test_a_teacher_is_named_where_it_must_be(url: str) -> None:
    store = open_store(url)
    assert store.teachers == ["other", "teacher"]
    with pytest.raises(UserError, match=r"which teacher\? there are scores of 'other', 'teacher'; name one"):
        store[0].advantage()
    with pytest.raises(UserError, match="no scores of a teacher 'nobody'; there are"):
        store[0].advantage("nobody")
    opened = open_store(url, "teacher")
    np.testing.assert_array_equal(opened[0].advantage(), store[0].advantage("teacher"))


def test_derived_teachers_are_asked_for_by_name(tmp_path: Path) -> None:
    """And one that is stale is left out of tables, with a word, not in the way of the sound one."""
    url = str(tmp_path / "a.opd.zarr")
    scored_store(url, num_prompts=12)
    make(url)
    make(url, "mixed", "shuffle")
    store = open_store(url)
    assert store.stale_teachers == {}
    np.testing.assert_array_equal(store[0].advantage(), store[0].advantage("teacher"))
    assert open_store(url, "less")[0].advantage().tolist() == store[0].advantage("less").tolist() != store[0].advantage().tolist()
    score_again(url, 1)
    make(url, "mixed", "shuffle")
    store = open_store(url)
    assert list(store.stale_teachers) == ["less"]
    said = "no columns of the derived teacher 'less', which is stale: the scores of 'teacher' are others since"
    with pytest.warns(UserWarning, match=said):
        assert store.to_arrow().column_names[-4::2] == ["advantage_mixed", "advantage_teacher"]
    with pytest.warns(UserWarning, match=said):
        assert store.to_arrow("token").column_names[-2:] == ["advantage_mixed", "advantage_teacher"]
    with pytest.raises(StoreError, match="the derived teacher 'less' is stale"):
        store[0].advantage("less")


def test_what_has_no_scores(url: str) -> None:
    store = open_store(url)
    assert store[2].teachers == store[19].teachers == ["teacher"]
    assert store[0].teachers == ["other", "teacher"]
    with pytest.raises(StoreError, match="has no scores: too long"):
        store[2].advantage("other")
    with pytest.raises(StoreError, match="not scored by teacher 'other'"):
        store[19].advantage("other")
    whole, seen = len(store[0].response_ids), len(store[0].advantage("other"))
    assert seen == min(whole, CUT - len(store[0].prompt_ids))
    unscored = open_store(url)[:0]
    assert unscored.to_arrow().num_rows == unscored.to_arrow("token").num_rows == 0


def test_tables(url: str) -> None:
    store = open_store(url)
    rows = store.to_arrow().to_pylist()
    for row, rollout in zip(rows, store, strict=True):
        assert row["response_ids"] == rollout.response_ids.tolist()
        assert (row["finish"], row["num_response_tokens"]) == (rollout.finish.name.lower(), len(rollout.response_ids))
        for teacher in store.teachers:
            if teacher in rollout.teachers:
                assert row[f"advantage_{teacher}"] == rollout.advantage(teacher).tolist()
                assert row[f"mean_advantage_{teacher}"] == pytest.approx(rollout.advantage(teacher).mean(), rel=1e-5)
            else:
                assert row[f"advantage_{teacher}"] is row[f"mean_advantage_{teacher}"] is None
    table = store[4:7].to_arrow("token")
    assert table.num_rows == store[4:7].response_lens.sum()
    tokens = [row for row in table.to_pylist() if row["rollout"] == 5]
    assert [row["position"] for row in tokens] == list(range(len(store[5].response_ids)))
    assert [row["advantage_teacher"] for row in tokens] == store[5].advantage("teacher").tolist()
    seen = len(store[5].advantage("other"))
    assert [row["advantage_other"] is None for row in tokens] == [position >= seen for position in range(len(tokens))]
    assert table.schema.metadata[b"opd_store_id"].decode() == store.reader.store_id


def test_names_that_are_not_known(url: str) -> None:
    store = open_store(url)
    with pytest.raises(UserError, match="'rollouts': a table's rows are 'rollout', 'token'"):
        store.to_arrow("rollouts")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'al': a text is that of 'response', 'prompt', 'all'"):
        store[0].text("al")  # type: ignore[arg-type]


def test_pandas_is_asked_for_by_name(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UserError, match=r"pandas is not installed; pip install pandas, or take to_arrow\(\)"):
        open_store(url).to_pandas()


def test_prompts_know_their_rollouts(url: str) -> None:
    store = open_store(url)
    assert len(store.prompts) == 10
    assert [prompt.rollouts for prompt in store.prompts] == [[2 * n, 2 * n + 1] for n in range(10)]
    prompt = store[7].prompt
    assert (prompt.index, prompt.content, prompt.answer, prompt.meta) == (3, None, None, {})
    assert prompt.ids is not None
    np.testing.assert_array_equal(prompt.ids, store[6].prompt_ids)
    assert store.prompts.note == "no run beside the store says where prompts.jsonl is; open the store with prompts=FILE"
    assert [entry.index for entry in store.prompts[8:]] == [8, 9]


def test_several_stores_are_one(tmp_path: Path) -> None:
    urls = [str(tmp_path / f"{name}.opd.zarr") for name in "ab"]
    for seed, url in enumerate(urls):
        fill(url, make_manifest(num_prompts=3 + seed, samples=1), seed=seed)
        score(url)
    store = open_store(urls)
    assert len(store) == 7
    assert len(store.prompts) == 7
    assert [rollout.prompt.index for rollout in store] == [0, 1, 2, 0, 1, 2, 3]
    assert [prompt.rollouts for prompt in store.prompts] == [[n] for n in range(7)]
    np.testing.assert_array_equal(store[3].response_ids, open_store(urls[1])[0].response_ids)
    with pytest.raises(UserError, match="1 prompt files for 2 stores; give one for each"):
        open_store(urls, prompts="prompts.jsonl")
    with pytest.raises(UserError, match="no store is given"):
        open_store([])


def test_a_given_tokenizer_is_the_samplers(tmp_path: Path) -> None:
    for name, token in (("own", "<extra>"), ("other", "<another>")):
        (tmp_path / name).mkdir()
        make_tokenizer(tmp_path / name, extra_token=token)
    sampler = fake_fingerprint("student").model_copy(update={"tokenizer": fingerprint_tokenizer(tmp_path / "own")})
    scored_store(str(tmp_path / "a.opd.zarr"), sampler=sampler, num_prompts=2, samples=1)
    rollout = open_store(tmp_path / "a.opd.zarr", tokenizer=tmp_path / "own")[0]
    texts = [rollout.text(what, special_tokens=False) for what in ("prompt", "response", "all")]
    assert texts[0] + texts[1] == texts[2]
    with pytest.raises(LineageError, match=r"is not that of student .* give that model's directory"):
        open_store(tmp_path / "a.opd.zarr", tokenizer=tmp_path / "other")[0].text()
    with pytest.raises(UserError, match="open the store with tokenizer=DIR, the directory of student"):
        open_store(tmp_path / "a.opd.zarr")[0].text()


def run_folder(tmp_path: Path) -> Path:
    """The folder of a run with tokenizer, prompts and a store, but without weights."""
    run = tmp_path / "runs" / "mine"
    (run / "student").mkdir(parents=True)
    make_tokenizer(run / "student")
    (run / "recipe.toml").write_text(
        'name = "mine"\nrun_dir = "{run_dir}"\n[models]\nteacher = "none"\nstudent = "{run_dir}/student"\n'.replace(
            'run_dir = "{run_dir}"\n', f'run_dir = "{run}"\n'
        )
        + '[rollout]\nprompts = "{run_dir}/prompts.jsonl"\nnum_prompts = 6\n'
    )
    prompts, _ = read_prompts(write_prompts(run / "prompts.jsonl", count=8), limit=6)
    sampler = fake_fingerprint("student").model_copy(update={"tokenizer": fingerprint_tokenizer(run / "student")})
    scored_store(str(run / "rollouts.opd.zarr"), prompts=prompts, sampler=sampler, samples=1)
    return run


def test_a_run_says_where_tokenizer_and_prompts_are(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    store = open_store(run / "rollouts.opd.zarr")
    assert isinstance(store[0].text("all"), str)
    assert [prompt.answer for prompt in store.prompts] == [str(n) for n in range(6)]
    assert store[4].prompt.content == "ab" * 5 + " 4"
    assert store.prompts.note == f"from {run}/prompts.jsonl"
    given = open_store(run / "rollouts.opd.zarr", prompts=run / "prompts.jsonl")
    assert [prompt.answer for prompt in given.prompts] == [str(n) for n in range(6)]


def test_an_evaluation_of_a_run_knows_its_prompts(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    with (run / "recipe.toml").open("a") as file:
        file.write('[eval.few]\nprompts = "{run_dir}/prompts.jsonl"\nnum_prompts = 3\n')
    prompts, _ = read_prompts(run / "prompts.jsonl", limit=3)
    sampler = open_store(run / "rollouts.opd.zarr").manifest.sampler
    place = run / "eval" / "few" / "sft.opd.zarr"
    scored_store(str(place), prompts=prompts, sampler=sampler, samples=1, sampler_role="evaluation")
    assert [prompt.answer for prompt in open_store(place).prompts] == ["0", "1", "2"]
    assert open_store(place)[0].text("all")


def test_a_store_in_memory() -> None:
    """As on s3:// or gs://: what no folder of a run is beside."""
    scored_store("memory://api/a.opd.zarr", num_prompts=2, samples=1)
    store = open_store("memory://api/a.opd.zarr")
    assert len(store[0].advantage()) == len(store[0].response_ids)
    assert [prompt.content for prompt in store.prompts] == [None, None]
    with pytest.raises(UserError, match="no directory of student"):
        store[0].text()


def test_prompts_that_changed_are_not_shown(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "prompts.jsonl").write_text('{"prompt": "another", "answer": "1"}\n' * 6)
    store = open_store(run / "rollouts.opd.zarr")
    assert store.prompts[0].content is None
    assert "holds other prompts by now" in store.prompts.note
    with pytest.raises(StoreError, match="was sampled from other prompts"):
        _ = open_store(run / "rollouts.opd.zarr", prompts=run / "prompts.jsonl").prompts


def test_prompts_of_a_part_of_the_file(tmp_path: Path) -> None:
    """Drawn by a seed they are found in the file; a round's share is not, and what to do is said."""
    file = write_prompts(tmp_path / "prompts.jsonl", count=20)
    drawn = read_prompts(file, limit=6, subset_seed=3)
    share = read_prompts(file, limit=6, subset_seed=3, share=(2, 3))
    for name, (identity, _) in (("drawn", drawn), ("share", share)):
        scored_store(str(tmp_path / name), prompts=identity, samples=1, provenance={"subset_seed": 3})
    store = open_store(tmp_path / "drawn", prompts=file)
    assert [prompt.content for prompt in store.prompts] == [prompt.content for prompt in drawn[1]]
    with pytest.raises(StoreError, match=r"than those that subset_seed = 3 draws: 2 of .*round's share of the prompts"):
        _ = open_store(tmp_path / "share", prompts=file).prompts


def test_the_facade_has_no_data_of_its_own(url: str) -> None:
    """Slices share one reader, so that a file is read once."""
    store = open_store(url)
    assert store[3:5].reader is store.reader
    assert isinstance(store.prompts, api_store.Prompts)
    assert store[3:5].prompts is store.prompts
