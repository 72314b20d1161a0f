"""Rows of known benchmarks as they are published: their columns, and the task that a programming row puts to a model.

The wording of tasks is ours (docs/data.md says how it differs from the benchmarks' own). Columns that hold a solution are never shown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import date, datetime
from typing import Any, Literal

from megatron_opd.data.prompt_files import Row
from megatron_opd.errors import UserError

Layout = Literal["livecodebench", "humaneval", "mbpp"]
PUBLIC_TESTS, PRIVATE_TESTS = "public_test_cases", "private_test_cases"
# Columns that only a grader needs; they can take gigabytes.
TEST_COLUMNS = (PUBLIC_TESTS, PRIVATE_TESTS, "tests")
_DATES = ("contest_date", "date")
_IDS = ("unique_id", "task_id", "question_id", "problem_idx", "id")
_BOX = re.compile(r"\s*\$*\s*\\boxed\s*\{(.*)\}\s*\$*\s*", re.DOTALL)
_ONE_BLOCK = "Give the whole program in one ```python block."


def layout_of(row: Mapping[str, Any]) -> Layout | None:
    """The benchmark of programs whose columns a row has: LiveCodeBench's, HumanEval's, MBPP's (full or sanitized); None for any other."""
    if "question_content" in row and (PUBLIC_TESTS in row or PRIVATE_TESTS in row):
        return "livecodebench"
    if all(name in row for name in ("prompt", "entry_point", "test")):
        return "humaneval"
    if "test_list" in row and "code" in row and ("text" in row or "prompt" in row):
        return "mbpp"
    return None


def in_lower_case(row: Row, prompt_fields: Collection[str]) -> Row:
    """The row with its column names in lower case if only then it has one of `prompt_fields` (Maxwell-Jia/AIME_2024: Problem, Answer).

    Raises UserError where two names become the same.
    """
    names = list(row.value) if isinstance(row.value, dict) else []
    if any(name in prompt_fields for name in names) or not any(name.lower() in prompt_fields for name in names):
        return row
    spelled: dict[str, str] = {}
    for name in names:
        if (other := spelled.setdefault(name.lower(), name)) != name:
            raise UserError(f"{row.where}: the columns {other!r} and {name!r} differ in case alone; rename one of them")
    again = row.as_written
    return Row(row.where, _lowered(row.value), None if again is None else lambda: _lowered(again()))


def _lowered(value: dict[str, Any]) -> dict[str, Any]:
    return {name.lower(): item for name, item in value.items()}


def compose_task(row: Mapping[str, Any], where: str) -> str | None:
    """What a model is asked by a row of a benchmark of programs; None for rows of other layouts. Raises UserError."""
    match layout_of(row):
        case "livecodebench":
            return _competition(row, where)
        case "humaneval":
            code = text_column(row, "prompt", where).strip("\n")
            return (
                f"Complete this Python code so that `{text_column(row, 'entry_point', where)}` does what is described:\n\n"
                f"{_block(code)}\n\n{_ONE_BLOCK}"
            )
        case "mbpp":
            question = text_column(row, "text" if row.get("text") is not None else "prompt", where).strip()
            tests = "\n".join([*setup_lines(row, where), *text_list(row, "test_list", where)])
            return f"Write Python code for this task:\n\n{question}\n\nThese tests must pass:\n\n{_block(tests)}\n\n{_ONE_BLOCK}"
        case None:
            return None


def _competition(row: Mapping[str, Any], where: str) -> str:
    """LiveCodeBench: a row with starter code is solved by a method or function, any other by a program that reads standard input."""
    question = text_column(row, "question_content", where).strip()
    starter = text_column(row, "starter_code", where).rstrip() if row.get("starter_code") is not None else ""
    if starter.strip():
        form = f"Complete this code, and keep its names and arguments:\n\n{_block(starter)}"
    else:
        form = "The program reads its input from standard input and prints the answer, and nothing else, to standard output."
    return f"Write a Python program that solves this problem:\n\n{question}\n\n{form}\n\n{_ONE_BLOCK}"


def _block(code: str) -> str:
    return f"```python\n{code}\n```"


def setup_lines(row: Mapping[str, Any], where: str) -> list[str]:
    """What stands before the tests of an MBPP row: `test_setup_code` (full) and `test_imports` (sanitized). Raises UserError."""
    setup = text_column(row, "test_setup_code", where) if row.get("test_setup_code") is not None else ""
    imports = text_list(row, "test_imports", where) if row.get("test_imports") is not None else []
    return [text for text in (setup.strip("\n"), *imports) if text.strip()]


def text_column(row: Mapping[str, Any], name: str, where: str) -> str:
    """A column that must hold text. Raises UserError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, not {value!r:.80}; download the file again")
    return value


def text_list(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A column that must hold a list of texts. Raises UserError."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {name!r} must be a list of texts, not {value!r:.80}; download the file again")
    return value


def boxed_alone(solution: Any) -> str | None:
    r"""The answer of a solution that is nothing but `\boxed{...}` (math-ai/aime24); None for any other."""
    found = _BOX.fullmatch(solution) if isinstance(solution, str) else None
    if found is None:
        return None
    depth = 0
    for character in re.sub(r"\\[{}]", "", found[1]):
        depth += (character == "{") - (character == "}")
        if depth < 0:  # the box ends before the text does
            return None
    return found[1].strip() or None if depth == 0 else None


def day_of_row(row: Mapping[str, Any], where: str) -> date:
    """The day of a row, from `contest_date` or `date` in any case. Raises UserError without one."""
    spelled = {str(name).lower(): name for name in row} | {name: name for name in row}
    name = next((spelled[name] for name in _DATES if row.get(spelled.get(name, name)) not in (None, "")), None)
    if name is None:
        raise UserError(
            f"{where}: no field {' or '.join(map(repr, _DATES))}, by which `dates` chooses rows; leave `dates` out for this file"
        )
    if (day := _day_of(row[name])) is None:
        raise UserError(f"{where}: {name!r} must be a date such as '2024-08-01' or '2024-08-01T00:00:00', not {row[name]!r:.80}")
    return day


def _day_of(value: Any) -> date | None:
    """The day of a date, or of a date and time, as it is written (in its own time zone); None for what is none in ISO 8601."""
    if isinstance(value, date):
        return value.date() if isinstance(value, datetime) else value
    try:
        return datetime.fromisoformat(value.strip()).date() if isinstance(value, str) else None
    except ValueError:
        return None


def row_id(meta: Mapping[str, Any]) -> str | None:
    """What the row calls itself (unique_id, task_id, question_id, problem_idx, id); None where it doesn't."""
    return next((str(meta[name]) for name in _IDS if isinstance(meta.get(name), str | int) and meta[name] != ""), None)
