"""Sizes and CRC-32C of a checkpoint's files: Megatron's format has none, and would load changed bytes as other weights.

The record covers every file beside it, and itself. Who a checkpoint is follows from its data files alone, the side files tell it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from megatron_opd.errors import CheckpointError, DamagedCheckpoint, UserError
from megatron_opd.safety.durable import write_file, write_json
from megatron_opd.safety.untrusted import load_json, read_bytes

CHECKSUM_FILE = "opd_checksums.json"  # {"data": {file: [bytes, CRC-32C]}, "side": {...}, "crc32c": of both}; older: the first alone
NO_CHECKSUMS = "has no checksums (an older version wrote it); its files are not checked"
NO_SIDE_CHECKSUMS = "has no checksums of its side files (an older version wrote it); these are not checked"
_BLOCK = 16 << 20
Sums = dict[str, tuple[int, int]]


class Record(NamedTuple):
    """`data` are the files of tensors and their index; `side` what travels with them, None where an older version wrote the record."""

    data: Sums
    side: Sums | None


def sum_files(folder: Path, names: Iterable[str]) -> Sums:
    """name -> (bytes, CRC-32C) of files, read in blocks by a few threads. Raises OSError."""
    names = sorted(names)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(_sum_file, (folder / name for name in names)), strict=True))


def _sum_file(path: Path) -> tuple[int, int]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        for block in iter(partial(file.read, _BLOCK), b""):
            size, checksum = size + len(block), google_crc32c.extend(checksum, block)
    return size, checksum


def write_part(folder: Path, part: int, sums: Sums) -> None:
    """Put down the sums of the files that one writer has made, for `collect_sums`."""
    write_json(folder / f".{part}.{CHECKSUM_FILE}", sums)


def collect_sums(folder: Path) -> Sums:
    """The sums of the data files: those that the writers of tensors put down, and of the small files that are left.

    Raises CheckpointError if a writer put down none.
    """
    sums: Sums = {}
    for part in folder.glob(f".*.{CHECKSUM_FILE}"):
        sums |= {name: (size, checksum) for name, (size, checksum) in json.loads(part.read_text(encoding="utf-8")).items()}
        part.unlink()
    left = [path.name for path in folder.iterdir() if path.is_file() and path.name not in sums]
    if lacking := [name for name in left if name.endswith(".distcp")]:
        raise CheckpointError(f"the process that wrote {', '.join(sorted(lacking)[:5])} ended before it had checked what it wrote")
    return sums | sum_files(folder, left)


def record_checksums(folder: Path, data: Sums) -> None:
    """Write the record, of `data` and of all other files; the last file of a checkpoint."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    write_file(folder / CHECKSUM_FILE, _text(data, sum_files(folder, set(names) - {CHECKSUM_FILE, *data})))


def _text(data: Sums, side: Sums) -> str:
    content = {"data": data, "side": side}
    checksum = google_crc32c.value(json.dumps(content, sort_keys=True).encode())
    return json.dumps(content | {"crc32c": checksum}, indent=2, sort_keys=True) + "\n"


def id_of(data: Sums) -> str:
    """A hash of sizes and checksums."""
    return hashlib.sha256(json.dumps(sorted(data.items())).encode()).hexdigest()[:16]


def content_id(checkpoint: Path) -> str | None:
    """Who a checkpoint is, wherever it lies: a hash of the sizes and checksums that were recorded. None if nothing was. Raises CheckpointError."""
    record = read_record(checkpoint)
    return None if record is None else id_of(record.data)


def check_files(checkpoint: Path, *, share: int = 0, shares: int = 1, largest: int | None = None) -> Record | None:
    """Compare the files with what was recorded: of all the size, of each `shares`-th (of at most `largest` bytes) the checksum.

    Returns the record, None if nothing was recorded. Raises DamagedCheckpoint naming the file.
    """
    record = read_record(checkpoint)
    if record is None:
        return None
    wanted = record.data | (record.side or {})
    for name, (size, _) in sorted(wanted.items()):
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if (found := path.stat().st_size) != size:
            raise DamagedCheckpoint(f"{path} has {found} bytes, but {size} were written")
    mine = [name for name in sorted(wanted) if largest is None or wanted[name][0] <= largest][share::shares]
    try:
        sums = sum_files(checkpoint, mine)
    except OSError as error:  # a sector that can't be read
        raise DamagedCheckpoint(f"{error.filename or checkpoint} can't be read ({error.strerror})") from None
    for name, found in sums.items():
        if found != wanted[name]:
            raise DamagedCheckpoint(f"{checkpoint / name} is damaged: its checksum is not that of what was written")
    return record


def said_of(checkpoint: Path, record: Record | None) -> str | None:
    """What is not checked of a checkpoint that an older version wrote."""
    if record is None:
        return f"{checkpoint} {NO_CHECKSUMS}"
    return f"{checkpoint} {NO_SIDE_CHECKSUMS}" if record.side is None else None


def read_record(checkpoint: Path) -> Record | None:
    """What was recorded, None if nothing was. Raises DamagedCheckpoint for a record that is not as it was written."""
    path = checkpoint / CHECKSUM_FILE
    try:
        text = read_bytes(path)
        content = load_json(text, str(path))
        if "data" not in content:
            return Record(_sums(content), None)
        record = Record(_sums(content["data"]), _sums(content["side"]))
    except FileNotFoundError:
        return None
    except (OSError, UserError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} can't be read ({error})") from None
    if _text(record.data, record.side or {}).encode() != text:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is not that of what was written")
    return record


def _sums(content: dict[str, list[int]]) -> Sums:
    """Raises ValueError and its like for what is none."""
    sums = {}
    for name, (size, checksum) in content.items():
        if type(size) is not int or type(checksum) is not int or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{name!a}: {size!r}, {checksum!r}")
        sums[name] = (size, checksum)
    return sums
