"""The task of the tour of code: short list programs in Python, and sums, in the layouts of published benchmarks.

A list `a` is changed in three steps ("b: add 3, c: reverse, d: keep odd"), each a line of the program. The same list task is put as a row of five
layouts: LiveCodeBench's (standard input), HumanEval's, MBPP's and our own `tests` (docs/data.md); sums stand in rows of AIME's columns.
Rows are ours; only their columns are the benchmarks'.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import write_jsonl
from megatron_opd.data.benchmarks import compose_task
from megatron_opd.demo.language import EOS, PAD, UNKNOWN, Language
from megatron_opd.errors import UserError

# What is said -> the expression of the program for a list `a`, what it does with a list and a number; {n}: a digit from 1 to 9.
OPERATIONS: dict[str, tuple[str, Callable[[list[int], int], list[int]]]] = {
    "add {n}": ("[x + {n} for x in {a}]", lambda a, n: [x + n for x in a]),
    "multiply by {n}": ("[x * {n} for x in {a}]", lambda a, n: [x * n for x in a]),
    "keep above {n}": ("[x for x in {a} if x > {n}]", lambda a, n: [x for x in a if x > n]),
    "keep even": ("[x for x in {a} if x % 2 == 0]", lambda a, _: [x for x in a if x % 2 == 0]),
    "keep odd": ("[x for x in {a} if x % 2 == 1]", lambda a, _: [x for x in a if x % 2 == 1]),
    "reverse": ("{a}[::-1]", lambda a, _: a[::-1]),
    "sort": ("sorted({a})", lambda a, _: sorted(a)),
    "drop the first": ("{a}[1:]", lambda a, _: a[1:]),
    "drop the last": ("{a}[:-1]", lambda a, _: a[:-1]),
}
LAYOUTS = ("aime_like", "lcb_like", "humaneval_like", "mbpp_like", "own_tests")
# Every task belongs to one split, by its hash: per cent of all tasks. Whatever the seeds and the layouts, splits never share a task.
SPLITS = {"sft": range(20), "rollout": range(20, 60), "eval": range(60, 80), "teacher": range(80, 100)}
_NUM_STEPS = 3
_MOST_DRAWS = 10_000  # of known tasks in a row
_LARGEST_STEP = 3  # of sums, whose values are digits
_FUNCTION = "change"
_FIRST_DAY, _NUM_DAYS = date(2024, 1, 1), 366  # of the rows in LiveCodeBench's layout


@dataclass(frozen=True)
class ListTask:
    """Operations on a list, in their order: (key of OPERATIONS, number)."""

    steps: tuple[tuple[str, int], ...]

    @property
    def description(self) -> str:
        return ", ".join(f"{name}: {said.format(n=n)}" for name, (said, n) in zip("bcd", self.steps, strict=True))

    @property
    def lines(self) -> list[str]:
        """The program's lines."""
        names = zip("abc", "bcd", self.steps, strict=True)
        return [f"{name} = " + OPERATIONS[said][0].format(n=n, a=before) for before, name, (said, n) in names]

    def result(self, a: list[int]) -> list[int]:
        for said, n in self.steps:
            a = OPERATIONS[said][1](a, n)
        return a


@dataclass(frozen=True)
class SumTask:
    """A digit, and what is added to it or subtracted; between the steps, too, it stays a digit."""

    start: int
    steps: tuple[int, ...]

    @property
    def description(self) -> str:
        return f"Start with {self.start}, " + ", ".join(f"{'add' if step > 0 else 'subtract'} {abs(step)}" for step in self.steps)

    @property
    def result(self) -> int:
        return self.start + sum(self.steps)


Task = ListTask | SumTask


def solution(task: Task, layout: str) -> str:
    """The response that the task wants."""
    if isinstance(task, SumTask):
        written, value = [], task.start
        for step in task.steps:
            written.append(f"{value}{step:+d}={value + step}")
            value += step
        return ", ".join([*written, rf"\boxed{{{value}}}"])
    if layout == "lcb_like":
        program = ["a = list(map(int, input().split()))", *task.lines, "print(*d)"]
    else:
        program = [f"def {_FUNCTION}(a):", *("    " + line for line in (*task.lines, "return d"))]
    return "\n".join(["```python", *program, "```"])


