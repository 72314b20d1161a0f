"""Parquet files and dataset folders, in the layouts of DAPO-Math-17k and OpenThoughts3 (rows made here, of the same fields)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_opd.data.prompts import drawn_key, read_prompts
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


ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {i % 30}", "contest_date": f"2024-01-{1 + i % 28:02}", "answer": "1"} for i in range(90)
]


def contents(path: Path, **options: Any) -> list[Any]:
    return [prompt.content for prompt in read_prompts(path, **options)[1]]


def test_a_subset_is_drawn_by_a_seed(tmp_path: Path) -> None:
    """The first of an order of the whole file, which is the same for every number of prompts and in every format."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drawn = [f"Question {place % 30}" for place in sorted(range(90), key=lambda place: drawn_key(5, place))]
    for count in (1, 7, 45, 90):
        identity, prompts = read_prompts(path, limit=count, subset_seed=5)
        assert [prompt.content for prompt in prompts] == drawn[:count]
        assert ([prompt.index for prompt in prompts], identity.num_prompts) == (list(range(count)), count)
    assert contents(write_parquet(tmp_path / "rows.parquet", ROWS), limit=45, subset_seed=5) == drawn[:45]
    assert contents(path, limit=45, subset_seed=6) != drawn[:45]
    shares = [contents(path, limit=45, subset_seed=5, share=(number, 4)) for number in (1, 2, 3, 4)]
    assert [content for share in shares for content in share] == drawn[:45]
    once = [f"Question {place}" for place in sorted(range(30), key=lambda place: drawn_key(5, place))]
    assert contents(path, limit=12, subset_seed=5, unique=True) == once[:12]
    dated = [row["prompt"] for row in ROWS if row["contest_date"] <= "2024-01-10"]
    assert contents(path, limit=8, subset_seed=5, dates=("2024-01-01", "2024-01-10")) == [
        dated[place] for place in sorted(range(len(dated)), key=lambda place: drawn_key(5, place))[:8]
    ]
    said: list[str] = []
    read_prompts(path, limit=3, subset_seed=5, say=said.append)
    assert "drawn from the whole of it by seed 5" in said[0]
    with pytest.raises(UserError, match="90 prompts, but num_prompts asks for 91"):
        read_prompts(path, limit=91, subset_seed=5)


def test_each_prompt_is_as_likely_to_be_drawn() -> None:
    """Over 4,000 seeds each of 20 places is among the first 5 in a quarter of the draws (standard deviation 27)."""
    counts = np.zeros(20)
    for seed in range(4000):
        counts[sorted(range(20), key=lambda place: drawn_key(seed, place))[:5]] += 1
    assert counts.sum() == 20_000
    assert abs(counts - 1000).max() < 5 * 27.4


def test_the_draw_is_the_same_in_every_version() -> None:
    """A store that is extended later must begin with the same prompts: these numbers may never change."""
    assert sorted(range(8), key=lambda place: drawn_key(7, place)) == [4, 7, 3, 2, 1, 5, 6, 0]


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
