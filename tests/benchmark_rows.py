"""Rows in the layouts of published benchmarks: their columns, our content. `SOLUTIONS` pass the tests of the rows of programs."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

# name -> row, the prompt and the answer that are to be read.
MATH: dict[str, tuple[dict[str, Any], str, str]] = {
    "Maxwell-Jia/AIME_2024": ({"ID": "2024-I-1", "Problem": "1+203?", "Solution": "It is 204.", "Answer": 204}, "1+203?", "204"),
    "HuggingFaceH4/aime_2024": (
        {"id": 60, "problem": "1+203?", "solution": "It is 204.", "answer": "204", "url": "https://example.com", "year": "2024"},
        "1+203?",
        "204",
    ),
    "math-ai/aime24": ({"id": 60, "problem": "1+203?", "solution": r"\boxed{204}", "url": "https://example.com"}, "1+203?", "204"),
    "math-ai/aime25": ({"problem": "35+35?", "answer": "70", "id": "0"}, "35+35?", "70"),
    "opencompass/AIME2025": ({"question": "35+35?", "answer": "70"}, "35+35?", "70"),
    "MathArena/aime_2025": ({"problem_idx": 1, "problem": "35+35?", "answer": 70, "problem_type": ["Algebra"]}, "35+35?", "70"),
    "MathArena/hmmt_feb_2025": (
        {"problem_idx": 1, "problem": "Half of a third?", "answer": r"\frac{1}{6}", "problem_type": ["Algebra"]},
        "Half of a third?",
        r"\frac{1}{6}",
    ),
    "FlagEval/HMMT_2025": ({"question": "Half of a third?", "answer": r"$\frac{1}{6}$"}, "Half of a third?", r"$\frac{1}{6}$"),
    "HuggingFaceH4/MATH-500": (
        {"problem": "2x=6", "solution": r"So \boxed{3}.", "answer": "3", "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json"},
        "2x=6",
        "3",
    ),
    "openai/gsm8k": ({"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4.\n#### 4"}, "Two and two?", "4"),
}  # fmt: skip


def pack(tests: Any, protocol: int = 4) -> str:
    """As LiveCodeBench packs private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol=protocol))).decode()


def case(given: str, wanted: str, kind: str) -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": kind}


STDIN: dict[str, Any] = {
    "question_title": "A. Sum",
    "question_content": "Given n and n numbers, print their sum.",
    "platform": "atcoder",
    "question_id": "abc301_a",
    "contest_id": "abc301",
    "contest_date": "2024-08-03T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("2\n1 2\n", "3\n", "stdin")]),
    "private_test_cases": pack([case("1\n-5\n", "-5", "stdin"), case("0\n\n", "0", "stdin")]),
    "metadata": "{}",
}
CALL: dict[str, Any] = STDIN | {
    "question_title": "count-letters",
    "question_content": "Count how often a letter of `letters` stands in `text`.",
    "platform": "leetcode",
    "question_id": "3001",
    "contest_id": "weekly-contest-300",
    "contest_date": "2025-02-01T23:59:00",
    "starter_code": "class Solution:\n    def countLetters(self, text: str, letters: List[str]) -> int:\n        ",
    "public_test_cases": json.dumps([case('"banana"\n["a", "n"]', "5", "functional")]),
    "private_test_cases": json.dumps([case('""\n[]', "0", "functional")]),
    "metadata": json.dumps({"func_name": "countLetters"}),
}
HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/900",
    "prompt": 'def half(n: int) -> int:\n    return n // 2\n\n\ndef twice(n: int) -> int:\n    """Twice n.\n    >>> twice(2)\n    4\n    """\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * n\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert half(candidate(7)) == 7\n",
}
MBPP_FULL: dict[str, Any] = {
    "task_id": 900,
    "text": "Write a function to find the area of a circle of whole radius.",
    "code": "def area(r):\n    return math.pi * r * r",
    "test_list": ["assert abs(area(1) - math.pi) < 1e-9", "assert area(0) == 0"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}
MBPP_SANITIZED: dict[str, Any] = {
    "source_file": "ours.ipynb",
    "task_id": 901,
    "prompt": "Write a function to find the area of a circle of whole radius.",
    "code": "def area(r):\n    return math.pi * r * r",
    "test_imports": ["import math"],
    "test_list": ["assert abs(area(1) - math.pi) < 1e-9", "assert area(0) == 0"],
}
PROGRAMS = {"stdin": STDIN, "call": CALL, "humaneval": HUMANEVAL, "mbpp_full": MBPP_FULL, "mbpp_sanitized": MBPP_SANITIZED}
SOLUTIONS = {
    "stdin": "n = int(input())\nprint(sum(map(int, input().split())))\n",
    "call": "class Solution:\n    def countLetters(self, text, letters):\n        return sum(letter in letters for letter in text)\n",
    "humaneval": "def twice(n):\n    return 2 * n\n",
    "mbpp_full": MBPP_FULL["code"],
    "mbpp_sanitized": MBPP_SANITIZED["code"],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL or Parquet file, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
