"""Runs parts one after the other into a record, each within its own limit and that of the whole call."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import machine, report
from .bars import BARS, Bar
from .parts import NOT_RUN, ROOT, Part, environment
from .processes import run_limited
from .record import PartRecord, Record, git_commit


def run_parts(
    parts: Sequence[Part],
    record: Record,
    *,
    seconds: float,
    again: bool = False,
    root: Path = ROOT,
    bars: Sequence[Bar] = BARS,
    say: Callable[[str], Any] = print,
) -> None:
    """Run those of `parts` that are not done with this code (all with `again`); record and report are written after each.

    `seconds`: for all of them; what does not fit any more is to do at the next call.
    """
    deadline, commit = time.monotonic() + seconds, git_commit(root)
    for part in parts:
        if not (again or part.always) and record.is_done(part.name, commit):
            say(f"{part.name}: done before")
            continue
        reason, left = part.lacking(record.machine), deadline - time.monotonic()
        if reason:
            found = PartRecord("not run", reason, commit=commit)
        elif left < min(part.least, part.limit):
            found = PartRecord("to do", f"{left:.0f} s were left; call again", commit=commit)
        else:
            say(f"{part.name}: {part.title} (at most {min(part.limit, left):.0f} s)")
            found = run_part(part, record.folder, seconds=min(part.limit, left), commit=commit, root=root)
            if found.status == "timed out" and left < part.limit:
                found.status, found.reason = "cut", f"the call's time was over after {found.seconds:.0f} s; call again"
        before = record.parts.get(part.name)
        if found.status in ("to do", "cut") and before is not None and before.status == "done" and before.commit == commit:
            say(f"{part.name}: {found.reason}; its earlier numbers stay")
            continue
        record.parts[part.name] = found
        if part.name == "machine" and found.result:
            record.machine = found.result
        record.save()
        report.write(record, root, bars=bars)
        say(f"{part.name}: {found.status}{f': {found.reason}' if found.reason else ''} ({found.seconds:.0f} s)")


def run_part(part: Part, folder: Path, *, seconds: float, commit: str, root: Path) -> PartRecord:
    """One part in a process of its own; the output goes to FOLDER/logs, the files named in `keep` to FOLDER."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        work = Path(name)
        command, clocks = part.words(work), {"before": _clocks()}
        ended = run_limited(
            command, seconds=seconds, log=logs / f"{part.name}.log", environment=environment(part, root) | {"TMPDIR": name}, folder=root
        )
        clocks["after"] = _clocks()
        result = _read(work / f"{part.name}.json")
        for file in part.keep:
            if (work / file).exists():
                shutil.copyfile(work / file, folder / file)
    shown = ["python" if word == sys.executable else word.replace(name, "WORK") for word in command]
    if ended.code is None:
        status, reason = "timed out", f"after {ended.seconds:.0f} s"
    elif ended.code == NOT_RUN:
        return PartRecord("not run", (ended.tail.splitlines() or ["it did not say why"])[-1], ended.seconds, shown, commit, clocks)
    elif ended.code:
        status, reason = "failed", f"exit code {ended.code}"
    elif result is None:
        status, reason = "failed", "exit code 0, but it wrote no JSON"
    else:
        return PartRecord("done", "", ended.seconds, shown, commit, clocks, result)
    return PartRecord(status, reason, ended.seconds, shown, commit, clocks, result, ended.tail)


def _clocks() -> str:
    return machine.clocks().get("clocks.sm", "")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
