"""The letter of a multiple-choice answer, A to J."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megatron_opd.errors import UserError
from megatron_opd.evaluate.graders.reading import ASCII, answer_of, bare, brief, last_box, one_line
from megatron_opd.evaluate.verdict import Verdict

if TYPE_CHECKING:
    from megatron_opd.records import Prompt

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|mbox|bf|rm)\b\s*")
_MARKUP = re.compile(r"\\[()\[\],;! ]|[*_`$\"“”{}]|\\boxed|\\fbox")
# In lower case a letter counts between parentheses or at the end of a line; "a" is a word elsewhere.
_SPACE = re.compile(r"\s+")  # a run of it would cost the square of its length below
_LETTER = r"[(\[]?\s*(?P<letter>[A-J]|(?<=[(\[])[a-j](?=\s*[)\]])|[a-j](?=[ .)\]]*(?:\n|$)))(?![\w'’^=+<>-])"
_NOUN = r"(?i:answer|option|choice|letter)"
_STATEMENTS = [
    re.compile(pattern)
    for pattern in (
        rf"####\s*(?:{_NOUN}\s*:?\s*)?{_LETTER}",
        # Answer: B; the correct option is: (B); the answer must therefore be option B
        rf"\b(?i:answer|option|choice|solution)s?(?:\s+{_NOUN})?(?:\s+(?i:is|are|must|should|would|will|has\s+to)(?:\s+(?!(?i:not)\b)\w+)?(?:\s+(?i:be))?\s*:?|\s*[:=]|\s+[-–—]\s)"
        rf"\s*(?:(?i:the)\s+)?(?:{_NOUN}\s*:?\s+)?{_LETTER}",
        rf"\b(?i:not)\s+(?:{_NOUN}\s+)?[(\[]?[A-J][)\]]?,?\s+(?i:but)\s+(?:(?i:rather)\s+)?(?:{_NOUN}\s+)?{_LETTER}",
        # B is correct; option (B) is the right answer
        rf"(?<![\w(\[]){_LETTER}[)\]]?\s+(?i:is)\s+(?:(?i:the)\s+)?(?i:correct|right|best|answer)\b",
        rf"\b(?i:thus|therefore|hence|so),?\s+(?:{_NOUN}\s+)?{_LETTER}(?=[)\]]?\s*(?:[.!]|\n|$))",
        rf"\b(?i:choose|chose|pick|picked|select|selected|go|going|went)\s+(?:(?i:with)\s+)?(?:{_NOUN}\s+)?{_LETTER}",
    )
]
_LINE = re.compile(r"\s*(?:[(\[]([A-Ja-j])[)\]]|([A-J])(?:[).:]|$)|([a-j])[).]?$)\s*(.*)")
_MENTION = re.compile(rf"\(([A-J])\)|\b{_NOUN}\s+([A-J])\b(?!['’])")
_SEVERAL = re.compile(r"[)\]]?\s*(?:,|/|&|(?i:and|or)\b)\s*(?i:option\s+|choice\s+)?[(\[]?[A-J](?![\w'’])")
# "Answer: A triangle", "Answer: I think": words, not letters, unless one of these follows.
_GOES_ON = re.compile(r"[)\]]|\s*(?:$|[^\w\s'’]|\n)|\s+(?i:because|since|as|for|due|which|is|was|and|or|with|by)\b")
_GOLD = re.compile(r"[(\[]?\s*([A-Ja-j])\s*[)\].:]?")


def check(prompt: Prompt) -> None:
    letter_of(prompt)


def letter_of(prompt: Prompt) -> str:
    """The prompt's answer, a letter from A to J. Raises UserError."""
    answer = answer_of(prompt, "choice")
    match = _GOLD.fullmatch(_unmarked(bare(answer)).strip())
    if match is None:
        raise UserError(
            f"prompt {prompt.index}: answer {brief(answer)} is not one letter from A to J; give the letter of the right choice, or use "
            "the grader 'exact'"
        )
    return match[1].upper()


def grade(prompt: Prompt, response: str) -> Verdict:
    """The letter that is boxed or stated last; else the one that a line consists of or opens with; else the only one that is mentioned.

    No answer: none of these. Several letters where one is asked are wrong, and so is a box that holds something else.
    """
    wanted = letter_of(prompt)
    text = response.translate(ASCII)
    found = _stated(text) or _of_a_line(_unmarked(text)) or _only_mention(_unmarked(text))
    if found is None:
        return Verdict(0.0, "no_answer", reason="no letter is boxed, stated as the answer, or alone in a line")
    letter, where = found
    if letter == wanted:
        return Verdict(1.0, "right", letter, f"{letter} is {where}")
    return Verdict(0.0, "wrong", letter, f"{brief(letter)} is {where}, wanted is {wanted}")


def _unmarked(text: str) -> str:
    text = _MARKUP.sub("", _COMMAND.sub("", text))
    return _SPACE.sub(lambda match: "\n" if "\n" in match[0] else " ", text)


def _stated(text: str) -> tuple[str, str] | None:
    """The letter (several: all of them as text) of the last box or statement."""
    start = max((match.start() for match in _BOX.finditer(text)), default=None)
    box = last_box(text)
    later = _statement(_unmarked(text if box is None or start is None else text[start:]))
    if box is None or later is not None:
        return later
    content = _unmarked(bare(box)).strip()
    match = _LINE.fullmatch(content)
    if match is not None and not _SEVERAL.match(content, match.start(4)):
        return next(letter for letter in match.groups()[:3] if letter).upper(), "in the last box"
    words = re.fullmatch(rf"{_NOUN}\s*:?\s*{_LETTER}\)?\.?", content)
    if words is not None:
        return words["letter"].upper(), "in the last box"
    earlier = None if re.search(r"\b[A-J]\b", content) else _statement(_unmarked(text))
    if earlier is not None:
        return earlier  # "the answer is B, so \boxed{42}"
    return (one_line(content), "in the last box") if content else None


def _statement(text: str) -> tuple[str, str] | None:
    found: tuple[int, str] | None = None
    for pattern in _STATEMENTS:
        for match in pattern.finditer(text):
            letter, end = match["letter"], match.end("letter")
            if letter in "AI" and not _GOES_ON.match(text, end):
                continue
            several = _SEVERAL.match(text, end)
            if found is None or match.start("letter") > found[0]:
                found = match.start("letter"), (letter + several[0] if several else letter.upper())
    return None if found is None else (one_line(found[1]), "stated as the answer")


def _of_a_line(text: str) -> tuple[str, str] | None:
    """A line that is a letter, or opens with one; of a list of choices none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    alone = [match for line in lines if (match := _LINE.fullmatch(line)) and not match[4].strip(". ")]
    opened = [match for line in lines if (match := _LINE.fullmatch(line))]
    for match in (*alone[-1:], *(opened if len(opened) == 1 else [])):
        return next(letter for letter in match.groups()[:3] if letter).upper(), "in a line of its own"
    return None


def _only_mention(text: str) -> tuple[str, str] | None:
    letters = {match[1] or match[2] for match in _MENTION.finditer(text)}
    return (letters.pop(), "the only choice that is mentioned") if len(letters) == 1 else None
