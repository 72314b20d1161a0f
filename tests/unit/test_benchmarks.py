"""Files of known benchmarks, read as published: rows of their columns with our content, in every format that the reader knows."""

from __future__ import annotations

import json
import random
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import CALL, HUMANEVAL, MATH, MBPP_FULL, MBPP_SANITIZED, PROGRAMS, STDIN, write_rows

from megatron_opd.data import prompt_files
from megatron_opd.data.benchmarks import boxed_alone, layout_of, row_id
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError

FORMATS = ["rows.jsonl", "data/test-00000-of-00001.parquet"]


def read(path: Path, *rows: dict[str, Any], name: str = "rows.jsonl", **options: Any) -> list[Any]:
    write_rows(path / name, list(rows))
    return read_prompts(path, **options)[1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", MATH)
def test_problems_and_answers(tmp_path: Path, layout: str, name: str) -> None:
    """And nothing of a solution in the prompt."""
    row, question, answer = MATH[layout]
    (first, second) = read(tmp_path, row, row, name=name, split="test")
    assert (first.content, first.answer, second.index) == (question, answer, 1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", PROGRAMS)
def test_programs(tmp_path: Path, layout: str, name: str) -> None:
    """Of a row the task and its code are asked; its tests and solutions are kept for the grader, and only there."""
    row = PROGRAMS[layout]
    (prompt,) = read(tmp_path, row, name=name, split="test")
    assert isinstance(prompt.content, str)
    assert prompt.meta == row
    assert prompt.answer is None
    asked = row.get("question_content") or row.get("text") or row["prompt"]
    assert asked.strip() in prompt.content
    assert prompt.content.endswith("Give the whole program in one ```python block.")
    for hidden in ("canonical_solution", "code", "test", "private_test_cases"):
        assert row.get(hidden, "\0").strip() not in prompt.content
    assert row_id(prompt.meta) == str(row.get("question_id") or row["task_id"])


def test_the_form_of_an_answer_follows_the_tests(tmp_path: Path) -> None:
    stdin, call, human, full, sanitized = (prompt.content for prompt in read(tmp_path, STDIN, CALL, HUMANEVAL, MBPP_FULL, MBPP_SANITIZED))
    assert "standard input" in stdin
    assert "standard input" not in call
    assert f"```python\n{CALL['starter_code'].rstrip()}\n```" in call
    assert f"```python\n{HUMANEVAL['prompt']}```" in human
    assert "`twice`" in human
    block = "\n".join(["import math", *MBPP_FULL["test_list"]])
    assert f"```python\n{block}\n```" in full
    assert full == sanitized


def test_without_answers_tests_are_not_kept(tmp_path: Path) -> None:
    """To sample, gigabytes of tests are not wanted; what is asked is the same."""
    rows = [STDIN, {"prompt": "x", "tests": {"kind": "assert", "cases": ["assert f()"]}}]
    whole, lean = read(tmp_path, *rows), read(tmp_path, *rows, answers=False)
    assert [prompt.content for prompt in whole] == [prompt.content for prompt in lean]
    assert {"public_test_cases", "private_test_cases"} == whole[0].meta.keys() - lean[0].meta.keys()
    assert lean[1].meta == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (STDIN | {"question_content": 3}, "'question_content' must be text, not 3"),
        (CALL | {"starter_code": ["x"]}, r"'starter_code' must be text, not \['x'\]"),
        (HUMANEVAL | {"prompt": None}, "'prompt' must be text, not None"),
        (HUMANEVAL | {"entry_point": 1}, "'entry_point' must be text"),
        (MBPP_FULL | {"text": 1}, "'text' must be text"),
        (MBPP_FULL | {"test_list": "assert x"}, "'test_list' must be a list of texts, not 'assert x'"),
        (MBPP_SANITIZED | {"test_imports": [1]}, "'test_imports' must be a list of texts"),
        ({"Problem": "x", "PROBLEM": "y"}, "the columns 'Problem' and 'PROBLEM' differ in case alone"),
        ({"problem": "x", "solution": r"\boxed{1} or \boxed{2}", "answer": [1, 2]}, "'answer' has 2 elements"),
        ({"instruction": "Sort it.", "input": "3 1 2", "output": "1 2 3"}, "'instruction' has an 'input' .'3 1 2'. beside it"),
    ],
)
def test_faults_name_file_row_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"rows.jsonl:2: {message}"):
        read(tmp_path, STDIN, row)


