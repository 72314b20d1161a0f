"""Tests of programs from rows of benchmarks: solutions pass them and broken ones don't, and packed tests are read without running anything."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import sys
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import CALL, HUMANEVAL, MBPP_FULL, PROGRAMS, SOLUTIONS, STDIN, case, pack, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.evaluate.code import tests_of
from megatron_opd.evaluate.code.cases import AssertCase, CallCase, CodeTests, StdinCase
from megatron_opd.records import Prompt

read_tests = tests_of.tests_of


def passes(program: str, tests: CodeTests, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The least that can run a program of ours against tests."""
    for one in tests.cases:
        names: dict[str, Any] = {"__name__": "program"}
        printed = io.StringIO()
        try:
            if isinstance(one, StdinCase):
                monkeypatch.setattr(sys, "stdin", io.StringIO(one.stdin))
            with redirect_stdout(printed):
                exec(tests.before + program + (f"\n{one.source}" if isinstance(one, AssertCase) else ""), names)
            if isinstance(one, StdinCase) and printed.getvalue().split() != one.stdout.split():
                return False
            if isinstance(one, CallCase):
                holder = names["Solution"]() if "Solution" in names else None
                function = getattr(holder, tests.function or "") if holder is not None else names[tests.function or ""]
                if function(*one.arguments) != one.expected:
                    return False
        except Exception:
            return False
    return True


