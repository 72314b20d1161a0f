"""What a resume changed, written down in the run's folder."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_opd.cost.meter import read_jsonl, write_jsonl
from megatron_opd.train.identity import Resumption

HISTORY_FILE = "history.jsonl"


def write_history(output: Path, going: Resumption) -> None:
    """Put what changed at this resume, with its step, into the folder's history; rows of steps that are made again are cut first."""
    path = output / HISTORY_FILE
    rows = [row for row in read_jsonl(path, number="after_step") if row["after_step"] < going.step]
    changed = {key: found for key, found in (("objective", going.new), ("settings", going.settings)) if found}
    if changed:
        rows.append({"after_step": going.step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **changed})
    if rows or path.exists():
        write_jsonl(path, rows)
