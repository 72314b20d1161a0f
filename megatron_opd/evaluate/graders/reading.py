"""What graders read in a response: the text behind a marker, boxes, numbers, and an answer without what is put around it."""

from __future__ import annotations

import re
from decimal import Decimal, DecimalException, localcontext
from typing import TYPE_CHECKING

from megatron_opd.errors import UserError

if TYPE_CHECKING:  # a worker starts in a fraction of the time without it
    from megatron_opd.records import Prompt

LONGEST_ANSWER = 200  # characters of an answer in a verdict
_MARKER = re.compile(r"####|\banswer\b[*_]*(?:\s+is(?!\s+not\b))?\s*:(?:[*_]{1,2}(?=\s))?|\banswer\s+is\b(?!\s+not\b)", re.IGNORECASE)
# An "=" that is no part of another sign: of ">=", "<=", "!=", ":=", "==", "=>".
EQUALS = re.compile(r"(?<![<>!:=])=(?![=>])")
# A sign belongs to the number unless something to subtract from stands before it: "5-3" ends in 3, "5 * -3" in -3.
_SIGN = r"(?:(?<![\w.)\]}])[-+])?"
UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
NUMBER = re.compile(_SIGN + UNSIGNED)
VALUE = re.compile(rf"({_SIGN})(?:(\d+) (?=\d+/\d))?({UNSIGNED})(?:/(\d+(?:\.\d+)?))?")  # a number, a/b, or a b/c
# A number that opens a line and is no part of something longer: a term of a sum, a coefficient, a time, the whole of 3 1/2, one of several.
_OPENING = re.compile(
    rf"[\s*:]*(?:\\?\$|€|£)?((?>[-+]?{UNSIGNED}))"
    r"(?![\w({^]|\s+\d|\s*\\(?!text|mathrm|[$%,;!])|\s*(?:[-+*/×÷^<>:,;]|or\b|and\b|to\b)\s*[\d(.\\$])",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}  # full-width forms, the minus sign
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[!,;: ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/]| ?\\d?frac)")  # 1 234 567
_SUPERSCRIPT = re.compile("[⁻⁺]?[⁰¹²³⁴-⁹]+")
_NORMAL = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
DEGREES = re.compile(r" ?(?:\^ ?\{? ?\\circ\b ?\}?|\\degree\b|°)")
_FRACTION = re.compile(r"(\d?) ?\\[dt]?frac ?(?:\{ ?([-+]?\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))")
_POWER_OF_TEN = re.compile(r"(?<=\d) ?(?:\\times|\\cdot|×|·|\*|x) ?10 ?\^ ?(?:\{ ?([-+]?\d+) ?\}|([-+]?\d+))")
# A number is looked at from its first digit alone, or a long one would cost the square of its length.
_POWER = re.compile(r"(?:(?<![\d,.])\d[\d,.]*+ ?)?\^ ?(?:\{[^{}]*\}|[-+]?\d+)|(?<![\d,.])\d[\d,.]*+\*\*[-+]?\d+")
_WRAPPED = re.compile(
    r"(?P<mark>\*\*\*|\*\*|\*|`|\$\$|\$|\")(?P<marked>.+)(?P=mark)|\\\((?P<inline>.+)\\\)|\\\[(?P<display>.+)\\\]"
    r"|\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{(?P<text>[^{}]*)\}",
    re.DOTALL,
)
_MOST_WRAPPERS = 8
_LIKE_ANSWERS = {
    *("ground_truth", "groundtruth", "target", "solution", "final_answer", "expected_answer", "correct_answer", "reference_answer"),
    *("gold", "gold_answer", "label", "answers", "output", "response", "completion"),
}


def answer_of(prompt: Prompt, grader: str) -> str:
    """The prompt's answer. Raises UserError if it has none."""
    if prompt.answer is None:
        raise UserError(
            f"prompt {prompt.index}: no field 'answer', which the grader {grader!r} compares with{_others(prompt)}; add it, or set the evaluation's "
            "grader to 'none'"
        )
    return prompt.answer


def _others(prompt: Prompt) -> str:
    """Columns of the row that other data sets keep an answer in; what they mean is for people to say."""
    names = [name for name in prompt.meta if str(name).lower() in _LIKE_ANSWERS]
    return f" (there is {', '.join(map(repr, names))}; if that holds it, rename it to 'answer')" if names else ""


