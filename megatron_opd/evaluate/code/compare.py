"""When what a program gives is what was expected, as LiveCodeBench's runner (testing_util.py) defines it."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any


def same_output(printed: str, expected: str) -> bool:
    """Whether two texts are equal line by line.

    White space around the texts and around each line does not count. Two lines that differ are equal if both consist of numbers, by
    white space apart, and those are equal as decimals: "1.0" and "1" are, 0.3333 and 0.33333 are not.
    """
    printed, expected = printed.strip(), expected.strip()
    if printed.count("\n") != expected.count("\n"):  # first, as a program may print a great many
        return False
    return all(_same_line(*pair) for pair in zip(printed.split("\n"), expected.split("\n"), strict=True))


def _same_line(line: str, wanted: str) -> bool:
    if line.strip() == wanted.strip():
        return True
    wanted_numbers = wanted.split()
    numbers = line.split(maxsplit=len(wanted_numbers))
    if len(numbers) != len(wanted_numbers):
        return False
    try:
        return all(Decimal(number) == Decimal(other) for number, other in zip(numbers, wanted_numbers, strict=True))
    except (InvalidOperation, ValueError):
        return False


def same_value(returned: Any, expected: Any) -> bool:
    """Whether a returned value equals one of JSON by Python's ==; a tuple counts as a list, though not one within something else."""
    try:
        return bool((list(returned) if isinstance(returned, tuple) else returned) == expected)
    except RecursionError:
        return False
