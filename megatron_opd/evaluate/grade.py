"""Graders of verifiable answers. They run what others wrote through parsers, so stages call them in workers: grading_pool.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, DecimalException, localcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megatron_opd.errors import UserError

if TYPE_CHECKING:  # a worker starts in a fraction of the time without it
    from megatron_opd.records import Prompt

THINK, END_THINK = "<think>", "</think>"
PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}
_MARKER = re.compile(r"####|\banswer\s*:", re.IGNORECASE)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
# An "=" that is no part of another sign: of ">=", "<=", "!=", ":=", "==", "=>".
_EQUALS = re.compile(r"(?<![<>!:=])=(?![=>])")
_RELATION = re.compile(r"\s*([<>!:=]=|=>|[<>=])\s*")
# A sign belongs to the number unless something to subtract from stands before it: "5-3" ends in 3, "5 * -3" in -3.
_SIGN = r"(?:(?<![\w.)\]}])[-+])?"
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(_SIGN + _UNSIGNED)
_VALUE = re.compile(rf"({_SIGN})(?:(\d+) (?=\d+/\d))?({_UNSIGNED})(?:/(\d+(?:\.\d+)?))?")  # a number, a/b, or a b/c
# A number that opens a line and is no part of something longer: a term of a sum, a coefficient, a time, the whole of 3 1/2, one of several.
_OPENING = re.compile(
    rf"[\s*:]*(?:\\?\$|€|£)?((?>[-+]?{_UNSIGNED}))"
    r"(?![\w({^]|\s+\d|\s*\\(?!text|mathrm|[$%,;!])|\s*(?:[-+*/×÷^<>:,;]|or\b|and\b|to\b)\s*[\d(.\\$])",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed\s*\{")
_BARE_INEQUALITY = re.compile(r"(?!.*(?<![\\A-Za-z])[A-Za-z]{2})[^$\n]*(?:[<>≤≥]|\\[lg]eq?\b|\\[lg]t\b)[^$\n]*")

_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}  # full-width forms, the minus sign
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[!,;: ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_FRACTION = re.compile(r" ?\\[dt]?frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))")
_POWER_OF_TEN = re.compile(r"(?<=\d) ?(?:\\times|\\cdot|×|\*|x) ?10 ?\^ ?(?:\{ ?([-+]?\d+) ?\}|([-+]?\d+))")
# A number is looked at from its first digit alone, or a long one would cost the square of its length.
_POWER = re.compile(r"(?:(?<![\d,.])\d[\d,.]*+ ?)?\^ ?(?:\{[^{}]*\}|[-+]?\d+)|(?<![\d,.])\d[\d,.]*+\*\*[-+]?\d+")
_BARE_LENGTH = 200  # characters of a response that is a formula without delimiters


def grade(name: str, prompt: Prompt, response_text: str) -> float:
    """Score in [0, 1] of a response (special tokens already dropped) by the grader `name`. Raises UserError.

    What is graded is `answer_part` of the response; 0 where it has none.

    exact          the prompt's answer stands as text behind the last marker ("####" or "answer:"), else behind the last "=", or is all
                   of the response; runs of white space count as one space
    number         the last number in the response, or the one behind "####", equals the answer as a number ("1,200.0" equals "1200")
    math           math-verify finds the response's last expression equal to the answer (LaTeX or plain)
    reasoning_gym  reasoning_gym's own score of the text in <answer> tags (the last such), else of what stands behind the last marker,
                   else of the whole response, for a prompt with the field {"reasoning_gym": {"dataset": name, "entry": {...}}}
    """
    score = _grader(name)[1]
    text = answer_part(response_text)
    return 0.0 if text is None else score(prompt, text)


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


def final_answer(text: str) -> str:
    """The text after the last marker ("####" or "answer:"), else after the last "=", else all of it; white space normalised."""
    marked = _after_marker(text)
    if marked is None:
        marked = text[max((match.end() for match in _EQUALS.finditer(text)), default=0) :]
    return _one_line(marked)


def last_number(text: str) -> Decimal | None:
    """The last number in a text: sign, thousands separators, decimals, an exponent and fractions are understood; None where there is none.

    Powers are not: neither base nor exponent is taken for the answer, but a unit's exponent leaves its number ("12 cm^2" is 12).
    """
    found = list(_VALUE.finditer(_plain(text)))
    if not found:
        return None
    sign, whole, number, divisor = (group or "" for group in found[-1].groups())
    try:
        value = Decimal(number.replace(",", ""))
        if divisor:
            with localcontext() as context:
                context.prec = min(len(number) + len(divisor) + 28, 1000)
                value = value / Decimal(divisor) + Decimal(whole or 0)
    except DecimalException:  # an exponent beyond what a Decimal holds; a fraction over 0
        return None
    return value.copy_negate() if sign == "-" else value


def _grader(name: str) -> tuple[Callable[[Prompt], None], Callable[[Prompt, str], float]]:
    if name not in _GRADERS:
        raise UserError(f"no grader {name!r}; choose one of {', '.join(_GRADERS)}")
    return _GRADERS[name]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    """`text` with one spelling of white space, digits, signs, thousands, fractions and powers of ten."""
    text = _THOUSANDS.sub("", text.translate(_ASCII))
    text = re.sub(r"\s+", lambda match: "\n" if "\n" in match[0] else " ", text)
    text = _FRACTION.sub(lambda match: f" {match[1] or match[2]}/{match[3] or match[4]}", text)
    text = _POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", text)
    return _POWER.sub(" ", text)


def _after_marker(text: str) -> str | None:
    end = max((match.end() for match in _MARKER.finditer(text)), default=None)
    return None if end is None else text[end:].strip()


def _marked_number(text: str) -> str | None:
    """The number that opens the line behind the last "####"; None where none does, as in a sum or the heading "#### 2. Then add"."""
    _, marker, rest = text.rpartition("####")
    line, _, later = rest.lstrip(" \t").partition("\n")
    match = _OPENING.match(line) if marker else None
    if match is None or "=" in line or (later.strip() and re.match(r"[.)]\s*\S", line[match.end() :])):
        return None
    return match[1]


def _last_box(text: str) -> str | None:
    """Content of the last box whose braces match."""
    for match in reversed(list(_BOX.finditer(text))[-8:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[match.end() : match.end() + brace.start()]
    return None


def _check_exact(prompt: Prompt) -> None:
    answer = _answer(prompt, "exact")
    if not _one_line(answer):
        raise UserError(f"prompt {prompt.index}: the answer is empty, which no response can equal; mend it")


def _exact(prompt: Prompt, response: str) -> float:
    wanted = _RELATION.sub(r"\1", _one_line(_answer(prompt, "exact")))
    marked = _after_marker(response)
    if marked is None:
        given = [response, final_answer(response)]
    else:
        line = marked.partition("\n")[0].strip("* \t")
        given = [marked, line, line.rstrip(".!* "), _marked_number(response) or marked]
    texts = [_RELATION.sub(r"\1", _one_line(text)) for text in given]
    # An answer that holds an "=" of its own can't be found behind one; it then ends the response.
    ends = marked is None and bool(_EQUALS.search(wanted)) and re.search(rf"(?:^|[\s,;:]){re.escape(wanted)}$", texts[0])
    return float(wanted in texts or bool(ends))


def _check_number(prompt: Prompt) -> None:
    text = _answer(prompt, "number").strip()
    if _NUMBER.fullmatch(_plain(text)) is None or last_number(text) is None:
        raise UserError(f"prompt {prompt.index}: answer {_brief(text)} is not a number; use the grader 'exact' or 'math'")


def _number(prompt: Prompt, response: str) -> float:
    _check_number(prompt)
    marked = _marked_number(_plain(response))
    return float(last_number(response if marked is None else marked) == last_number(_answer(prompt, "number")))


def _check_math(prompt: Prompt) -> None:
    answer = _answer(prompt, "math")
    if not _gold(answer) or not _math(prompt, f"\\boxed{{{_undelimited(answer)}}}"):
        raise UserError(f"prompt {prompt.index}: math-verify can't read the answer {_brief(answer)}; use the grader 'exact'")
    _math(prompt, "$17$")  # its own text is quickly equal; only another one shows that it takes for ever to compare with


def _math(prompt: Prompt, response: str) -> float:
    gold = _gold(_answer(prompt, "math"))
    if not gold:
        _check_math(prompt)
    text = _latex(response)
    box, marked = _last_box(text), _marked_number(text)
    if box is not None:
        given = [text, f"\\boxed{{{box}}}"]  # all boxes are one set for math-verify; by custom the last alone is the answer
    elif marked is not None:
        given = [f"${marked}$"]
    elif len(text) <= _BARE_LENGTH and _BARE_INEQUALITY.fullmatch(text.strip()):
        given = [f"${text.strip()}$"]
    else:
        given = [text]
    return float(any(_verify(gold, _parse(each)) for each in given))


def _gold(answer: str) -> list[Any]:
    """What math-verify reads in an answer; it finds LaTeX by its delimiters, and a bare "\\frac{1}{2}" has none."""
    answer = _one_line(_latex(answer))
    return _parse(answer if "$" in answer or re.search(r"\\boxed|\\\(|\\\[", answer) else f"${answer}$")


def _undelimited(answer: str) -> str:
    text = _one_line(_latex(answer))
    box = _last_box(text)
    return text.strip("$ ") if box is None else box


def _latex(text: str) -> str:
    r"""`text` with ASCII digits and signs, and without currency (\$) and what separates thousands: math-verify stumbles over them."""
    return _THOUSANDS.sub("", re.sub(r"(?<!\\)\\\$", "", text.translate(_ASCII)))


def _parse(text: str) -> list[Any]:
    try:
        from math_verify import parse
    except ImportError:
        raise UserError("the grader 'math' needs the package math-verify; install it with: pip install math-verify") from None
    return parse(text, parsing_timeout=None, raise_on_error=False)  # type: ignore[arg-type]  # no limit by signals: workers have their own


def _verify(gold: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    return verify(gold, given, timeout_seconds=None)


def _check_reasoning_gym(prompt: Prompt) -> None:
    score, entry, dataset = _scorer(prompt)
    try:
        score(answer=entry.get("answer"), entry=entry)
    except Exception as error:
        raise UserError(
            f"prompt {prompt.index}: reasoning_gym can't score this entry of {dataset!r}: {type(error).__name__}: {error}"
        ) from None


def _reasoning_gym(prompt: Prompt, response: str) -> float:
    """Some scorers raise on answers that they can't parse; that the entry can be scored at all is for `check_gold`."""
    score, entry, _ = _scorer(prompt)
    answer = _tagged(response)
    if answer is None:
        marked = _after_marker(response)
        answer = response.strip() if marked is None else marked
    return min(1.0, max(0.0, float(score(answer=answer, entry=entry))))


