"""`make gpu-check`: runs the parts on this machine's GPU, and says what fell short of which bar (docs/gpu.md).

Exit codes: 0 nothing fell short and nothing is left to do; 1 something fell short, failed or is left; 2 it could not begin.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from . import machine, report
from .parts import PARTS, ROOT, Part
from .record import Record, git_commit, today
from .run import run_parts


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    try:
        parts = chosen(args.only, args.begin)
        record = Record.open(args.output or folder_of(machine.ask_driver().get("name", "GPU")))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.dry_run:
        print(plan(parts, record, minutes=args.minutes, again=bool(args.only) or args.again))
        return 0
    if not machine.has_gpu():
        print(
            "gpu-check: no NVIDIA GPU on this machine (no /dev/nvidia0); what it would run: make gpu-check GPU_CHECK_ARGS=--dry-run",
            file=sys.stderr,
        )
        return 2
    here, there = machine.ask_driver().get("name"), record.machine.get("gpu")
    if here and there and here != there:
        print(f"gpu-check: {record.folder} is of a {there}, this machine has a {here}; give another --output", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_parts(parts, record, seconds=args.minutes * 60, again=bool(args.only) or args.again)
    except KeyboardInterrupt:
        print("interrupted; the parts that are done stay done", file=sys.stderr)
        return 1
    found = report.verdicts(record)
    shorts = report.shortfalls(found, ROOT)
    print("\n".join(["", *report.open_bars(found), *(shorts or ["nothing that was measured fell short of its bar"])]))
    print(f"{record.folder / report.FILE}")
    return report.exit_code(record, found)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"these alone, also if they are done: {names}")
    parser.add_argument("--from", dest="begin", metavar="PART", help="leave out what comes before")
    parser.add_argument("--again", action="store_true", help="also the parts that are done")
    parser.add_argument("--minutes", type=float, default=9.0, help="for the whole call (default: 9); the next call goes on")
    parser.add_argument(
        "--output", type=Path, help="folder of the record (default: docs/results/gpu/NAME-DATE); give it to go on another day"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    return parser.parse_args(words)


def chosen(only: Sequence[str] | None, begin: str | None) -> list[Part]:
    """Raises ValueError for a part that is none. `machine` is always among them: the others are judged by it."""
    names = [part.name for part in PARTS]
    for name in [*(only or []), *filter(None, [begin])]:
        if name not in names:
            raise ValueError(f"gpu-check: {name!r} is no part; the parts are {', '.join(names)}")
    first = names.index(begin) if begin else 0
    return [part for number, part in enumerate(PARTS) if part.name == "machine" or (number >= first and (not only or part.name in only))]


def folder_of(gpu: str) -> Path:
    """docs/results/gpu/NVIDIA-H200-2026-11-26."""
    return ROOT / "docs" / "results" / "gpu" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', gpu).strip('-')}-{today()}"


def plan(parts: Sequence[Part], record: Record, *, minutes: float, again: bool) -> str:
    commit = git_commit(ROOT)
    lines = [
        f"into {record.folder}, at most {minutes:g} minutes a call; all limits together {sum(part.limit for part in parts) / 60:.1f} minutes"
    ]
    for part in parts:
        state = (
            "done before"
            if record.is_done(part.name, commit) and not (again or part.always)
            else part.lacking(record.machine) or f"at most {part.limit:.0f} s"
        )
        lines.append(f"{part.name:13s} {part.title} ({state})")
        lines.append(f"{'':13s} {' '.join(part.command)}")
    return "\n".join(lines)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
