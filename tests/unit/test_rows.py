"""The file of graded samples: what is in it, that it is gone on with, and that damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.graded_rows import make_row, write_rows

from megatron_opd.errors import UserError
from megatron_opd.evaluate import rows as rows_module
from megatron_opd.evaluate.rows import RowWriter, by_prompt, key_of, read_rows


def excluded(prompt: int, sample: int = 0) -> Any:
    return make_row(prompt, sample, outcome="excluded", score=None, answer=None, reason="too long", finish=None, tokens=0, response=None)


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "opd.prompts.jsonl"
    rows = [make_row(0, id="aime-1", detail={"test": 3}), make_row(0, 1, response="é\n\0\u2028"), excluded(1)]
    with RowWriter(path) as writer:
        for row in rows:
            writer.add(row)
        writer.finish([row.name for row in rows])
    assert list(read_rows(path)) == rows
    assert path.read_bytes().count(b"\n") == 3
    assert {prompt: len(found) for prompt, found in by_prompt(read_rows(path)).items()} == {0: 2}


def test_rows_of_the_same_key_are_kept_and_put_in_order(tmp_path: Path) -> None:
    path = tmp_path / "opd.prompts.jsonl"
    old = [make_row(prompt, key=key_of(prompt)) for prompt in range(4)]
    write_rows(path, old)
    with RowWriter(path) as writer:
        assert [writer.find((prompt, 0), key_of(prompt)) is not None for prompt in range(5)] == [True] * 4 + [False]
        assert writer.find((1, 0), key_of("other")) is None
        changed = make_row(1, key=key_of("other"), outcome="wrong", score=0.0)
        writer.add(changed)
        with pytest.raises(UserError, match=r"line 5: sample 0 of prompt 1 is there twice: grading was interrupted; run"):
            list(read_rows(path))
        writer.finish([(prompt, 0) for prompt in range(3)])  # prompt 3 is no more
    assert list(read_rows(path)) == [old[0], changed, old[2]]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f".{path.name}.lock", path.name]


HOLD = """
import sys
from megatron_opd.evaluate.rows import RowWriter
with RowWriter(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are put in order by their places, which another writer would shift."""
    monkeypatch.setattr(rows_module, "_WAIT_SECONDS", 0.1)
    path = tmp_path / "opd.prompts.jsonl"
    write_rows(path, [make_row(0)])
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{path}: another run writes there \\(process {holder.pid} on "):
            RowWriter(path)
        holder.communicate("")
    with RowWriter(path) as writer:
        assert writer.find((0, 0), make_row(0).key) is not None


def test_a_finished_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "opd.prompts.jsonl"
    write_rows(path, [make_row(prompt) for prompt in range(3)])
    before = path.stat()
    with RowWriter(path) as writer:
        writer.finish([(prompt, 0) for prompt in range(3)])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 2000), whole=st.integers(0, 4))
def test_wherever_it_was_cut_off_it_goes_on(tmp_path_factory: pytest.TempPathFactory, cut: int, whole: int) -> None:
    path = tmp_path_factory.mktemp("rows") / "opd.prompts.jsonl"
    rows = [make_row(prompt, key=key_of(prompt), response="x" * prompt) for prompt in range(5)]
    write_rows(path, rows)
    content = path.read_bytes()
    path.write_bytes(content[: min(cut + whole * 300, len(content))])
    made = 0
    with RowWriter(path) as writer:
        for row in rows:
            if writer.find(row.name, row.key) is None:
                writer.add(row)
                made += 1
        writer.finish([row.name for row in rows])
    assert path.read_bytes() == content
    assert made == 5 - content[: cut + whole * 300].count(b"\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: row | {"score": None}, "line 2: score is None, which a row of outcome 'right' can't have"),
        (lambda row: row | {"score": 2}, "score is 2"),
        (lambda row: row | {"score": True}, "score is True"),
        (lambda row: row | {"outcome": "fine"}, "outcome is 'fine'"),
        (lambda row: row | {"outcome": "excluded"}, "score is 1.0"),
        (lambda row: row | {"finish": "abort"}, "finish is 'abort'"),
        (lambda row: row | {"prompt": -1}, "prompt is -1"),
        (lambda row: row | {"response": None}, "response is None"),
        (lambda row: row | {"detail": []}, r"detail is \[\]"),
        (lambda row: {"prompt": 1}, "its fields must be prompt, id, sample"),
        (lambda row: [1], "not a row of graded samples"),
    ],
)
def test_damaged_rows_are_named_and_made_again(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str, capsys: Any) -> None:
    path = tmp_path / "opd.prompts.jsonl"
    write_rows(path, [make_row(prompt) for prompt in range(3)])
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(damage(json.loads(lines[1])))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path))
    assert "line 2: " in str(caught.value)
    assert str(caught.value).endswith("run 'megatron-opd eval' again, which grades what is missing or damaged")
    with RowWriter(path) as writer:
        assert "1 rows are damaged" in capsys.readouterr().out
        assert writer.find((1, 0), "0" * 64) is None
        writer.add(make_row(1))
        writer.finish([(prompt, 0) for prompt in range(3)])
    assert list(read_rows(path)) == [make_row(prompt) for prompt in range(3)]


def test_what_is_no_finished_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file; 'megatron-opd eval' writes it"):
        list(read_rows(tmp_path / "none"))
    path = tmp_path / "opd.prompts.jsonl"
    write_rows(path, [make_row(0), make_row(1)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="line 2: is cut off: grading was interrupted"):
        list(read_rows(path))
