"""What each round of a run cost, and how far the student moved in it."""

from __future__ import annotations

from typing import Any

from megatron_opd.evaluate.wording import shown

ROUND_COLUMNS = [
    "round",
    "steps",
    "student tokens",
    "teacher tokens",
    "trained tokens",
    "seconds",
    "GPU hours",
    "reverse KL, first to last step",
    "tokens off at the end",
]


def round_rows(stages: list[dict[str, Any]], training: list[dict[str, Any]]) -> list[list[str]]:
    """A row of ROUND_COLUMNS a round; none for a run without rounds.

    `stages`: rows of stages.jsonl, of which a round has some each time it was gone on with; `training`: rows of the distillation's metrics.
    Student tokens were sampled, teacher tokens scored.
    """
    numbers = sorted({row["round"] for row in [*stages, *training] if type(row.get("round")) is int})
    return [_row(number, *([row for row in rows if row.get("round") == number] for rows in (stages, training))) for number in numbers]


def _row(number: int, stages: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[str]:
    tokens = {name: sum(row["tokens"] for row in stages if row["stage"] == name) for name in ("rollout", "score", "train")}
    ends = [row.get("reverse_kl") for row in (steps[:1] + steps[-1:])]
    off = steps[-1].get("off_share") if steps else None
    return [
        str(number),
        str(len(steps)),
        *(shown(tokens[name], ",.0f") for name in ("rollout", "score", "train")),
        shown(sum(row["seconds"] for row in stages), ".1f"),
        shown(sum(row["gpu_hours"] for row in stages), ".2f"),
        " to ".join(shown(value, ".4f") for value in ends) if ends else "",
        shown(off, ".1%"),
    ]
