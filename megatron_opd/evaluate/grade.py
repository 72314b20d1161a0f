"""Graders of verifiable answers by name. They run what others wrote through parsers, so stages call them in workers: grading_pool.py."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_opd.errors import UserError
from megatron_opd.evaluate.graders import choice, exact, formula, gym, number
from megatron_opd.evaluate.graders.reading import tagged
from megatron_opd.evaluate.verdict import Verdict

if TYPE_CHECKING:  # a worker starts in a fraction of the time without it
    from megatron_opd.records import Prompt

GRADING = 2  # raised where the same response may get another verdict than before
THINK, END_THINK = "<think>", "</think>"
PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}
_GRADERS: dict[str, tuple[Callable[[Prompt], None], Callable[[Prompt, str], Verdict]]] = {
    "exact": (exact.check, exact.grade),
    "number": (number.check, number.grade),
    "math": (formula.check, formula.grade),
    "choice": (choice.check, choice.grade),
    "reasoning_gym": (gym.check, gym.grade),
}


def grade(name: str, prompt: Prompt, response_text: str) -> Verdict:
    """The verdict of the grader `name` on a response (special tokens already dropped). Raises UserError.

    What is graded is `answer_part` of the response; where it has none it is "unclosed". If <answer> tags are in it, what the last pair of
    them holds is graded alone. Each grader says what is "no_answer".

    exact          the prompt's answer stands as text behind the last marker ("####", "answer:", "answer is"), else in the last box, else
                   behind the last "=", or is all of the response; runs of white space count as one space
    number         the number behind "####", in the last box, or stated as the answer, else the last one, equals the answer as a number
    math           math-verify finds the response's last box, or last formula, equal to the answer (LaTeX or plain)
    choice         the letter that is boxed or stated as the answer
    reasoning_gym  reasoning_gym's own score of what is in the tags, else of what stands behind the last marker, else in the last box, else
                   of the whole response, for a prompt with the field {"reasoning_gym": {"dataset": name, "entry": {...}}}
    """
    verdict = _grader(name)[1]
    text = answer_part(response_text)
    if text is None:
        return Verdict(0.0, "unclosed", reason=f"{END_THINK} never comes")
    within = None if name == "reasoning_gym" else tagged(text)  # its scorers get what is in the tags as it is
    return verdict(prompt, text if within is None else within)


def check_gold(name: str, prompt: Prompt) -> None:
    """Raise UserError unless the grader `name` can compare with the prompt's answer: a response that gives it must be right."""
    _grader(name)[0](prompt)


def check_package(name: str) -> None:
    """Raise UserError if the package that the grader `name` needs is not installed."""
    module = PACKAGES.get(name)
    if module is not None and find_spec(module) is None:
        package = module.replace("_", "-")
        raise UserError(f"the grader {name!r} needs the package {package}; install it with: pip install {package}")


def answer_part(response_text: str) -> str | None:
    """What stands behind the last </think>; all of a response without such tags; None where the thinking has no end."""
    text = response_text.rpartition(END_THINK)[2]
    return None if THINK in text else text


def _grader(name: str) -> tuple[Callable[[Prompt], None], Callable[[Prompt, str], Verdict]]:
    if name not in _GRADERS:
        raise UserError(f"no grader {name!r}; choose one of {', '.join(_GRADERS)}")
    return _GRADERS[name]
