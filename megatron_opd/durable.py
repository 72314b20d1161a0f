"""How everything is published: written under a hidden name, on disk with its directory, and only then renamed into place.

What a reader finds under its name is whole, also after a power cut; a process that is killed leaves a hidden file, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EACCES)


def write_json(path: str | Path, value: Any) -> None:
    """Publish `value` as JSON at `path`; what stood there is replaced."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def write_file(path: str | Path, content: bytes | str, *, exclusive: bool = False) -> bool:
    """Publish `content` (text as UTF-8, line ends as they are) at `path`; what stood there is replaced.

    With `exclusive`, returns False and leaves the file as it is if there is one already; of several writers exactly one gets True. Raises OSError.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        with open_new(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if exclusive and not _link(temporary, path):
            return False
        if not exclusive:
            os.replace(temporary, path)
    sync(path.parent)
    return True


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
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here (exFAT, some network file systems). A folder can be made by one alone: who makes it looks, and renames.
        claim = path.with_name(f".{path.name}.claim")
        try:
            claim.mkdir()
        except FileExistsError:
            return False
        try:
            if path.exists():
                return False
            os.rename(temporary, path)
        finally:
            claim.rmdir()
    return True


def publish_folder(staging: str | Path, target: str | Path) -> None:
    """Put a finished folder in its place, which must be free or an empty folder. Raises OSError."""
    sync_tree(staging)
    os.rename(staging, target)
    sync(Path(target).parent)


def sync_tree(folder: str | Path) -> None:
    """Everything below `folder` is on disk: files, then the directories that name them."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)


def sync(path: str | Path) -> None:
    """A file's content, or a directory's names, are on disk. Raises OSError; a file system that can't do it for directories is let go."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
