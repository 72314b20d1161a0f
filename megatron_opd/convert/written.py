"""What a conversion wrote, by size and checksum, so that it is known again: after a power cut, and beside another conversion's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.checksums import CHECKSUM_FILE, Sums, sum_files
from megatron_opd.checkpoints.saved import STATE_FILE
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import CACHE_FILE, ORIGIN_FILE
from megatron_opd.safety.untrusted import read_object

# They hold times, versions or random names: two conversions of one model differ in them.
_OF_ONE_CONVERSION = (ORIGIN_FILE, CACHE_FILE, STATE_FILE, CHECKSUM_FILE, ".metadata")


def sum_folder(folder: Path) -> Sums:
    """Path below `folder` -> (bytes, CRC-32C) of each file, but for those that say who converted, and when."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in _OF_ONE_CONVERSION)
    return sum_files(folder, (path.relative_to(folder).as_posix() for path in paths))


def same_content(left: Path, right: Path) -> bool:
    """Whether two conversions made the same."""
    return right.is_dir() and sum_folder(left) == sum_folder(right)


def read_sums(record: Any) -> Sums | None:
    """The sums in a converted directory's ORIGIN_FILE; None for an older version's. Raises ValueError, TypeError or AttributeError."""
    files = record.get("files")
    return None if files is None else {str(name): (int(size), int(checksum)) for name, (size, checksum) in files.items()}


def read_origin(target: Path) -> dict[str, Any] | None:
    """What `target` was converted from, None if that is not recorded. Raises UserError."""
    path = target / ORIGIN_FILE
    try:
        origin = read_object(path)
        read_sums(origin)
        return origin | {key: origin[key] for key in ("step", "content", "checkpoint")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} can't be read ({error}); remove this file, and the weights are compared instead") from None


def check_written(folder: Path, wanted: Sums) -> None:
    """Compare files with what was written. Raises UserError naming the first that is other; further files may be there."""
    found = sum_folder(folder)
    for name, (size, checksum) in sorted(wanted.items()):
        if found.get(name) != (size, checksum):
            if name not in found:
                what = "is missing"
            elif found[name][0] != size:
                what = f"has {found[name][0]} bytes, but {size} were written"
            else:
                what = "is not what was written: its checksum is another"
            raise UserError(
                f"{folder / name} {what}; move {folder} away and convert again (if you changed the file yourself, and mean it: "
                f"remove {folder / ORIGIN_FILE}, and the weights are compared instead)"
            )
