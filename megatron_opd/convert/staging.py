"""Directories that appear whole: filled under a hidden name, renamed at the end; what killed processes left is removed."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.errors import UserError


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `target` at the end, or is removed after an error.

    Raises UserError if `target` holds something already.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; choose another directory, or remove it")
    for leftover in _leftovers(target):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = target.with_name(f"{_prefix(target)}{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        yield staging
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def not_written(path: Path, error: object) -> UserError:
    """For errors of libraries that name neither file nor room."""
    free = shutil.disk_usage(path.parent).free / 2**20
    return UserError(f"{path} could not be written: {error} ({free:.1f} MiB are free there); make room, or choose another directory")


def _prefix(target: Path) -> str:
    # A process id says nothing on another host that shares the disk.
    return f".{target.name}.{socket.gethostname()}-"


def _leftovers(target: Path) -> list[Path]:
    """Folders of conversions to `target` whose processes, on this host, have ended; those of other hosts are not judged."""
    prefix = _prefix(target)
    found = []
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        process = path.name.removeprefix(prefix).removesuffix(".tmp")
        if path.name == f"{prefix}{process}.tmp" and process.isdecimal() and not _is_alive(int(process)):
            found.append(path)
    return found


def _is_alive(process: int) -> bool:
    """This process counts as dead: what has its id and is there before it began is of an earlier one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