def read(path: Path, row: dict[str, Any]) -> Prompt:
    return read_prompts(write_rows(path, [row]))[1][0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("layout", PROGRAMS)
def test_solutions_pass_and_broken_ones_do_not(tmp_path: Path, layout: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tests, solution = read_tests(read(tmp_path / name, PROGRAMS[layout])), SOLUTIONS[layout]
    assert passes(solution, tests, monkeypatch)
    mutations = {"stdin": ("sum", "max"), "call": ("in letters", "not in letters"), "humaneval": ("2 *", "3 *")}
    before, after = mutations.get(layout, ("r * r", "r + r"))
    assert not passes(solution.replace(before, after), tests, monkeypatch)
    assert not passes("", tests, monkeypatch)


def test_what_is_read_of_each_layout() -> None:
    assert read_tests(Prompt(0, "", None, STDIN)) == CodeTests(
        (StdinCase("2\n1 2\n", "3\n"), StdinCase("1\n-5\n", "-5"), StdinCase("0\n\n", "0"))
    )
    assert read_tests(Prompt(0, "", None, CALL)) == CodeTests((CallCase(("banana", ["a", "n"]), 5), CallCase(("", []), 0)), "countLetters")
    human = read_tests(Prompt(0, "", None, HUMANEVAL))
    assert (human.function, human.before) == ("twice", HUMANEVAL["prompt"])
    assert human.cases == (AssertCase(f"{HUMANEVAL['test']}\n\ncheck(twice)\n"),)
    mbpp = read_tests(Prompt(0, "", None, MBPP_FULL))
    assert mbpp == CodeTests(tuple(AssertCase(f"import math\n{source}") for source in MBPP_FULL["test_list"]))


def test_a_program_that_goes_on_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """HumanEval's canonical solutions are the body alone."""
    assert passes(HUMANEVAL["canonical_solution"], read_tests(Prompt(0, "", None, HUMANEVAL)), monkeypatch)


OWN: list[tuple[dict[str, Any], CodeTests]] = [
    ({"kind": "stdin", "cases": [{"stdin": "1\n", "stdout": "2\n"}]}, CodeTests((StdinCase("1\n", "2\n"),))),
    (
        {"kind": "call", "function": "f", "cases": [{"arguments": [1, [2]], "expected": None}], "before": "import math"},
        CodeTests((CallCase((1, [2]), None),), "f", "import math"),
    ),
    ({"kind": "assert", "cases": ["assert f()"], "function": "f"}, CodeTests((AssertCase("assert f()"),), "f")),
]  # fmt: skip


@pytest.mark.parametrize(("tests", "expected"), OWN)
def test_our_own_layout(tmp_path: Path, tests: dict[str, Any], expected: CodeTests) -> None:
    """As an object or as its JSON, which Parquet is to have: its columns have one type."""
    for name, value in (("a.jsonl", tests), ("b.jsonl", json.dumps(tests)), ("c.parquet", json.dumps(tests))):
        prompt = read(tmp_path / name, {"prompt": "Write it.", "tests": value})
        assert prompt.content == "Write it."
        assert read_tests(prompt) == expected
    assert read_tests(Prompt(0, "", None, {"tests": {"function": None, "before": None, **tests}})) == expected


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("[", "'tests': not JSON"),
        ([1], r"'tests' must be an object with kind, cases, function, before, not \[1\]"),
        ({"kind": "stdin", "case": []}, "'tests' must be an object with kind, cases, function, before, not with 'case'"),
        ({"cases": []}, "'tests': 'kind' must be 'stdin', 'call' or 'assert', not None"),
        ({"kind": "call", "cases": [], "function": "f"}, "'cases' must be a list of at least one case"),
        ({"kind": "call", "cases": [{"arguments": [], "expected": 1}]}, "'function' must be the name of a function, not None"),
        ({"kind": "call", "function": "os.system", "cases": [{}]}, "'function' must be the name of a function, not 'os.system'"),
        ({"kind": "call", "function": "lambda", "cases": [{}]}, "'function' must be the name of a function"),
        ({"kind": "call", "function": "f", "cases": [{"arguments": []}]}, "case 1 must be an object with 'arguments' and 'expected'"),
        (
            {"kind": "call", "function": "f", "cases": [{"arguments": 1, "expected": 1}]},
            "case 1: 'arguments' must be a list of values, not 1",
        ),
        (
            {"kind": "stdin", "cases": [{"stdin": "", "stdout": ""}, {"stdin": 1, "stdout": ""}]},
            "case 2: 'stdin' and 'stdout' must be texts",
        ),
        ({"kind": "assert", "cases": [" "]}, "case 1 must be Python source"),
        ({"kind": "assert", "cases": ["x"], "before": 1}, "'before' must be Python source, not 1"),
        (None, "no tests for a program .other fields: answer_type, tests.; give a field 'tests'"),
    ],
)
def test_faults_of_our_own_layout(tmp_path: Path, tests: Any, message: str) -> None:
    prompt = read(tmp_path / "rows.jsonl", {"prompt": "x", "answer_type": "code", "tests": tests})
    with pytest.raises(UserError, match=rf"rows.jsonl:1: {message}|rows.jsonl:1: 'tests'.*{message}"):
        read_tests(prompt)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_packed_tests_of_every_pickle_protocol(texts: list[tuple[str, str]], protocol: int) -> None:
    row = STDIN | {"public_test_cases": "[]", "private_test_cases": pack([case(*pair, "stdin") for pair in texts], protocol)}
    assert read_tests(Prompt(0, "", None, row)).cases == tuple(StdinCase(*pair) for pair in texts)


