"""A run's folder: one run at a time writes to it, and what a resume changed is written down there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import read_jsonl, write_jsonl
from megatron_opd.errors import UserError
from megatron_opd.safety.durable import file_system, make_folder
from megatron_opd.train.identity import Resumption

LOCK_FILE = ".lock"
HISTORY_FILE = "history.jsonl"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_LOCK_SECONDS = 60.0  # a run that was asked to stop may still be saving when its successor starts


def write_history(output: Path, going: Resumption) -> None:
    """Put what changed at this resume, with its step, into the folder's history; rows of steps that are made again are cut first."""
    path = output / HISTORY_FILE
    rows = [row for row in read_jsonl(path, number="after_step") if row["after_step"] < going.step]
    changed = {key: found for key, found in (("objective", going.new), ("settings", going.settings)) if found}
    if changed:
        rows.append({"after_step": going.step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **changed})
    if rows or path.exists():
        write_jsonl(path, rows)


class OutputLock:
    """Held by one run on its output folder, on this host or through the file system on others, until it ends, however it ends."""

    def __init__(self, output: Path, *, wait_seconds: float = _LOCK_SECONDS):
        self.path, self.wait_seconds = output / LOCK_FILE, wait_seconds
        self._file: Any = None

    def acquire(self) -> None:
        """Raises UserError naming the holder if it does not end in time, and where the file system has no locks."""
        make_folder(self.path.parent)
        self._file = self.path.open("a+", encoding="utf-8")
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
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise UserError(
                    f"{self.path.parent}: nothing can be locked there ({file_system(self.path.parent)}: {error.strerror}), so two runs could "
                    "write there at once; mount it with locks (Lustre: flock; NFS: not nolock, and lockd runs), or take another output"
                ) from None
        self._file.truncate(0)
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
