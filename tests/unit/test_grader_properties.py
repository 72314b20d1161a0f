"""What holds of graders for any number and any text."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.evaluate.grade import grade
from megatron_opd.evaluate.graders.number import spelled
from megatron_opd.evaluate.graders.reading import bare, last_box
from megatron_opd.records import Prompt

PIECES = [
    "answer", "Answer:", "####", "\\boxed{", "\\text{", "}", "{", "(", ")", "B", "A", "I", " is ", " not ", "or", "and", "$", "**", "=", "<",
    "3", "1,234", "-", ".", "/", "^", "e5", "\\frac", "\\overline{6}", "°", "\n", " ", "<think>", "</think>", "<answer>", "</answer>", "é", "\0",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)
NUMBERS = st.decimals(min_value=-(10**9), max_value=10**9, allow_nan=False, allow_infinity=False, places=3)


def prompt(answer: str) -> Prompt:
    return Prompt(0, "q", answer)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([("exact", "B"), ("number", "3"), ("choice", "B")]))
def test_any_text_gets_a_verdict_with_a_reason(text: str, grader: tuple[str, str]) -> None:
    verdict = grade(grader[0], prompt(grader[1]), text)
    assert verdict.outcome in ("right", "wrong", "no_answer", "unclosed")
    assert verdict.score == float(verdict.outcome == "right")
    assert verdict.reason
    assert (verdict.answer is None) or verdict.outcome in ("right", "wrong")


@settings(max_examples=200, deadline=None)
@given(
    NUMBERS,
    st.sampled_from(
        ["{}", "so \\boxed{{{}}}", "1 + 1 is not it.\n#### {}", "The answer is {}.", "**Answer:** ${}$", "<answer>{}</answer>"]
    ),
)
def test_a_number_is_right_however_it_is_given_and_its_neighbour_wrong(value: Decimal, form: str) -> None:
    for spelling in (f"{value:f}", f"{value:,f}", f"{value:f}00"):
        assert grade("number", prompt(f"{value:f}"), form.format(spelling)).outcome == "right"
    assert grade("number", prompt(f"{value:f}"), form.format(f"{value + Decimal('0.001'):f}")).outcome == "wrong"


@settings(max_examples=200, deadline=None)
@given(st.fractions(max_denominator=10**6), st.integers(0, 60))
def test_equal_numbers_are_spelled_the_same(value: Fraction, zeros: int) -> None:
    number = Decimal(value.numerator) * Decimal(10) ** (zeros - 30)
    text = spelled(number)
    assert Decimal(text) == number
    assert text == spelled(Decimal(f"{number}")) == spelled(number * Decimal("1.000"))


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
@settings(max_examples=20, deadline=None)
@given(other=st.sampled_from("ABCDEFGHIJ"))
def test_the_letter_that_is_given_is_the_answer(letter: str, other: str) -> None:
    for form in ("{}", "({})", "Answer: {}", "The answer is ({}).", "\\boxed{{{}}}", "**{}**", "The correct option is {}."):
        assert grade("choice", prompt(other), form.format(letter)).outcome == ("right" if letter == other else "wrong")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_the_content_of_a_box_and_of_an_answer_without_marks(text: str) -> None:
    assert len(bare(text)) <= len(text)
    plain = text.replace("\\", "").replace("{", "").replace("}", "")
    assert last_box(f"\\boxed{{{plain}}}") == plain
