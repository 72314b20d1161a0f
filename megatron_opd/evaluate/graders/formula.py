"""The answer as a formula, compared by math-verify; words, bases of numbers and the kinds of brackets are compared here."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_opd.errors import UserError
from megatron_opd.evaluate.graders.reading import (
    ASCII,
    NUMBER,
    SPACED,
    THOUSANDS,
    VALUE,
    after_equals,
    after_statement,
    answer_of,
    bare,
    boxes,
    brief,
    last_box,
    marked_number,
    one_line,
    plain,
)
from megatron_opd.evaluate.verdict import Verdict

if TYPE_CHECKING:
    from megatron_opd.records import Prompt

_BARE_INEQUALITY = re.compile(r"(?!.*(?<![\\A-Za-z])[A-Za-z]{2})[^$\n]*(?:[<>≤≥]|\\[lg]eq?\b|\\[lg]t\b)[^$\n]*")
_BARE_LENGTH = 200  # characters of a response that is a formula without delimiters
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_BASE = re.compile(r"([0-9A-Za-z.]+)_\{?(\d+)\}?")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\overline\s*\{(\d{1,20})\}")  # 0.1\overline{6}
_BEFORE_PER_CENT = re.compile(r"(?<=\d)(?:\\[,;:! ]|~)(?=\\?%)")
_SEVERAL = re.compile(rf"[\s$*]*({NUMBER.pattern}(?:\s*(?:,\s*(?:or|and)?|or|and)\s*{NUMBER.pattern})+)[\s$*.!]*")
_MIXED = re.compile(r"(?<![\w.,/])(\d+) (\d+)/(\d+)(?![\w./])")  # 3 1/2
# 3e5, 2.5e-3; "2e-1" may as well be twice Euler's number, minus 1.
_SCIENTIFIC = re.compile(r"(?<![\w.\\^])(?:(\d+\.\d+)[eE]([-+]?\d+)|(\d+)[eE](\d+))(?![\w.])")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*|\\[,!;: ]|~")
_INEQUALITY = re.compile(r"[<>≤≥]|\\[lg]eq?(?:slant)?\b|\\[lg]t\b")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\\lor\b|\\vee\b|\bor\b")
_NOTHING = {"emptyset", "varnothing", "∅", "none", "nosolution", "nosolutions", "norealsolution", "norealsolutions", "{}"}
_LONGEST_NUMBER = 50  # characters


class _Reading(NamedTuple):
    """A way to read the answer: `content` is the formula alone where it is known, `source` what math-verify looks for one in."""

    content: str | None
    source: str


def check(prompt: Prompt) -> None:
    answer = answer_of(prompt, "math")
    wanted = _undelimited(answer)
    if not (_words(wanted) or _parse(_delimited(answer))) or not grade(prompt, f"\\boxed{{{wanted}}}").score:
        raise UserError(f"prompt {prompt.index}: math-verify can't read the answer {brief(answer)}; use the grader 'exact'")
    grade(prompt, "$17$")  # its own text is quickly equal; only another one shows that it takes for ever to compare with


def grade(prompt: Prompt, response: str) -> Verdict:
    """No answer: no formula and no number in the response (where words are the answer: no text), or an empty box."""
    answer = answer_of(prompt, "math")
    wanted, gold = _undelimited(answer), _parse(_delimited(answer))
    words = _words(wanted)
    if not gold and not words:
        check(prompt)
    where, readings = _read(_latex(response), words=bool(words))
    found = None
    for reading in readings:
        given = [] if words else _parse(reading.source)
        if _same_words(words, reading.content or "") if words else _agree(wanted, reading.content, gold, given):
            return Verdict(1.0, "right", wanted, f"{where} equals the answer")
        found = found or reading.content or next((part for part in given if isinstance(part, str)), None)
    if not found:
        return Verdict(0.0, "no_answer", reason=f"{where} is empty" if words or "box" in where else "no formula in the response")
    found = _spelled(found)
    return Verdict(0.0, "wrong", found, f"{where} is {brief(found)}, wanted is {brief(wanted)}")


def _read(text: str, *, words: bool) -> tuple[str, list[_Reading]]:
    """Where the answer stands, and the ways to read it; none where an empty box stands for it."""
    found, marked = boxes(text), marked_number(text)
    if (box := last_box(text)) is not None:
        if not box.strip("{}$ \n"):
            return "the last box", []
        last = _Reading(box, f"\\boxed{{{box}}}")
        # All boxes are one set for math-verify; by custom the last alone is the answer.
        return "the last box", [last, _Reading(None, text)] if len(found) > 1 else [last]
    if words:
        stated = after_statement(text)
        last = text if stated is None else stated.partition("\n")[0]
        return "the text", [_Reading(bare(part), part) for part in dict.fromkeys((last, re.split(r"[.!*]\s", last)[0]))]
    if marked is not None:
        return "the number behind the last ####", [_Reading(marked, f"${marked}$")]
    stated = (after_statement(text) or "").partition("\n")[0]
    if len(stated) <= _BARE_LENGTH and (several := _SEVERAL.fullmatch(stated)):  # math-verify would take the first for the answer
        formula = re.sub(r"\s*(?:,\s*)?(?:or|and)\s*", ",", several[1])
        return "the statement", [_Reading(formula, f"${formula}$")]
    if len(text) <= _BARE_LENGTH and _BARE_INEQUALITY.fullmatch(text.strip()):
        return "the response", [_Reading(text.strip(), f"${text.strip()}$")]
    return "the last formula", [_Reading(None, text)]


def _agree(wanted: str, content: str | None, gold: list[Any], given: list[Any]) -> bool:
    if content is not None:
        left, right = (_SIZES.sub("", text).strip("$ ") for text in (wanted, content))
        if _compact(left) in _NOTHING and _compact(right) in _NOTHING:
            return True
        bases = _BASE.fullmatch(left.replace(" ", "")), _BASE.fullmatch(right.replace(" ", ""))
        if bases[0] and bases[1]:
            return bases[0].groups() == bases[1].groups()
        kinds = _kind(left), _kind(right)
        if kinds in (("ordered", "set"), ("set", "ordered")):
            return False
        if kinds == ("ordered", "list"):  # math-verify takes a list without brackets for a set
            given = _parse(f"$({right})$")
        solutions = _solutions(left), _solutions(right)  # math-verify finds x >= 3 and [3, oo) equal in one direction alone
        if any(solutions):
            return _verify(solutions[0] or gold, solutions[1] or given) or _verify(gold, given)
    return _verify(gold, given)


def _kind(formula: str) -> str | None:
    r""" "ordered" for (a, b) and [a, b], "set" for \{a, b\}, "list" for a, b; None for what is not several."""
    depth, commas = 0, [0, 0]  # outside of brackets, and within the first
    for mark in re.findall(r"[()\[\]{},]", formula):
        depth += {"(": 1, "[": 1, "{": 1, ",": 0}.get(mark, -1)
        if mark == "," and depth in (0, 1):
            commas[depth] += 1
    if commas[0]:
        return "list"
    if not commas[1]:
        return None
    if formula.startswith((r"\{", r"\lbrace")) and formula.endswith((r"\}", r"\rbrace")):
        return "set"
    return "ordered" if formula[0] in "([" and formula[-1] in ")]" else None


def _solutions(formula: str) -> list[Any]:
    """The set that an inequality, or several with "or" between them, describes; [] for what is none, or has several unknowns."""
    parts = _OR.split(formula)
    if not all(_INEQUALITY.search(part) for part in parts):
        return []
    from sympy import Union

    found = [parsed[0] for part in parts if (parsed := _parse(f"${part}$"))]
    try:
        one_unknown = len(set().union(*(relation.free_symbols for relation in found))) == 1
        return [Union(*(relation.as_set() for relation in found))] if one_unknown and len(found) == len(parts) else []
    except (AttributeError, NotImplementedError):  # SymPy's own, for relations that it can't make a set of
        return []


def _words(formula: str) -> str | None:
    r"""The words of an answer such as \text{no solution} or "Evelyn"; None for a formula. A few letters alone may be a product."""
    rest = _TEXT.sub("", formula).strip(" ,.()$")
    said = _said(formula)
    if formula and not rest and _TEXT.search(formula) and re.match(r"[a-z]", said):
        return said
    return said if re.search(r"[a-z]{4}", said) and not re.search(r"[\\^_=+*/<>{}\d]", formula) else None


def _said(formula: str) -> str:
    return re.sub(r"[\W_]+", " ", _TEXT.sub(r"\1", formula)).strip().lower()


def _same_words(words: str, formula: str) -> bool:
    return _said(formula) == words or (_compact(words) in _NOTHING and _compact(formula) in _NOTHING)


def _compact(text: str) -> str:
    return re.sub(r"[\s\\.]", "", _TEXT.sub(r"\1", text)).lower()


def _delimited(answer: str) -> str:
    """math-verify finds LaTeX by its delimiters, and a bare "\\frac{1}{2}" has none."""
    answer = one_line(_latex(answer))
    return answer if "$" in answer or re.search(r"\\boxed|\\\(|\\\[", answer) else f"${answer}$"


def _undelimited(answer: str) -> str:
    text = one_line(_latex(answer))
    box = last_box(text)
    return text.strip("$ ") if box is None else box


def _latex(text: str) -> str:
    r"""`text` with ASCII digits and signs, without currency (\$) and what separates thousands, with mixed numbers and powers of ten in LaTeX."""
    text = THOUSANDS.sub("", re.sub(r"(?<!\\)\\\$", "", text.translate(ASCII)))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", SPACED.sub(lambda match: match[0].replace(" ", ""), text))
    text = _REPEATING.sub(_fraction, _BEFORE_PER_CENT.sub("", text))
    return _SCIENTIFIC.sub(lambda match: rf"{match[1] or match[3]} \times 10^{{{match[2] or match[4]}}}", text)


def _fraction(repeating: re.Match[str]) -> str:
    """A decimal whose last digits repeat, as a fraction."""
    whole, once, again = repeating.groups()
    value = Fraction(int(whole + once + again) - int(whole + once or 0), (10 ** len(again) - 1) * 10 ** len(once))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _spelled(formula: str) -> str:
    """Equal numbers in one spelling, formulas without white space and sizes of brackets."""
    text = plain(formula if "," in formula else after_equals(formula)).strip("$ ")
    match = VALUE.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is not None and not re.search(r"[eE][-+]?\d{3}", text):
        sign, whole, number, divisor = match.groups()
        try:
            value = Fraction(number.replace(",", "")) / Fraction(divisor or 1) + Fraction(whole or 0)
        except ZeroDivisionError:
            return text
        return str(-value if sign == "-" else value)
    return re.sub(r"\s+", "", _SIZES.sub("", formula)).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").strip("$.")


def _parse(text: str) -> list[Any]:
    try:
        from math_verify import parse
    except ImportError:
        raise UserError("the grader 'math' needs the package math-verify; install it with: pip install math-verify") from None
    return parse(text, parsing_timeout=None, raise_on_error=False)  # type: ignore[arg-type]  # no limit by signals: workers have their own


def _verify(gold: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    return verify(gold, given, timeout_seconds=None)
