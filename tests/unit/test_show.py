"""megatron-opd show in a terminal: what is chosen, colours and marks, verdicts, the student of now, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_model, make_tokenizer
from unit.graded_rows import make_row, write_rows
from unit.store_parts import VOCAB, fake_fingerprint, make_manifest, make_rollouts, make_scores, scored_store
from unit.store_parts import score as score_random

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.errors import UserError
from megatron_opd.evaluate.accuracy import response_text
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.hf.tokenizer import load_tokenizer
from megatron_opd.records import Finish, Lineage, Rollout, TeacherScores
from megatron_opd.show import terminal
from megatron_opd.show.choose import Query, choose
from megatron_opd.show.items import LEVELS, disagreement, level, load_item
from megatron_opd.show.tokens import TokenTexts
from megatron_opd.show.verdicts import read_verdicts
from megatron_opd.store_records import Excluded, ScoreManifest

NO_TEXTS = TokenTexts()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("show") / "sft.opd.zarr")
    scored_store(url)
    return url


def names(reader: StoreReader, tokenizer: Any = None, **query: object) -> list[tuple[int, int]]:
    asked = Query(**({"limit": 100} | query))  # type: ignore[arg-type]
    return [place.name for place in choose(reader, "teacher", asked, read_verdicts(reader, tokenizer), NO_TEXTS)]


def test_levels_have_the_sign_of_the_gap() -> None:
    gaps = np.array([np.nan, 0.2, -LEVELS[0], 0.6, -1.0, 3.9, -100.0], np.float32)
    assert level(gaps).tolist() == [0, 0, -1, 2, -3, 4, -5]


def test_the_worst_are_those_of_the_largest_disagreement(store: str) -> None:
    reader = StoreReader(store)
    totals = {}
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        gap = reader.scores(index, "teacher").logp - rollout.student_logp
        totals[rollout.prompt_index, rollout.sample_index] = disagreement(gap[rollout.prompt_len :])
    wanted = sorted(totals, key=lambda name: -totals[name])
    assert names(reader, limit=3, sort="disagreement") == wanted[:3]
    assert names(reader, sort="disagreement") == wanted


def test_filters_and_orders(store: str) -> None:
    reader = StoreReader(store)
    everything = list(zip(reader.prompt_indices.tolist(), reader.sample_indices.tolist(), strict=True))
    assert names(reader) == everything
    assert names(reader, limit=2) == everything[:2]
    assert names(reader, prompt=3) == [(3, 0), (3, 1)]
    unfinished = names(reader, only="unfinished")
    assert unfinished == [name for name, finish in zip(everything, reader.finishes, strict=True) if finish != Finish.STOP]
    assert 0 < len(unfinished) < len(everything)
    lengths = dict(zip(everything, reader.response_lens.tolist(), strict=True))
    assert [lengths[name] for name in names(reader, sort="length")] == sorted(lengths.values(), reverse=True)
    for query, message in (
        ({"prompt": 10}, r"--prompt 10: .* has the prompts 0 to 9"),
        ({"search": "a"}, "no tokenizer .*--tokenizer DIR"),
        ({"only": "wrong"}, "verdicts are not known"),
        ({"sort": "verdict"}, "verdicts are not known"),
    ):
        with pytest.raises(UserError, match=message):
            names(reader, **query)
    with pytest.raises(UserError, match="no teacher scored it"):
        choose(reader, None, Query(1, sort="disagreement"), read_verdicts(reader, None), NO_TEXTS)


def test_verdicts_are_those_of_the_evaluation_beside_the_store(store: str, tmp_path: Path) -> None:
    url = str(shutil.copytree(store, tmp_path / "opd.opd.zarr"))
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    reader = StoreReader(url)
    rows = []
    for rollout in map(reader.rollout, range(len(reader))):
        outcome = "wrong" if rollout.prompt_index % 2 else "right"
        row = make_row(
            rollout.prompt_index,
            rollout.sample_index,
            outcome=outcome,
            score=float(outcome == "right"),
            finish="stop" if rollout.finish == Finish.STOP else "length",
            tokens=rollout.response_len,
            response=response_text(tokenizer, rollout.tokens, rollout.prompt_len),
        )
        rows.append(row)
    rows[2] = replace(rows[2], tokens=rows[2].tokens + 1)
    rows[6] = replace(rows[6], response=f"{rows[6].response[:-1]}~")  # of as many tokens, which ends as this one
    write_rows(tmp_path / "opd.prompts.jsonl", rows)
    verdicts = read_verdicts(reader, tokenizer)
    assert verdicts.source == "opd.prompts.jsonl; 2 rows there are of other responses: run 'megatron-opd eval' again"
    missing = {rows[2].name, rows[6].name}
    assert {row.name for row in rows if verdicts.get(row.name) is None} == missing
    wrong = [row.name for row in rows if row.outcome == "wrong" and row.name not in missing]
    assert names(reader, tokenizer, only="wrong") == wrong
    assert names(reader, tokenizer, sort="verdict")[: len(wrong)] == wrong
    assert set(names(reader, tokenizer, sort="verdict")[-2:]) == missing
    with pytest.raises(UserError, match="verdicts are not known: without a tokenizer nothing shows whether"):
        names(reader, only="wrong")


def test_excluded_rollouts_are_listed_with_their_reasons(tmp_path: Path) -> None:
    url = str(tmp_path / "s.opd.zarr")
    manifest = make_manifest(num_prompts=4, samples=1)
    location = create_store(url, manifest)
    rollouts = make_rollouts(manifest, 0)
    write_part(location, 0, rollouts[1:], [Excluded(prompt_index=0, sample_index=0, reason="the prompt is too long")], {})
    record = StoreReader(url).parts[0]
    scores: list[TeacherScores | None] = list(make_scores(rollouts[1:]))
    scores[1] = None
    excluded = [Excluded(prompt_index=2, sample_index=0, reason="no answer of\nthe server")]
    manifest_ = ScoreManifest(part=0, teacher=fake_fingerprint("teacher"), excluded=excluded, part_crc32c=record.crc32c, crc32c={})
    write_scores(location, "teacher", manifest_, rollouts[1:], scores)
    reader = StoreReader(url)
    places = choose(reader, "teacher", Query(9, only="excluded"), read_verdicts(reader, None), NO_TEXTS)
    assert [(place.name, place.index is None) for place in places] == [((2, 0), False), ((0, 0), True)]
    items = [load_item(reader, place, "teacher", None) for place in places]
    text = "\n".join(terminal.lines(items, NO_TEXTS, colours=False))
    assert "prompt 2, sample 0 (rollout 1)" in text
    assert r"no scores: no answer of\nthe server" in text
    assert "prompt 0, sample 0; 0 tokens, no response; the prompt is too long" in text
    assert names(reader, sort="disagreement")[-1] == (2, 0)


def test_a_rollout_that_was_scored_in_part(tmp_path: Path) -> None:
    url = str(tmp_path / "s.opd.zarr")
    manifest = make_manifest(num_prompts=2, samples=1)
    location = create_store(url, manifest)
    rng = np.random.default_rng(0)
    rollouts = []
    for prompt in range(2):
        logp = np.full(20, np.nan, np.float32)
        logp[5:] = -1.0
        rollouts.append(Rollout(rng.integers(0, VOCAB, 20).astype(np.int32), 5, prompt, 0, Finish.LENGTH, logp))
    write_part(location, 0, rollouts, [], {})
    cut = [rollout.cut(12) for rollout in rollouts]
    record = ScoreManifest(
        part=0, teacher=fake_fingerprint("teacher"), max_tokens=12, part_crc32c=StoreReader(url).parts[0].crc32c, crc32c={}
    )
    write_scores(location, "teacher", record, rollouts, list(make_scores(cut)))
    reader = StoreReader(url)
    item = load_item(reader, choose(reader, "teacher", Query(1), read_verdicts(reader, None), NO_TEXTS)[0], "teacher", None)
    assert np.isfinite(item.gap).sum() == 7
    assert "of the first 7 tokens" in next(line for line in terminal.lines([item], NO_TEXTS, colours=False) if line)


# Through the command line, on a store of a model that is there.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("run") / "student", layers=1)


@pytest.fixture(scope="module")
def scored(model: Path) -> str:
    """A store beside the model that sampled it. The teacher finds the third token of each response unlikely; it writes '<b>' and a colour."""
    from transformers import AutoTokenizer

    url, fingerprint = str(model.parent / "rollouts.opd.zarr"), fingerprint_model(model)
    lineage = Lineage(base=fingerprint, sft_teacher=fake_fingerprint("teacher"))
    location = create_store(url, make_manifest(num_prompts=3, samples=1, sampler=fingerprint, lineage=lineage, stop_ids=[1]))
    encode = AutoTokenizer.from_pretrained(str(model)).encode
    rollouts, scores = [], []
    for prompt in range(3):
        head, tail = encode(f"question {prompt}"), encode("1+1\x1b[31m<b>" + "2" * prompt)
        tokens = np.array([*head, *tail, 1], np.int32)
        logp = np.full(len(tokens), np.nan, np.float32)
        logp[len(head) :] = -0.5
        rollouts.append(Rollout(tokens, len(head), prompt, 0, Finish.STOP, logp))
        teacher, T = logp.copy(), len(tokens)
        teacher[len(head) + 2] -= 3.0 + prompt
        ids, values = np.full((T, 2), -1, np.int32), np.full((T, 2), np.nan, np.float32)
        ids[len(head) :], values[len(head) :] = [*encode("2"), 1], (-0.25, -2.0)
        scores.append(TeacherScores(teacher, ids, values))
    write_part(location, 0, rollouts, [], {})
    record = StoreReader(url).parts[0]
    manifest = ScoreManifest(part=0, teacher=fake_fingerprint("teacher"), top_k=2, part_crc32c=record.crc32c, crc32c={})
    write_scores(location, "teacher", manifest, rollouts, scores)
    return url


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["show", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_marks_where_there_are_no_colours(scored: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, scored, "--worst", "1")
    assert "\x1b" not in printed
    assert "prompt 2, sample 0 (rollout 2); 14 tokens, ended by itself" in printed
    assert r"response 1+{1 -5.0}\x1b[31m<b>22<eos>" in printed
    assert "'1': '2' 77.9%, '<eos>' 13.5%" in printed
    assert "verdicts        not known" in printed


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_colours_in_a_terminal_unless_nobody_wants_them(scored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["show", scored, "--prompt", "1"]) == 0
    text = stream.getvalue()
    assert "1+\x1b[48;5;130;38;5;231m1\x1b[0m\\x1b[31m<b>2<eos>" in text  # ours is an escape, theirs is text
    assert "{1 " not in text
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not terminal.wants_colours(stream)
    assert terminal.wants_colours(stream)


def test_search_looks_at_prompt_and_response(scored: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rollouts        1 of 3" in run(capsys, scored, "--search", "question 1")
    assert "rollouts        2 of 3" in run(capsys, scored, "--search", "<b>2")
    assert "no rollout is what was asked for" in run(capsys, scored, "--search", "nowhere")


def test_the_student_of_now_scores_what_is_shown(scored: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, scored, "--worst", "1", "--student", str(model))
    assert "by log pi_T - log pi_student of now" in printed
    assert "log pi_student  token" in printed


def test_ids_where_the_tokenizer_is_not_there(store: str, scored: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, store, "--limit", "1")
    assert "no directory of student" in printed
    assert "shown by their ids; give its directory with --tokenizer DIR" in printed
    assert "is not that of student" in run(capsys, store, "--tokenizer", str(model), code=2)
    assert str(model) in run(capsys, scored, "--tokenizer", str(model), "--limit", "1")


def test_a_run_stands_for_its_rollouts(scored: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(scored).parent
    (folder / "recipe.toml").write_text(
        'name = "r"\n[models]\nteacher = "{run_dir}/teacher"\nstudent = "{run_dir}/student"\n[rollout]\nprompts = "p.jsonl"\n'
    )
    try:
        assert f"store           {scored}" in run(capsys, str(folder), "--limit", "1")
    finally:
        (folder / "recipe.toml").unlink()


def test_which_teacher(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(shutil.copytree(store, tmp_path / "s.opd.zarr"))
    score_random(url, teacher="other", parts=[0])
    assert "scored by 'other', 'teacher'; choose one of them with --teacher" in run(capsys, url, code=2)
    assert "scored by       'other'" in run(capsys, url, "--teacher", "other", "--limit", "1")
    assert "--teacher 'third'" in run(capsys, url, "--teacher", "third", code=2)
    assert "--worst K is" in run(capsys, url, "--worst", "1", "--sort", "length", code=2)


def test_a_store_that_nobody_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unit.store_parts import fill

    url = str(tmp_path / "s.opd.zarr")
    fill(url, make_manifest())
    printed = run(capsys, url, "--limit", "1")
    assert "nobody: there is nothing to colour by" in printed
    assert "no scores" in printed


def test_damage_is_named(scored: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = Path(shutil.copytree(scored, tmp_path / "sft.opd.zarr"))
    (tmp_path / "sft.prompts.jsonl").write_text(json.dumps({"prompt": 0}) + "\n")
    assert "sft.prompts.jsonl, line 1: not a row of graded samples" in run(capsys, str(url), "--tokenizer", str(model), code=2)
