"""What a stage cost: wall time, tokens, GPU hours; one JSON row a run of a stage, appended to run_dir/stages.jsonl."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass
class StageCost:
    """Context manager; `tokens` is counted up by the stage. The row is written also when the stage fails, with its error."""

    run_dir: str | Path
    stage: str
    num_gpus: int = 0
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> StageCost:
        self._start = time.time()
        return self

    def seconds(self) -> float:
        """Wall time so far."""
        return time.time() - self._start

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None and not self.tokens:
            return  # nothing was left to do
        seconds = self.seconds()
        row = {
            "stage": self.stage,
            "started": self._start,
            "seconds": seconds,
            "tokens": self.tokens,
            "gpu_hours": seconds * self.num_gpus / 3600,
        }
        row |= self.facts | ({"error": f"{type(error).__name__}: {error}"} if error is not None else {})
        try:
            append_jsonl(Path(self.run_dir) / "stages.jsonl", row)
        except OSError:
            if error is None:  # on a full disk the stage's own error is the one to show
                raise


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row on a line of its own, also after a line that a kill or a full disk cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        start = b"\n" if file.read(1) not in (b"", b"\n") else b""
        file.write(start + json.dumps(row).encode() + b"\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def provenance() -> dict[str, Any]:
    """Versions and time for manifests."""
    versions = {}
    for package in ("megatron-opd", "megatron-core", "torch", "transformers", "sglang", "transformer-engine", "zarr"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    record: dict[str, Any] = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions}
    if commit := git_commit():
        record["git_commit"] = commit
    return record


def git_commit(checkout: Path = Path(__file__).resolve().parent.parent) -> str | None:
    """Commit of the checkout that this package lies in; OPD_GIT_COMMIT in images that have no checkout."""
    git = checkout / ".git"
    try:
        text = (git / "HEAD").read_text().strip()
        if not text.startswith("ref: "):
            return text
        ref = text.removeprefix("ref: ")
        if (git / ref).exists():
            return (git / ref).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()  # where `git gc` puts them
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return os.environ.get("OPD_GIT_COMMIT")
