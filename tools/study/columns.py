"""How the columns of worked additions were written: in whose order their digits stand, and whether their sums are right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_opd.evaluate.rows import Row

_COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d)")


@dataclass(frozen=True)
class Columns:
    """Shares of the columns whose two digits differ: with the left number's digit first (as teacher A writes), with the right one's first, with
    other digits than the prompt's. sums_right: of these columns those whose sum is that of the digits that stand there."""

    left_first: float
    right_first: float
    other_digits: float
    sums_right: float


def read_columns(prompts: Sequence[str], rows: Iterable[Row]) -> Columns:
    """Of all responses together. What is not written as a column at all has other digits and no right sum."""
    counts = {"left": 0, "right": 0, "other": 0}
    right_sums = 0
    for row in rows:
        left, right = prompts[row.prompt].rstrip(":").split("+")
        written = (row.response or "").split(",")
        for number, digits in enumerate(zip(reversed(left), reversed(right), strict=True)):
            if digits[0] == digits[1]:
                continue
            match = _COLUMN.fullmatch(written[number]) if number < len(written) else None
            found = (match[1], match[2]) if match else ()
            counts["left" if found == digits else "right" if found == digits[::-1] else "other"] += 1
            right_sums += match is not None and int(match[1]) + int(match[2]) + int(match[3]) == int(match[4])
    total = sum(counts.values())
    return Columns(*(counts[name] / total for name in counts), sums_right=right_sums / total)
