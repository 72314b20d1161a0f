"""What a rank of a Slurm step runs: the command line, with a note of how it ended (train/node.py)."""

from __future__ import annotations

import os

from megatron_opd.__main__ import run as command_line
from megatron_opd.train.node import REFUSALS, Ending, classify, note


def run() -> int:
    """The command line's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = command_line()
    except Exception as error:
        note(classify(error), rank, 1, f"{type(error).__name__}: {error}")
        raise
    if code:
        note(Ending.REFUSED if code in REFUSALS else Ending.FAILED, rank, code, "see the log")
    return code