def make_row(task: Task, layout: str, number: int, rng: random.Random) -> dict[str, Any]:
    """A row with the columns of the layout; its tests, of lists that `rng` draws, pass by `ListTask.result` alone."""
    if isinstance(task, SumTask):
        return {"id": number, "problem": f"{task.description}. Give the last number in \\boxed{{}}.", "answer": str(task.result)}
    said = task.description
    if layout == "mbpp_like":
        tests = [f"assert {_FUNCTION}({a}) == {task.result(a)}" for a in (_draw_list(rng, 5) for _ in range(2))]
        return {
            "task_id": number,
            "text": f"Change a list: {said}.",
            "code": solution(task, layout),
            "test_list": tests,
            "test_setup_code": "",
        }
    lists = [_draw_list(rng, 10) for _ in range(3)]
    if layout == "humaneval_like":
        asserts = [f"    assert candidate({a}) == {task.result(a)}" for a in lists]
        return {
            "task_id": f"Lists/{number}",
            "prompt": f'def {_FUNCTION}(a):\n    """Change a list: {said}."""\n',
            "entry_point": _FUNCTION,
            "canonical_solution": "".join(f"    {line}\n" for line in (*task.lines, "return d")),
            "test": "\n".join(["def check(candidate):", *asserts]) + "\n",
        }
    if layout == "lcb_like":
        cases = [{"input": _words(a) + "\n", "output": _words(task.result(a)) + "\n", "testtype": "stdin"} for a in lists]
        return {
            "question_title": f"List {number}",
            "question_content": f"The input is a list. Change the list: {said}.",
            "question_id": f"lists_{number}",
            "contest_date": f"{_FIRST_DAY + timedelta(days=number % _NUM_DAYS)}T00:00:00",
            "starter_code": "",
            "public_test_cases": json.dumps(cases[:1]),
            "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases[1:])))).decode(),
            "metadata": "{}",
        }
    calls = [{"arguments": [a], "expected": task.result(a)} for a in lists]
    return {"id": f"own_{number}", "prompt": f"{_FUNCTION}(a): {said}.\n", "tests": {"kind": "call", "function": _FUNCTION, "cases": calls}}


def prompt_of(row: dict[str, Any]) -> str:
    """What a model is asked by a row."""
    return compose_task(row, "row") or row.get("problem") or row["prompt"]


def _draw_list(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(20) for _ in range(length)]


def _words(a: list[int]) -> str:
    return " ".join(map(str, a))


def split_of(task: Task) -> str:
    """Name of the split that a task belongs to, in whatever layout."""
    percent = int.from_bytes(hashlib.sha256(task.description.encode()).digest()[:8], "big") % 100
    return next(name for name, percents in SPLITS.items() if percent in percents)


def draw_task(rng: random.Random, split: str, layout: str) -> Task:
    """A task drawn from a split: of list tasks each operation, of sums each number is as likely."""
    while True:
        if layout == "aime_like":
            values = [rng.randrange(10)]
            for _ in range(_NUM_STEPS):
                values.append(rng.choice([value for value in range(10) if 1 <= abs(value - values[-1]) <= _LARGEST_STEP]))
            task: Task = SumTask(values[0], tuple(after - before for before, after in pairwise(values)))
        else:
            said = [rng.choice(list(OPERATIONS)) for _ in range(_NUM_STEPS)]
            task = ListTask(tuple((name, rng.randrange(1, 10) if "{n}" in name else 0) for name in said))
        if split_of(task) == split:
            return task


def draw_tasks(split: str, layouts: tuple[str, ...], seed: int) -> Iterator[tuple[Task, str]]:
    """Different tasks, the layouts in turn. Raises UserError for a split or a layout that there is not, and where there are no more tasks."""
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    if strange := [layout for layout in layouts if layout not in LAYOUTS]:
        raise UserError(f"no layout {strange[0]!r}; choose of {', '.join(LAYOUTS)}")
    rng = random.Random(f"{split} {layouts} {seed}")
    seen: set[Task] = set()
    while True:
        for layout in layouts:
            fresh = (task for _ in range(_MOST_DRAWS) if (task := draw_task(rng, split, layout)) not in seen)
            if (task := next(fresh, None)) is None:
                raise UserError(f"split {split!r} has no more than {len(seen)} different tasks of {', '.join(layouts)}; take fewer")
            seen.add(task)
            yield task, layout


def write_rows(path: str | Path, *, split: str, layouts: tuple[str, ...], count: int, seed: int) -> None:
    """Write rows of `count` different tasks of a split as JSONL, the layouts in turn; the same arguments give the same bytes. Raises UserError."""
    tasks = draw_tasks(split, layouts, seed)
    rng = random.Random(f"tests {split} {seed}")
    write_jsonl(Path(path), [make_row(*next(tasks), number, rng) for number in range(count)])


def _vocabulary(pattern: str) -> tuple[str, ...]:
    """All that rows and solutions are made of."""
    language, rng = Language((), pattern), random.Random(0)
    lists = [ListTask(((said, 1),) * _NUM_STEPS) for said in OPERATIONS]
    texts = ["0123456789", "assert change([1]) == []\nassert"]
    for layout in LAYOUTS:
        for task in [SumTask(50, (1, -1))] if layout == "aime_like" else lists:
            texts += [prompt_of(make_row(task, layout, 0, rng)), solution(task, layout)]
    return (PAD, EOS, UNKNOWN, *sorted({piece for text in texts for piece in language.pieces(text)}))


_PIECES = r"\d|, |[^\d,:\n]+|[\s\S]"  # a digit, a sign, or all that stands between two of these: a step, a piece of a program's line
LANGUAGE = Language(_vocabulary(_PIECES), _PIECES)
ROPE = {"rope_theta": 1e4}  # of models of this language: a step of a task is found by what it says, not by how far away it is
