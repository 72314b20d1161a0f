"""Parquet files and dataset folders, in the layouts of DAPO-Math-17k and OpenThoughts3 (rows made here, of the same fields)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError

DAPO: list[dict[str, Any]] = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve step by step. What is {i} + {i}?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{i}"},
    }
    for i in (1, 2, 1, 3, 2)
]
THOUGHTS: list[dict[str, Any]] = [
    {
        "difficulty": 7,
        "source": "a forum",
        "domain": "math",
        "conversations": [{"from": "human", "value": f"Question {i}"}, {"from": "gpt", "value": "<think>long</think> 4"}],
    }
    for i in range(4)
]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_saved_dataset(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The files of `Dataset.save_to_disk` in two shards."""
    folder.mkdir(parents=True)
    names = []
    for number, part in enumerate((rows[:1], rows[1:])):
        names.append(f"data-{number:05d}-of-00002.arrow")
        table = pa.Table.from_pylist(part)
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_dapo_layout(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "dapo-math-17k.parquet", DAPO)
    identity, prompts = read_prompts(path)
    assert identity.num_prompts == 5
    assert prompts[0].content == [{"role": "user", "content": "Solve step by step. What is 1 + 1?"}]
    assert [prompt.answer for prompt in prompts] == ["2", "4", "2", "6", "4"]
    assert prompts[3].meta["extra_info"] == {"index": "id-3"}
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3, 4]
    once, kept = read_prompts(path, unique=True)
    assert [prompt.answer for prompt in kept] == ["2", "4", "6"]
    assert [prompt.index for prompt in kept] == [0, 1, 2]
    assert once.sha256 != identity.sha256
    assert [prompt.answer for prompt in read_prompts(path, unique=True, limit=2)[1]] == ["2", "4"]
    with pytest.raises(UserError, match="3 prompts, but num_prompts asks for 4"):
        read_prompts(path, unique=True, limit=4)


def test_openthoughts_layout(tmp_path: Path) -> None:
    """The answer of the dataset's own model is no part of the prompt."""
    write_parquet(tmp_path / "openthoughts3" / "data" / "train-00000-of-00002.parquet", THOUGHTS[:2])
    write_parquet(tmp_path / "openthoughts3" / "data" / "train-00001-of-00002.parquet", THOUGHTS[2:])
    write_parquet(tmp_path / "openthoughts3" / "data" / "test-00000-of-00001.parquet", THOUGHTS[:1])
    identity, prompts = read_prompts(tmp_path / "openthoughts3")
    assert [prompt.content for prompt in prompts] == [[{"role": "user", "content": f"Question {i}"}] for i in range(4)]
    assert prompts[0].meta == {"difficulty": 7, "source": "a forum", "domain": "math"}
    assert prompts[0].answer is None
    assert identity.name == "openthoughts3"


def test_the_same_rows_are_the_same_in_every_format(tmp_path: Path) -> None:
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in THOUGHTS))
    sources = [jsonl, write_parquet(tmp_path / "rows.parquet", THOUGHTS), write_saved_dataset(tmp_path / "saved", THOUGHTS)]
    read = [read_prompts(source) for source in sources]
    assert len({identity.sha256 for identity, _ in read}) == 1
    assert read[0][1] == read[1][1] == read[2][1]


def test_several_turns_keep_earlier_answers(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = tmp_path / "turns.jsonl"
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": messages[:4]}) + "\n")
    _, prompts = read_prompts(path)
    assert prompts[0].content == prompts[1].content == messages[:4]


def test_a_folder_of_several_splits_and_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["validation", "test"]}')
    with pytest.raises(UserError, match=r"splits validation, test; give the folder of one: .*/validation"):
        read_prompts(tmp_path)
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"broken.parquet: can't be read"):
        read_prompts(path)
    empty = tmp_path / "answers.jsonl"
    empty.write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}))
    with pytest.raises(UserError, match=r"answers.jsonl:1: 'messages' must be text or a list"):
        read_prompts(empty)
