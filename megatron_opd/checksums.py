"""Sizes and CRC-32C of a checkpoint's data files: Megatron's format has none, and would load changed bytes as other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import google_crc32c

from megatron_opd.durable import write_json
from megatron_opd.errors import CheckpointError

CHECKSUM_FILE = "opd_checksums.json"  # file -> [bytes, CRC-32C]
NO_CHECKSUMS = "has no checksums (an older version wrote it); its files are not checked"
_REMEDY = "use another step folder (a run goes on from the one whose name is in 'latest' beside them)"
_BLOCK = 16 << 20
Sums = dict[str, tuple[int, int]]


def sum_files(paths: Iterable[Path]) -> Sums:
    """name -> (bytes, CRC-32C) of files, read in blocks by a few threads."""
    paths = list(paths)
    with ThreadPoolExecutor(4) as pool:
        return {path.name: found for path, found in zip(paths, pool.map(_sum_file, paths), strict=True)}


def _sum_file(path: Path) -> tuple[int, int]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        for block in iter(partial(file.read, _BLOCK), b""):
            size, checksum = size + len(block), google_crc32c.extend(checksum, block)
    return size, checksum


def write_part(folder: Path, part: int, sums: Sums) -> None:
    """Put down the sums of the files that one writer has made, for `record_checksums`."""
    write_json(folder / f".{part}.{CHECKSUM_FILE}", sums)


def record_checksums(folder: Path) -> None:
    """Write the sums of all files in `folder`: those that the writers of tensors put down, and of the small files that are left.

    Raises CheckpointError if a writer put down none.
    """
    sums: Sums = {}
    for part in folder.glob(f".*.{CHECKSUM_FILE}"):
        sums |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    left = [path for path in folder.iterdir() if path.is_file() and path.name not in sums]
    if lacking := [path.name for path in left if path.suffix == ".distcp"]:
        raise CheckpointError(f"the process that wrote {', '.join(sorted(lacking)[:5])} ended before it had checked what it wrote")
    write_json(folder / CHECKSUM_FILE, sums | sum_files(left))


def content_id(checkpoint: Path) -> str | None:
    """Who a checkpoint is, wherever it lies: a hash of the sizes and checksums that were recorded. None if nothing was. Raises CheckpointError."""
    sums = _recorded(checkpoint)
    return None if sums is None else hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()[:16]


def check_files(checkpoint: Path, *, share: int = 0, shares: int = 1) -> bool:
    """Compare the files with what was recorded: of all the size, of each `shares`-th the checksum. False if nothing was recorded.

    Raises CheckpointError naming the file.
    """
    wanted = _recorded(checkpoint)
    if wanted is None:
        return False
    for name, (size, _) in sorted(wanted.items()):
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_REMEDY}")
        if (found := path.stat().st_size) != size:
            raise CheckpointError(f"{path} has {found} bytes, but {size} were written; {_REMEDY}")
    mine = sorted(wanted)[share::shares]
    for name, found in sum_files(checkpoint / name for name in mine).items():
        if found != wanted[name]:
            raise CheckpointError(f"{checkpoint / name} is damaged: its checksum is not that of what was written; {_REMEDY}")
    return True


def _recorded(checkpoint: Path) -> Sums | None:
    record = checkpoint / CHECKSUM_FILE
    try:
        return {name: (int(size), int(checksum)) for name, (size, checksum) in json.loads(record.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{record} can't be read ({error}); {_REMEDY}") from None
