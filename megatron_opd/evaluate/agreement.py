"""How far a grader can be trusted with a benchmark's answers: golds that agree with themselves, and different ones that must not.

    python -m megatron_opd.evaluate.agreement GOLDS.toml

The file has a table for each format: `grader`, `response` (text with %s for the answer), and `answers`, lists of which each is one
answer: the gold, then other spellings of it. Different lists are different answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.errors import UserError
from megatron_opd.evaluate.grading_pool import GradingPool
from megatron_opd.records import Prompt
from megatron_opd.safety.untrusted import load_toml

_SECONDS = 5.0  # CPU time of a comparison, as eval.grading_seconds


@dataclass
class Agreement:
    """Counts of comparisons and of those that were right; `wrong` says which were not."""

    golds: int = 0
    themselves: int = 0
    spellings: int = 0
    agreeing: int = 0
    pairs: int = 0
    apart: int = 0
    wrong: list[str] = field(default_factory=list)


def measure_agreement(grader: str, response: str, answers: Sequence[Sequence[str]]) -> Agreement:
    """Compare every gold with itself, with its spellings, and with every other gold, each given as `response` does. Raises UserError."""
    found = Agreement()
    prompts = [Prompt(index, "", spellings[0]) for index, spellings in enumerate(answers)]
    given = [(prompt, other.index, spelling) for prompt in prompts for other in prompts for spelling in _tried(prompt, other, answers)]
    with GradingPool(grader, seconds=_SECONDS) as pool:
        if unreadable := pool.find_unreadable(prompts):
            raise UserError(f"answers that the grader {grader!r} can't read: {'; '.join(unreadable)}")
        verdicts = pool.grade((prompt, response.replace("%s", spelling)) for prompt, _, spelling in given)
        for (prompt, other, spelling), verdict in zip(given, verdicts, strict=True):
            right = verdict.score == 1.0
            if prompt.index != other:
                found.pairs += 1
                found.apart += not right
            elif spelling == prompt.answer:
                found.golds += 1
                found.themselves += right
            else:
                found.spellings += 1
                found.agreeing += right
            if right != (prompt.index == other):
                found.wrong.append(f"{prompt.answer!r} and {spelling!r}: {verdict.outcome} ({verdict.reason})")
    return found


def _tried(prompt: Prompt, other: Prompt, answers: Sequence[Sequence[str]]) -> list[str]:
    """The spellings of `other` that are compared with the gold: all of its own, the first of another."""
    spellings = list(dict.fromkeys(answers[other.index]))
    return spellings if prompt.index == other.index else spellings[:1]


def read_formats(path: str | Path) -> dict[str, tuple[str, str, list[list[str]]]]:
    """(grader, response, answers) of each format of a file. Raises UserError."""
    tables = load_toml(Path(path).read_text(encoding="utf-8"), str(path))
    formats = {}
    for name, table in tables.items():
        answers = table.get("answers") if isinstance(table, dict) else None
        whole = isinstance(answers, list) and all(isinstance(a, list) and a and all(isinstance(text, str) for text in a) for a in answers)
        if not whole or not isinstance(table.get("grader"), str) or "%s" not in str(table.get("response")):
            raise UserError(
                f"{path}: {name}: needs grader = NAME, response = text with %s, and answers = lists of texts, a gold first in each"
            )
        formats[name] = table["grader"], table["response"], answers
    return formats


def main(path: str) -> int:
    """Print the counts of a file of golds; 1 where a comparison is wrong."""
    wrong = []
    print(f"{'format':12} {'grader':8} {'golds = themselves':>18} {'spellings that agree':>20} {'different golds apart':>21}")
    for name, (grader, response, answers) in read_formats(path).items():
        found = measure_agreement(grader, response, answers)
        counts = (f"{found.themselves} of {found.golds}", f"{found.agreeing} of {found.spellings}", f"{found.apart} of {found.pairs}")
        print(f"{name:12} {grader:8} {counts[0]:>18} {counts[1]:>20} {counts[2]:>21}")
        wrong += [f"{name}: {line}" for line in found.wrong]
    print("".join(f"{line}\n" for line in wrong), end="")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1]))
    except (IndexError, OSError, UserError) as error:
        raise SystemExit(f"{error}\nusage: python -m megatron_opd.evaluate.agreement GOLDS.toml") from None
