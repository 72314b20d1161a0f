"""How everything is published: written under a hidden name, on disk with its directory, and only then renamed into place.

What a reader finds under its name is whole, also after a power cut; a process that is killed leaves a hidden file, nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from megatron_opd.errors import UserError

# What a file system says that has no hard links, or no rename that replaces nothing.
_NOT_SUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EACCES)
_CLAIM_SECONDS = 10.0  # between looking and renaming pass microseconds; a network file system may be slow


def write_json(path: str | Path, value: Any) -> None:
    """Publish `value` as JSON at `path`; what stood there is replaced."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def write_file(path: str | Path, content: bytes | str, *, exclusive: bool = False) -> bool:
    """Publish `content` (text as UTF-8, line ends as they are) at `path`; what stood there is replaced.

    With `exclusive`, returns False and leaves the file as it is if there is one already; of several writers exactly one gets True. Raises OSError.
    """
    path = Path(path)
    with _naming(path), _temporary(path) as temporary:
        with open_new(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if exclusive and not _link(temporary, path):
            return False
        if not exclusive:
            os.replace(temporary, path)
    _sync_parent(path)
    return True


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """An OSError says this name: those of a write or an fsync have none, others a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that nobody can guess; nothing is left of it at the end."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def open_new(path: Path) -> IO[bytes]:
    """A file that wasn't there, nor a link of its name, for writing."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def _link(temporary: Path, path: Path) -> bool:
    """Give a file its name, unless that is taken."""
    for give_name in (os.link, _rename_to_free):
        try:
            give_name(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        else:
            return True
    return _rename_under_claim(temporary, path)


def _rename_to_free(temporary: Path, path: Path) -> None:
    """Linux's rename that replaces nothing, for file systems without hard links (exFAT, some network file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, replace_nothing = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    failed = rename is None or rename(here, os.fsencode(temporary), here, os.fsencode(path), replace_nothing)
    if failed:
        number = errno.ENOSYS if rename is None else ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def _rename_under_claim(temporary: Path, path: Path) -> bool:
    """Where there is neither: a folder can be made by one alone; who makes it looks, and renames. Raises UserError if it stays."""
    claim = path.with_name(f".{path.name}.claim")
    end = time.monotonic() + _CLAIM_SECONDS
    while not os.path.lexists(path):
        try:
            claim.mkdir()
        except FileExistsError:
            if time.monotonic() > end:
                raise UserError(
                    f"{path}: {claim} is in the way; it is another process that makes this file, or one that was killed left it "
                    f"({file_system(path.parent)} has neither hard links nor renames that replace nothing); if none is at work, remove that folder"
                ) from None
            time.sleep(0.01)
            continue
        try:
            if not os.path.lexists(path):
                os.rename(temporary, path)
                return True
        finally:
            claim.rmdir()
    return False


def file_system(path: str | Path) -> str:
    """Type and mount point of the file system of `path`, for people."""
    place, found = os.path.realpath(path), ("the file system", "")
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for _, folder, kind, *_ in (line.split(" ") for line in mounts):
            if len(folder) >= len(found[1]) and os.path.commonpath([place, folder]) == folder:
                found = kind, folder
    return " at ".join(filter(None, found))


def make_folder(path: str | Path) -> None:
    """The folder is there and on disk, with those above it that were not. Raises OSError."""
    path = Path(path)
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_parent(folder)


def publish_folder(staging: str | Path, target: str | Path) -> None:
    """Put a finished folder in its place, which must be free or an empty folder. Raises OSError."""
    sync_tree(staging)
    os.rename(staging, target)
    _sync_parent(Path(target))


def _sync_parent(path: Path) -> None:
    """Some folders may be written and not opened (drwx-wx--t); what is in them is as durable as their file system makes it."""
    with contextlib.suppress(PermissionError):
        sync(path.parent)


def sync_tree(folder: str | Path) -> None:
    """Everything below `folder` is on disk: files, then the directories that name them. Raises OSError."""
    for parent, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)


def _raise(error: OSError) -> NoReturn:
    raise error


def sync(path: str | Path) -> None:
    """A file's content, or a directory's names, are on disk. Raises OSError; a file system that can't do it for directories is let go."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
