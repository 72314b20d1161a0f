"""The answer as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megatron_opd.errors import UserError
from megatron_opd.evaluate.graders.reading import (
    EQUALS,
    after_equals,
    after_marker,
    after_statement,
    answer_of,
    bare,
    brief,
    final_answer,
    last_box,
    marked_number,
    one_line,
)
from megatron_opd.evaluate.verdict import Verdict

if TYPE_CHECKING:
    from megatron_opd.records import Prompt

_RELATION = re.compile(r"\s*([<>!:=]=|=>|[<>=])\s*")
_COMPUTED = re.compile(r"(?:[A-Za-z]\s*|[\d\s.,()+*/×÷=-]*)=(?![=>])")  # x = 3 and 1 + 2 = 3 give 3; 2x = 3 does not


def check(prompt: Prompt) -> None:
    if not one_line(answer_of(prompt, "exact")):
        raise UserError(f"prompt {prompt.index}: the answer is empty, which no response can equal; fix it")


def grade(prompt: Prompt, response: str) -> Verdict:
    """No answer: nothing but white space and empty markup in the response, behind its marker, or in its box."""
    answer = one_line(answer_of(prompt, "exact"))
    wanted = _spelled(answer)
    marked, box = after_marker(response), last_box(response)
    if marked is not None:
        where, given = "behind the last marker", _behind_marker(response, marked)
    elif box is not None:
        where, given = "in the last box", [box, bare(box)]
    else:
        where, final = "at the end", final_answer(response)
        given = [response, bare(response), final, bare(final)]
    found = one_line(given[-1])
    if not found.strip("*_`$ "):
        return Verdict(0.0, "no_answer", reason=f"nothing stands {where}")
    # An answer that holds an "=" of its own can't be found behind one; it then ends the response.
    whole = _spelled(response)
    ends = where == "at the end" and EQUALS.search(wanted) and re.search(rf"(?:^|[\s,;:]){re.escape(wanted)}$", whole)
    if ends or wanted in map(_spelled, given):
        return Verdict(1.0, "right", answer, f"{where} stands the answer")
    return Verdict(0.0, "wrong", found, f"{where} stands {brief(found)}, wanted is {brief(answer)}")


def _behind_marker(response: str, marked: str) -> list[str]:
    """Ways to read what stands behind the last marker; the last is what is shown."""
    line = marked.partition("\n")[0].strip("* \t")
    ways = [marked, line, line.rstrip(".!* "), marked_number(response) or marked]
    if after_statement(response) is not None:
        sentence = re.split(r"[.!*]\s", line)[0]
        ways += [sentence, after_equals(sentence) if _COMPUTED.match(sentence) else sentence]
    box = last_box(marked)
    return [*ways, *map(bare, ways), bare(line) if box is None else bare(box)]


def _spelled(text: str) -> str:
    return _RELATION.sub(r"\1", one_line(text))