def brief(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def one_line(text: str) -> str:
    return " ".join(text.split())


def final_answer(text: str) -> str:
    """The text after the last marker, else after the last "=", else all of it; white space normalised."""
    marked = after_marker(text)
    return one_line(after_equals(text) if marked is None else marked)


def after_marker(text: str) -> str | None:
    """What stands behind the last marker ("####", "answer:" or "answer is"); None without one."""
    marker = last_marker(text)
    return None if marker is None else text[marker.end() :].strip()


def after_statement(text: str) -> str | None:
    """What stands behind the last marker if that is "answer:" or "answer is", which a sentence goes on from; without emphasis before it."""
    marker = last_marker(text)
    return None if marker is None or marker[0] == "####" else text[marker.end() :].strip("* \t\n\r")


def last_marker(text: str) -> re.Match[str] | None:
    return max(_MARKER.finditer(text), key=lambda match: match.end(), default=None)


def after_equals(text: str) -> str:
    """What stands behind the last "=" that is a sign of its own; all of a text without one."""
    return text[max((match.end() for match in EQUALS.finditer(text)), default=0) :]


def tagged(text: str) -> str | None:
    """What the last <answer> tag that is closed holds. One pass: a regular expression over pairs is quadratic in unclosed ones."""
    opened: int | None = None
    found = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            found, opened = text[opened : tag.start()].strip(), None
    return found


def boxes(text: str) -> list[re.Match[str]]:
    return list(_BOX.finditer(text))


def last_box(text: str) -> str | None:
    """Content of the last box whose braces match."""
    for match in reversed(boxes(text)[-8:]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[match.end() : match.end() + brace.start()]
    return None


def bare(text: str) -> str:
    r"""`text` without what is put around an answer: emphasis, code, quotes, $ $, \( \), \boxed{}, \text{}, a full stop at the end."""
    for _ in range(_MOST_WRAPPERS):
        before = text = text.strip()
        if text.endswith((".", "!")) and not text.endswith(".."):
            text = text[:-1].rstrip()
        if match := _WRAPPED.fullmatch(text):
            text = next(group for name, group in match.groupdict().items() if name != "mark" and group is not None)
        elif text.endswith("}") and _BOX.match(text) and (box := last_box(text)) is not None and len(_BOX.findall(text)) == 1:
            text = box if text.find(box) + len(box) + 1 == len(text) else text
        if text == before:
            break
    return text.strip()


def plain(text: str) -> str:
    """`text` with one spelling of white space, digits, signs, thousands, fractions and powers of ten, and without signs of degrees."""
    text = THOUSANDS.sub("", text.translate(ASCII))
    text = re.sub(r"\s+", lambda match: "\n" if "\n" in match[0] else " ", text)
    text = DEGREES.sub(" ", _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_NORMAL)}}}", text))
    text = _FRACTION.sub(lambda match: f"{match[1]}{' ' * bool(match[1])}{match[2] or match[3]}/{match[4] or match[5]}", text)
    text = _POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", text)
    return _POWER.sub(" ", text)


def last_number(text: str) -> Decimal | None:
    """The last number in a text: sign, thousands separators, decimals, an exponent and fractions are understood; None where there is none.

    Powers are not: neither base nor exponent is taken for the answer, but a unit's exponent leaves its number ("12 cm^2" is 12).
    """
    found = list(VALUE.finditer(plain(text)))
    return value_of(found[-1]) if found else None


def value_of(match: re.Match[str]) -> Decimal | None:
    """The number of a match of VALUE; None for an exponent beyond what a Decimal holds and a fraction over 0."""
    sign, whole, number, divisor = (group or "" for group in match.groups())
    try:
        value = Decimal(number.replace(",", ""))
        if divisor:
            with localcontext() as context:
                context.prec = min(len(number) + len(divisor) + 28, 1000)
                value = value / Decimal(divisor) + Decimal(whole or 0)
    except DecimalException:
        return None
    return value.copy_negate() if sign == "-" else value


def opening_number(line: str) -> str | None:
    """The number that opens a line; None where none does, as in a sum."""
    match = _OPENING.match(line)
    return None if match is None or "=" in line else match[1]


def marked_number(text: str) -> str | None:
    """The number that opens the line behind the last "####"; None where none does, as in a sum or the heading "#### 2. Then add"."""
    _, marker, rest = text.rpartition("####")
    line, _, later = rest.lstrip(" \t").partition("\n")
    match = _OPENING.match(line) if marker else None
    if match is None or "=" in line or (later.strip() and re.match(r"[.)]\s*\S", line[match.end() :])):
        return None
    return match[1]
