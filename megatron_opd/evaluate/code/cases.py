"""Tests of a programming task, whatever benchmark it is from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StdinCase:
    """The program reads `stdin` and is to print `stdout`."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallCase:
    """The function is called with `arguments`, values of JSON, and is to return `expected`."""

    arguments: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True)
class AssertCase:
    """Python that is run behind the program, and is right if it ends without an exception."""

    source: str


Case = StdinCase | CallCase | AssertCase


@dataclass(frozen=True)
class CodeTests:
    """Cases of one kind. function: what CallCase calls ("name", or a method of the class Solution where the program has that class).

    before: source that stands before the program (HumanEval's prompt, of a program that only goes on with it).
    """

    cases: tuple[Case, ...]
    function: str | None = None
    before: str = ""

    def __post_init__(self) -> None:
        if len({type(case) for case in self.cases}) != 1:
            raise ValueError("a task needs tests, all of one kind")
        if self.function is None and isinstance(self.cases[0], CallCase):
            raise ValueError("tests that call a function need its name")
