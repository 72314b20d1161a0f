"""Where a step makes the host wait for the GPU, and copies that block or are not pinned: all of them, each with its reason and its number.

An entry that finds less or more than its number fails, and so does what no entry finds. Whoever removes a wait removes its entry with it.
The aim is one entry: the read of the step's numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cases import Case


@dataclass(frozen=True)
class Allowed:
    """`where`: a regular expression of what the ledger says, kind and place; `count`: how often in a step of a case."""

    reason: str
    where: str
    count: Callable[[Case], int]


def _once(case: Case) -> int:
    return 1


ALLOWED = [
    Allowed("the step's numbers, read once", r"tolist  megatron_opd/train/update\.py:update", _once),
]


def faults(found: Iterable[tuple[str, int]], case: Case, allowed: list[Allowed] = ALLOWED) -> list[str]:
    """What differs between the waits and copies of a step and the list, a line each; [] if nothing does."""
    counts: Counter[int] = Counter()
    lines = []
    for text, number in found:
        plain = re.sub(r":\d+:", ":", text)  # of a file's lines nothing is said
        fitting = [index for index, entry in enumerate(allowed) if re.match(entry.where, plain)]
        if len(fitting) != 1:
            lines.append(f"{'no entry' if not fitting else 'several entries'} of allowed.py for {number} x {text}")
        for index in fitting[:1]:
            counts[index] += number
    for index, entry in enumerate(allowed):
        if counts[index] != entry.count(case):
            lines.append(f"{counts[index]} instead of {entry.count(case)} x {entry.where} ({entry.reason})")
    return lines
