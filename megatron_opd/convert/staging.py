"""Directories that appear whole: filled under a hidden name, published at the end; what killed processes left is removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.convert.written import same_content
from megatron_opd.errors import UserError
from megatron_opd.safety.durable import make_folder, publish_folder


class AlreadyMade(UserError):
    """Another process made the directory meanwhile, with the same content: nothing is wrong."""


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `target` at the end, on disk with all that is in it, or is removed after an error.

    Raises UserError if `target` holds something already; AlreadyMade if that came meanwhile and is what was to be made.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; choose another directory, or remove it")
    place = Path(os.path.realpath(target))  # an empty folder may stand behind a link
    make_folder(place.parent)
    for leftover in _leftovers(place):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = place.with_name(f"{_prefix(place)}{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir()
    held = os.open(staging, os.O_RDONLY)
    try:
        _hold(held)
        yield staging
        try:
            publish_folder(staging, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or not place.exists():
                raise
            if same_content(staging, place):
                raise AlreadyMade(f"{target} is there already: another process made it meanwhile, with the same content") from None
            raise UserError(
                f"{target}: another process made it meanwhile, with other content, which is kept; what this one made is dropped: "
                "choose another directory, or remove that one and start again"
            ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(held)


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
    for path in target.parent.iterdir():
        process = path.name.removeprefix(prefix).removesuffix(".tmp").partition("-")[0]  # older versions put nothing behind it
        ours = path.name.startswith(f"{prefix}{process}") and path.name.endswith(".tmp") and process.isdecimal()
        if ours and not _is_alive(int(process)) and not _is_held(path):
            found.append(path)
    return found


def _is_alive(process: int) -> bool:
    """This process counts as dead: what has its id may be there from before it began."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _is_held(folder: Path) -> bool:
    """Whether a living process fills the folder: one in another container has no process id here, or this process's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _hold(descriptor)
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> bool:
    """Take the lock, which ends with its process; False if another has it. Where there are no locks, the process ids alone tell."""
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
