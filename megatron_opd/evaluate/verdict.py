"""What a grader finds of a response."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# cut: by length. unclosed: its thinking never ends. timeout: over a limit of time or memory. error: the grader failed. These score 0 and are
# counted apart, as is no_answer: nothing in the response that could be an answer.
Outcome = Literal["right", "wrong", "partial", "cut", "unclosed", "no_answer", "timeout", "error"]


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1]; `answer`: what was taken for the answer, in the spelling that equal answers share where the grader has one.

    reason: in words, what a person needs to believe it. seconds: CPU time of the grading. detail: of the grader, as JSON (of `code` the test
    that failed, and how).
    """

    score: float
    outcome: Outcome
    answer: str | None = None
    reason: str = ""
    seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)
