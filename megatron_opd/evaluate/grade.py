"""Graders of verifiable answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.records import Prompt

_MARKER = re.compile(r"####|\banswer\s*:", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
# A sign belongs to the number unless something to subtract from stands before it: "5-3" ends in 3, "5 * -3" in -3.
_NUMBER = re.compile(r"(?:(?<![\w.)\]}])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def grade(name: str, prompt: Prompt, response_text: str) -> float:
    """Score in [0, 1] of a response (special tokens already dropped) by the grader `name`. Raises UserError.

    exact          `final_answer` of the response equals the prompt's answer, runs of white space counted as one space
    number         the last number in the response equals the answer as a number ("1,200.0" equals "1200")
    math           math-verify finds the response's last expression equal to the answer (LaTeX or plain)
    reasoning_gym  reasoning_gym's own score of the text in <answer> tags (the last such), or else of `final_answer`,
                   for a prompt with the field {"reasoning_gym": {"dataset": name, "entry": {...}}}
    """
    if name not in _GRADERS:
        raise UserError(f"no grader {name!r}; choose one of {', '.join(_GRADERS)}")
    return _GRADERS[name](prompt, response_text)


def final_answer(text: str, *, after_equals: bool = True) -> str:
    """The text after the last marker ("####" or "answer:"), else after the last "=" (if `after_equals`), else all of it; white space normalised."""
    markers = list(_MARKER.finditer(text))
    if markers:
        text = text[markers[-1].end() :]
    elif after_equals:
        text = text.rpartition("=")[2]
    return " ".join(text.split())


def last_number(text: str) -> Decimal | None:
    """The last number in a text: sign, thousands separators, decimals and an exponent are understood; None where there is none."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:  # an exponent beyond what a Decimal holds
        return None


def _exact(prompt: Prompt, response: str) -> float:
    return float(final_answer(response) == " ".join(_answer(prompt, "exact").split()))


def _number(prompt: Prompt, response: str) -> float:
    text = _answer(prompt, "number").strip()
    match = _NUMBER.fullmatch(text.replace("\N{MINUS SIGN}", "-"))
    wanted = last_number(text) if match else None
    if wanted is None:
        raise UserError(f"prompt {prompt.index}: answer {text!r} is not a number; use the grader 'exact' or 'math'")
    return float(last_number(response) == wanted)


def _math(prompt: Prompt, response: str) -> float:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("the grader 'math' needs the package math-verify; install it with: pip install math-verify") from None
    answer = _answer(prompt, "math")
    # math-verify finds LaTeX by its delimiters; a bare "\frac{1}{2}" has none.
    gold = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")
    if not gold:
        raise UserError(f"prompt {prompt.index}: math-verify can't read the answer {answer!r}; use the grader 'exact'")
    return float(verify(gold, parse(response)))


def _reasoning_gym(prompt: Prompt, response: str) -> float:
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("the grader 'reasoning_gym' needs the package reasoning-gym; install it with: pip install reasoning-gym") from None
    source = prompt.meta.get("reasoning_gym")
    if not isinstance(source, dict) or not isinstance(source.get("dataset"), str) or not isinstance(source.get("entry"), dict):
        raise UserError(
            f'prompt {prompt.index}: the grader \'reasoning_gym\' needs the field "reasoning_gym": {{"dataset": name, "entry": {{...}}}} in its row'
        )
    dataset, entry = source["dataset"], source["entry"]
    try:
        score: Callable[..., Any] = reasoning_gym.get_score_answer_fn(dataset)
    except ValueError:
        raise UserError(f"prompt {prompt.index}: reasoning_gym has no dataset {dataset!r}") from None
    tagged = _TAGGED.findall(response)
    answer = tagged[-1].strip() if tagged else final_answer(response, after_equals=False)
    try:
        return min(1.0, max(0.0, float(score(answer=answer, entry=entry))))
    except Exception as error:
        # Some of its scorers raise on answers that they can't parse. The entry's own answer tells whose fault it is.
        try:
            score(answer=entry.get("answer"), entry=entry)
        except Exception:
            raise UserError(
                f"prompt {prompt.index}: reasoning_gym can't score this entry of {dataset!r}: {type(error).__name__}: {error}"
            ) from None
        return 0.0


_GRADERS: dict[str, Callable[[Prompt, str], float]] = {"exact": _exact, "number": _number, "math": _math, "reasoning_gym": _reasoning_gym}


def _answer(prompt: Prompt, grader: str) -> str:
    if prompt.answer is None:
        raise UserError(
            f"prompt {prompt.index}: no field 'answer', which the grader {grader!r} compares with; add it, or set eval.grader='none'"
        )
    return prompt.answer