def test_spelling_changes_nothing_where_a_row_can_be_read_as_it_is(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "Prompt": "b", "Answer": "7"}, {"Question": "c", "Answer": 0.10}, {"instruction": "d", "output": "e"}]
    first, second, third = read(tmp_path, *rows)
    assert (first.content, first.answer, first.meta) == ("a", None, {"Prompt": "b", "Answer": "7"})
    assert (second.content, second.answer) == ("c", "0.1")
    assert (third.content, third.meta) == ("d", {"output": "e"})
    (tmp_path / "rows.jsonl").write_text('{"Question": "c", "Answer": 0.10}\n')  # as it is written there
    assert read_prompts(tmp_path)[1][0].answer == "0.10"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{204}", "204"),
        (r"  $\boxed{ \frac{1}{2} }$ ", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"So it is \boxed{204}", None),
        (r"\boxed{1} and \boxed{2}", None),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        (204, None),
        (None, None),
    ],
)
def test_a_solution_that_is_only_a_box(solution: Any, answer: str | None) -> None:
    assert boxed_alone(solution) == answer


def test_layouts_are_told_by_columns_that_only_they_have() -> None:
    assert [layout_of(row) for row in PROGRAMS.values()] == ["livecodebench", "livecodebench", "humaneval", "mbpp", "mbpp"]
    assert [layout_of(row) for row, _, _ in MATH.values()] == [None] * len(MATH)
    assert layout_of({"prompt": "x", "test": "y", "code": "z", "text": "t"}) is None


