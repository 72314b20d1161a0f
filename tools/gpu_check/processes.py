"""A command with a time limit, of which nothing is left running afterwards. Needs Python's standard library alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 4000
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code` is None where it was killed at its limit; `tail` is the end of its output (stdout and stderr)."""

    code: int | None
    seconds: float
    tail: str


def run_limited(command: Sequence[str], *, seconds: float, log: Path, environment: Mapping[str, str], folder: Path) -> Ended:
    """Run `command` in `folder` for at most `seconds`, its output into `log`; its process group and all descendants have ended afterwards.

    A command that can't be started ends with code 127 and the reason.
    """
    begin = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            return Ended(127, 0.0, f"{command[0]}: {error}")
    code: int | None = None
    family: set[int] = set()
    try:
        deadline = begin + seconds
        while code is None and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(left, 0.5))
            family |= _descendants(process.pid)
    finally:  # Ctrl-C included
        _end(process, family)
    return Ended(code, time.monotonic() - begin, tail(log))


def tail(log: Path, num_bytes: int = TAIL_BYTES) -> str:
    """The last whole characters of a file."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - num_bytes))
        return file.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes], family: set[int]) -> None:
    """End the group of `process`, and those descendants that made groups of their own (servers)."""
    family |= _descendants(process.pid)
    strays = {pid: _started(pid) for pid in family if _group(pid) not in (None, process.pid)}
    running = process.poll() is None
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        for pid, started in strays.items():
            if started is not None and _started(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if number == signal.SIGTERM and (running or strays):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
    process.wait()


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None of a process that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, so that a number given to another one is noticed."""
    fields = _stat(pid)
    return fields[19] if fields else None


def _group(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[2]) if fields else None


def _descendants(pid: int) -> set[int]:
    """Children, and theirs, that run now."""
    parents = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    layer = {pid}
    while layer := {child for child, parent in parents.items() if parent in layer} - found:
        found |= layer
    return found