def _scorer(prompt: Prompt) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """reasoning_gym's scorer, the entry, and the dataset's name. Raises UserError."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("the grader 'reasoning_gym' needs the package reasoning-gym; install it with: pip install reasoning-gym") from None
    source = prompt.meta.get("reasoning_gym")
    if not isinstance(source, dict) or not isinstance(source.get("dataset"), str) or not isinstance(source.get("entry"), dict):
        raise UserError(
            f'prompt {prompt.index}: the grader \'reasoning_gym\' needs the field "reasoning_gym": {{"dataset": name, "entry": {{...}}}} in its row'
        )
    try:
        return reasoning_gym.get_score_answer_fn(source["dataset"]), source["entry"], source["dataset"]
    except ValueError:
        raise UserError(f"prompt {prompt.index}: reasoning_gym has no dataset {source['dataset']!r}") from None


def _tagged(text: str) -> str | None:
    """What the last <answer> tag that is closed holds. One pass: a regular expression over pairs is quadratic in unclosed ones."""
    opened: int | None = None
    found = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            found, opened = text[opened : tag.start()].strip(), None
    return found


_GRADERS: dict[str, tuple[Callable[[Prompt], None], Callable[[Prompt, str], float]]] = {
    "exact": (_check_exact, _exact),
    "number": (_check_number, _number),
    "math": (_check_math, _math),
    "reasoning_gym": (_check_reasoning_gym, _reasoning_gym),
}


def _answer(prompt: Prompt, grader: str) -> str:
    if prompt.answer is None:
        raise UserError(
            f"prompt {prompt.index}: no field 'answer', which the grader {grader!r} compares with; add it, or set eval.grader='none'"
        )
    return prompt.answer


def _brief(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
