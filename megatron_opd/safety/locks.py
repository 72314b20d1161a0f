"""A lock that one process holds, on this host or through the file system on others, until it ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.safety.durable import file_system, make_folder

_FOLDER_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_WAIT_SECONDS = 60.0  # a run that was asked to stop may still be saving when its successor starts


class Lock:
    """On what is written to by one process at a time: a folder, or a file.

    A folder's lock is its `.lock`, a file's is `.NAME.lock` beside it. The lock is of the process: children do not go on holding it, and
    the process itself may take it twice. A context manager; raises UserError as `acquire` does.
    """

    def __init__(self, path: Path, *, of_file: bool = False, wait_seconds: float = _WAIT_SECONDS):
        self.path = path.with_name(f".{path.name}.lock") if of_file else path / _FOLDER_LOCK
        self.wait_seconds, self._locked = wait_seconds, path
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
                        f"{self._locked}: another run writes there ({self._file.read().strip() or 'it does not say which'}); "
                        "wait until it has ended, end it, or take another output"
                    ) from None
                time.sleep(0.5)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise UserError(
                    f"{self._locked}: nothing can be locked there ({file_system(self.path.parent)}: {error.strerror}), so two runs could "
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

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()
