"""What was found so far: one JSON file, which is also what a later call goes on from."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

# cut: the time of the whole call was over before its own limit; not run: something that it needs is not on this machine.
Status = Literal["done", "failed", "timed out", "cut", "not run", "to do"]
FILE = "record.json"


@dataclass
class PartRecord:
    """One part: how it ended, its program's numbers (`result`), and of a failed one the end of its output."""

    status: Status
    reason: str = ""
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    commit: str = ""
    clocks: dict[str, str] = field(default_factory=dict)  # nvidia-smi's before and after
    result: Any = None
    tail: str = ""


@dataclass
class Record:
    """All parts, in a folder of one GPU and day."""

    folder: Path
    machine: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, PartRecord] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Record:
        """What `folder` has; empty where there is none. Raises ValueError for a file that is no such record."""
        path = folder / FILE
        if not path.exists():
            return cls(folder)
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, known["machine"], {name: PartRecord(**values) for name, values in known["parts"].items()})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a record of gpu-check ({error}); move it away, or give another --output") from None

    def save(self) -> None:
        """The file appears whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"machine": self.machine, "parts": {name: vars(part) for name, part in self.parts.items()}}
        temporary = self.folder / f".{FILE}.tmp"
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / FILE)

    def is_done(self, name: str, commit: str) -> bool:
        """Whether the part ran to its end, with this code."""
        part = self.parts.get(name)
        return part is not None and part.status == "done" and part.commit == commit

    def result(self, name: str) -> Any:
        """The numbers of a part that is done, else None."""
        part = self.parts.get(name)
        return part.result if part is not None and part.status == "done" else None


def git_commit(root: Path) -> str:
    """The commit, with a mark if tracked files differ from it; what GPU_CHECK_COMMIT says, for a copy whose git does not; else "unknown"."""
    if given := os.environ.get("GPU_CHECK_COMMIT"):
        return given
    try:
        options: dict[str, Any] = {"cwd": root, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changed else commit


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
