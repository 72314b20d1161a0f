"""Going on with a run: what must be as it was, what may change and is said, and that one run at a time writes to its folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_opd.config import TrainerConfig
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import CheckpointError, UserError
from megatron_opd.train.batches import BatchSource

LOCK_FILE = ".lock"
_LOCK_SECONDS = 60.0  # a run that was asked to stop may still be saving when its successor starts
# Settings that decide which rollouts are in which step, and the one that decides how the optimizer's state is laid out.
_FIXED = ("seed", "global_batch", "max_response_tokens", "teacher", "distributed_optimizer")
_PATHS = {"init", "store", "output", "allow_incomplete", "allow_teacher_mismatch", "allow_stop_mismatch"}


def fixed_settings(config: TrainerConfig, source: BatchSource) -> dict[str, Any]:
    """What can't change between a run and its resume, for the checkpoint; data are known by their content, wherever they lie."""
    settings = {key: getattr(config, key) for key in _FIXED if hasattr(config, key)}
    return settings | {"num_rollouts": len(source.reader), "store": content_of(source.reader, source.teacher)}


def content_of(reader: StoreReader, teacher: str | None) -> str:
    """Hash of the checksums of a store's arrays, with those of `teacher`'s scores."""
    sums = []
    for part in sorted(reader.parts):
        record = reader.score_manifest(part, teacher) if teacher else None
        sums.append([part, reader.parts[part].crc32c, record.crc32c if record else {}])
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def free_settings(config: TrainerConfig) -> dict[str, Any]:
    """What may change, for the checkpoint: so that a resumed run can say what did."""
    return config.model_dump(mode="json", exclude=_PATHS | set(_FIXED))


def check_fixed(checkpoint: Path, state: dict[str, Any], now: dict[str, Any], store: str) -> None:
    """Raise CheckpointError if a checkpoint's state is of a run with other data or another layout of the optimizer's state."""
    before = state.get("fixed")
    if not isinstance(before, dict):
        raise CheckpointError(
            f"{checkpoint}: its state has no field 'fixed'; point 'latest' to another step folder, or take another output"
        )
    for key, value in now.items():
        if before.get(key) != value:
            what = f"{key} = {before.get(key)!r}, now {value!r}"
            if key == "store":
                what = f"other rollouts or scores than {store} has now"
            raise CheckpointError(f"{checkpoint}: made with {what}; a resumed run can't change that: use it as it was, or another output")


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """'lr 0.001 -> 1e-05' for each setting that is not what it was."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old} -> {new}")
    return found


class OutputLock:
    """Held by one run on its output folder, on this host or through the file system on others, until it ends, however it ends."""

    def __init__(self, output: Path, *, wait_seconds: float = _LOCK_SECONDS):
        self.path, self.wait_seconds = output / LOCK_FILE, wait_seconds
        self._file: Any = None

    def acquire(self) -> None:
        """Raises UserError naming the holder if it does not end in time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+")
        end = time.monotonic() + self.wait_seconds
        while True:
            try:
                # Of this process alone: a writer of a checkpoint, forked from it, does not go on holding it.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    self._file.seek(0)
                    raise UserError(
                        f"{self.path.parent}: another run writes there ({self._file.read().strip() or 'it does not say which'}); "
                        "wait until it has ended, end it, or take another output"
                    ) from None
                time.sleep(0.5)
        self._file.truncate(0)
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