def test_rows_of_tens_of_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiveCodeBench has them, in lines; Parquet is then read few rows at a time."""
    rows = [STDIN | {"private_test_cases": "A" * (17 << 20), "question_id": name} for name in "ab"]
    assert [prompt.meta["question_id"] for prompt in read(tmp_path, *rows)] == ["a", "b"]
    monkeypatch.setattr(prompt_files, "_LARGEST_LINE", 1 << 20)
    with pytest.raises(UserError, match=r"rows.jsonl:1: a line of more than 1 MiB"):
        read_prompts(tmp_path)
    monkeypatch.setattr(prompt_files, "_BATCH_BYTES", 1 << 10)
    sizes = []
    monkeypatch.setattr(prompt_files, "_readable", lambda column: sizes.append(len(column)) or column)
    rows = [STDIN | {"private_test_cases": random.Random(number).randbytes(2000).hex()} for number in range(4)]
    assert len(read(tmp_path / "b", *rows, name="rows.parquet")) == 4
    assert set(sizes) == {1}


WINDOW = ("2024-08-01", "2025-02-01")


def test_a_window_of_days(tmp_path: Path) -> None:
    """Both its days belong to it, whatever the hour; rows outside are not even looked at."""
    days = ["2024-07-31T23:59:59", "2024-08-01", "2025-02-01T23:59:00", "2025-02-02T00:00:00"]
    rows = [STDIN | {"contest_date": day, "question_id": day} for day in days]
    rows[0]["question_content"] = None
    said: list[str] = []
    chosen = read(tmp_path, *rows, dates=WINDOW, say=said.append)
    assert [(prompt.index, prompt.meta["question_id"]) for prompt in chosen] == [(0, days[1]), (1, days[2])]
    assert said == [f"prompts of {tmp_path}: rows.jsonl; 2 of 4 rows are of 2024-08-01 to 2025-02-01, and all of 2024-07-31 to 2025-02-02"]
    assert len(read(tmp_path, *rows, dates=WINDOW, limit=1)) == 1
    with pytest.raises(UserError, match=r"2 prompts, but num_prompts asks for 3 \(2 of 4 rows are of 2024-08-01 to 2025-02-01"):
        read(tmp_path, *rows, dates=WINDOW, limit=3)
    with pytest.raises(UserError, match=r"no prompts in it \(0 of 4 rows are of 2020-01-01 to 2020-12-31, and all of 2024-07-31"):
        read(tmp_path, *rows, dates=("2020-01-01", "2020-12-31"))
    stamps = [{"prompt": str(day), "date": datetime(2024, 7, day)} for day in (30, 31)]
    write_rows(tmp_path / "other/rows.parquet", stamps)
    spelled = [
        {"Problem": "p", "Date": "2024-08-02"},
        {"problem": "q", "Contest_Date": "", "date": "2024-08-03"},
        {"problem": "r", "date": "2020-01-01"},
    ]
    assert [prompt.content for prompt in read(tmp_path / "spelled", *spelled, dates=WINDOW)] == ["p", "q"]
    assert [prompt.content for prompt in read_prompts(tmp_path / "other", dates=("2024-07-31", "2024-08-01"))[1]] == ["31"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "no field 'contest_date' or 'date', by which `dates` chooses rows; leave `dates` out"),
        ({"prompt": "x", "contest_date": None}, "no field 'contest_date'"),
        ({"prompt": "x", "date": "August 2024"}, "'date' must be a date such as .* not 'August 2024'"),
        ({"prompt": "x", "contest_date": 20240801}, "'contest_date' must be a date"),
        (["x"], "no field 'contest_date'"),
    ],
)
def test_rows_without_a_day_are_refused_where_days_are_asked_for(tmp_path: Path, row: Any, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(STDIN) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows.jsonl:2: {message}"):
        read_prompts(tmp_path, dates=WINDOW)


def names_of(folder: Path, split: Any) -> list[Any]:
    return [prompt.content for prompt in read_prompts(folder, split=split)[1]]


def publish(folder: Path, *names: str) -> Path:
    for name in names:
        write_rows(folder / name, [{"prompt": name}])
    return folder


@pytest.mark.parametrize(
    ("names", "trained", "evaluated"),
    [
        (["test.jsonl", "test2.jsonl", "test3.jsonl"], [0, 1, 2], [0, 1, 2]),  # LiveCodeBench, whose releases add files
        (["main/test-00000-of-00001.parquet", "main/train-00000-of-00001.parquet"], [1], [0]),  # one configuration of GSM8K
        (["openai_humaneval/test-00000-of-00001.parquet"], [0], [0]),
        ([f"full/{split}-00000-of-00001.parquet" for split in ("prompt", "test", "train", "validation")], [2], [1]),  # MBPP
        (["aime2025-I.jsonl", "aime2025-II.jsonl"], [0, 1], [0, 1]),
        (["aime_2024_problems.parquet"], [0], [0]),
        (["data/train-00000-of-00001.parquet"], [0], [0]),
        (["train.jsonl", "validation.jsonl"], [0], [1]),
        (["test.jsonl", "train.jsonl", "train2.jsonl"], [1, 2], [0]),
    ],
)
def test_splits_of_published_folders(tmp_path: Path, names: list[str], trained: list[int], evaluated: list[int]) -> None:
    publish(tmp_path, *names)
    assert names_of(tmp_path, "train") == [names[number] for number in trained]
    assert names_of(tmp_path, "test") == [names[number] for number in evaluated]
    saved = tmp_path / "saved"
    publish(saved, "train/data.jsonl", "test/data.jsonl", "validation/data.jsonl")
    for listed, there, taken in (
        (["train", "test", "validation"], "test", "test"),
        (["train", "validation"], "test", "validation"),
        (["train", "test"], "train", "train"),
        (["test"], "train", "test"),
    ):
        (saved / "dataset_dict.json").write_text(json.dumps({"splits": listed}))
        assert names_of(saved, there) == [f"{taken}/data.jsonl"]


def test_configurations_are_refused_with_the_folder_to_give(tmp_path: Path) -> None:
    """GSM8K and MBPP as a whole. What an evaluation reads is said."""
    publish(tmp_path, *(f"{name}/{split}-00000-of-00001.parquet" for name in ("main", "socratic") for split in ("train", "test")))
    with pytest.raises(UserError, match=re.escape(f"(main/, socratic/); give the folder or file of one, such as {tmp_path}/main")):
        read_prompts(tmp_path, split="test")
    said: list[str] = []
    read_prompts(tmp_path / "main", split="test", say=said.append)
    assert said == [f"prompts of {tmp_path}/main: test-00000-of-00001.parquet (split test); not read: train-00000-of-00001.parquet"]
    publish(tmp_path / "b", "algebra.jsonl", "geometry/dev-test.jsonl")
    with pytest.raises(UserError, match=r"none is 'test' or 'validation' or 'train' \(files of no split, test and validation\)"):
        read_prompts(tmp_path / "b", split="test")
