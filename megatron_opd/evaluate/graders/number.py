"""The answer as a number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from megatron_opd.errors import UserError
from megatron_opd.evaluate.graders.reading import (
    LONGEST_ANSWER,
    NUMBER,
    SPACED,
    VALUE,
    after_equals,
    after_statement,
    answer_of,
    brief,
    last_box,
    last_number,
    marked_number,
    one_line,
    opening_number,
    plain,
    value_of,
)
from megatron_opd.evaluate.verdict import Verdict

if TYPE_CHECKING:
    from megatron_opd.records import Prompt

# Beside a number it makes another one of it: 3\sqrt{2}, 2\pi.
_FORMULA = re.compile(r"\\(?:sqrt|pi|infty|e\b|ln|log|sin|cos|tan|cdot|times|div|pm)|[√π∞×÷]")
_MOST_ZEROS = 30  # that a number is written with instead of an exponent


def check(prompt: Prompt) -> None:
    text = answer_of(prompt, "number").strip()
    if NUMBER.fullmatch(plain(text)) is None or last_number(text) is None:
        raise UserError(f"prompt {prompt.index}: answer {brief(text)} is not a number; use the grader 'exact' or 'math'")


def grade(prompt: Prompt, response: str) -> Verdict:
    """No answer: no number in the response, or an empty box."""
    check(prompt)
    answer = answer_of(prompt, "number").strip()
    value, where = _read(response)
    if isinstance(where, Verdict):
        return where
    assert value is not None
    found = spelled(value)
    if value == last_number(answer):
        return Verdict(1.0, "right", found, f"{where} is {brief(found)}")
    return Verdict(0.0, "wrong", found, f"{where} is {brief(found)}, wanted is {brief(answer)}")


def _read(response: str) -> tuple[Decimal, str] | tuple[None, Verdict]:
    """The number that is the answer and where it stands, or the verdict of a response without one."""
    text = plain(response)
    marked = marked_number(text)
    if marked is not None:
        return _known(last_number(marked), "the number behind the last ####")
    box = last_box(response)
    if box is not None:
        return _in_box(box)
    stated = (after_statement(text) or "").partition("\n")[0]
    if (opening := opening_number(stated)) is not None:
        return _known(last_number(opening), "the number that is stated as the answer")
    for part, where in ((stated, "the last number of the line that states the answer"), (text, "the last number")):
        if found := list(VALUE.finditer(part)):
            return _known(value_of(found[-1]), where)
    return None, Verdict(0.0, "no_answer", reason="no number in the response")


def _known(value: Decimal | None, where: str) -> tuple[Decimal, str] | tuple[None, Verdict]:
    if value is None:
        return None, Verdict(0.0, "wrong", reason=f"{where} can't be computed: over 0, or too large")
    return value, where


def _in_box(box: str) -> tuple[Decimal, str] | tuple[None, Verdict]:
    """A box holds one number, behind an "=" if it has one; of several none is the answer."""
    text = plain(SPACED.sub(lambda match: match[0].replace(" ", ""), after_equals(box)))
    found = list(VALUE.finditer(text))
    if not one_line(box).strip("{}$ "):
        return None, Verdict(0.0, "no_answer", reason="the last box is empty")
    if len(found) == 1 and not _FORMULA.search(text):
        return _known(value_of(found[0]), "the number in the last box")
    what = "several numbers" if len(found) > 1 else "a formula" if found else "no number"
    return None, Verdict(0.0, "wrong", one_line(box), f"the last box holds {what}: {brief(one_line(box))}")


def spelled(value: Decimal) -> str:
    """One spelling of equal numbers: without zeros that say nothing, with an exponent where many would be needed."""
    if len(str(value)) > LONGEST_ANSWER:
        return str(value)[:LONGEST_ANSWER]
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)  # no text is read as an infinity or a NaN
    text = "".join(map(str, digits)).lstrip("0")
    shorter = text.rstrip("0")
    exponent += len(text) - len(shorter)
    if not shorter:
        return "0"
    minus = "-" if sign else ""
    if not -_MOST_ZEROS <= exponent <= _MOST_ZEROS:
        return f"{minus}{shorter}e{exponent}"
    if exponent >= 0:
        return minus + shorter + "0" * exponent
    whole = shorter.rjust(1 - exponent, "0")
    return f"{minus}{whole[:exponent]}.{whole[exponent:]}"