@pytest.mark.parametrize("size", [240, 300, 70_000, 3_000_000])
def test_packed_tests_that_the_pickler_writes_outside_of_a_frame(size: int) -> None:
    row = STDIN | {"public_test_cases": "[]", "private_test_cases": pack([case("é 1\n" * (size // 4), "1", "stdin")])}
    assert read_tests(Prompt(0, "", None, row)).cases == (StdinCase("é 1\n" * (size // 4), "1"),)


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


TEXT = pickle.dumps(json.dumps([case("", "", "stdin")]))
HOSTILE = {
    "a call": (packed(pickle.dumps(Runs())), r"a pickle of more than a text \(it asks for .*\), of which nothing was run; don't use this file"),
    "a call by name": (packed(b"cos\nsystem\n(S'touch was-run'\ntR."), r"asks for GLOBAL 'os system'\), of which nothing was run"),
    "a call behind a text": (packed(TEXT[:-1] + b"0" + pickle.dumps(Runs(), protocol=0)), "more than a text .it asks for POP"),
    "behind the end": (packed(TEXT + pickle.dumps(Runs())), "a pickle that is not one text alone"),
    "a list": (packed(pickle.dumps(["[]"])), "more than a text .it asks for EMPTY_LIST"),
    "a number": (packed(pickle.dumps(7)), "more than a text .it asks for BININT1 7"),
    "two texts": (packed(TEXT[:-1] + TEXT[2:]), "a pickle"),
    "no text": (packed(b"\x80\x04."), "a pickle that is not one text alone"),
    "many opcodes": (packed(TEXT[:-1] + b"\x94" * 100_000 + b"."), "more than a text .it asks for MEMOIZE"),
    "a length that is not there": (packed(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00x."), "a damaged pickle"),
    "no end": (packed(TEXT[:-1]), "a damaged pickle"),
    "no pickle": (packed(b"\xff\xfe"), "a damaged pickle"),
    "no JSON in it": (packed(pickle.dumps("import os")), "not JSON"),
    "no list in it": (packed(pickle.dumps('{"a": 1}')), "must be a list of tests"),
    "no base64": ("####", "neither JSON nor tests packed as base64 of zlib"),
    "half a base64": (packed(TEXT)[:-3], "neither JSON nor tests packed"),
    "letters of other scripts": ("éé", "neither JSON nor tests packed"),
    "no zlib": (base64.b64encode(b"not compressed").decode(), "neither JSON nor tests packed"),
    "cut": (base64.b64encode(zlib.compress(TEXT)[:-4]).decode(), "the packed tests are cut"),
    "more behind": (base64.b64encode(zlib.compress(TEXT) + b"x").decode(), "the packed tests go on behind their end"),
    "a bomb": (packed(b"\0" * (3 << 20)), "more than 2 MiB when unpacked"),
    "deep": (json.dumps([[]]).replace("[]", "[" * 5000 + "]" * 5000), "nested more than"),
    "empty": ("", "'private_test_cases': the packed tests are cut"),
    "a number for a list": (7, "must be a list of tests, not 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tests_run_nothing_and_are_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, message = HOSTILE[name]
    monkeypatch.setattr(tests_of, "_LARGEST_TESTS", 2 << 20)
    monkeypatch.chdir(tmp_path)
    prompt = read(tmp_path / "rows.jsonl", STDIN | {"private_test_cases": value})
    with pytest.raises(UserError, match=message) as error:
        read_tests(prompt)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: 'private_test_cases'")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (STDIN | {"public_test_cases": "[]", "private_test_cases": "[]"}, "'public_test_cases' and 'private_test_cases' hold no test"),
        (STDIN | {"private_test_cases": CALL["private_test_cases"]}, "'testtype' is 'stdin' in some tests and 'functional' in others"),
        (STDIN | {"public_test_cases": '[{"input": "x", "output": "y"}]'}, "'public_test_cases', test 1 must have the texts input"),
        (STDIN | {"public_test_cases": '[{"input": 1, "output": "y", "testtype": "stdin"}]'}, "test 1 must have the texts"),
        (CALL | {"metadata": "{}"}, "'func_name' of 'metadata' must be the name of a function, not None"),
        (CALL | {"metadata": "{"}, "'metadata': not JSON"),
        (CALL | {"metadata": '{"func_name": "f()"}'}, "must be the name of a function, not 'f\\(\\)'"),
        (CALL | {"public_test_cases": json.dumps([case("[1\n2", "3", "functional")])}, "test 1: argument 1: not JSON"),
        (CALL | {"public_test_cases": json.dumps([case("1", "x", "functional")])}, "test 1: output: not JSON"),
        (HUMANEVAL | {"entry_point": "f; g"}, "'entry_point' must be the name of a function"),
        (HUMANEVAL | {"test": 1}, "'test' must be text"),
        (MBPP_FULL | {"test_list": []}, "'test_list' is empty"),
    ],
)
def test_faults_of_published_layouts(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"prompt 4: .*{message}"):
        read_tests(Prompt(4, "", None, row))
