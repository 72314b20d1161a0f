"""Where prompts stand: the data files of a path (a file, or a Hugging Face dataset's folder), and their rows as plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_opd.errors import UserError
from megatron_opd.safety.untrusted import load_json, open_file, read_bytes, read_json

_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")  # of a folder's files those of the first kind that is there
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_OTHER_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".xml", ".feather", ".orc", ".avro")
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS: dict[str, str] = dict.fromkeys(("train", "training"), "train")
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
Split = Literal["train", "test"]
# What of a folder with several splits is read, the first that is there: to sample for training, and to evaluate.
_WANTED: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "train")}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")
_NUMBERED = re.compile(r"(part|shard|chunk)?[-_]?\d+")
_DIGITS = "0123456789"
_EXPECTED = "a JSONL or Parquet file or a dataset's folder is expected"
_BATCH_ROWS, _BATCH_BYTES = 1024, 64 << 20
_LARGEST_LINE, _LARGEST_ARRAY = 256 << 20, 1 << 30  # bytes; a row of LiveCodeBench has its tests, tens of MiB. Larger arrays are for JSONL
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """`where` it stands, for messages; its plain value; for JSON, what gives it again with decimals as the text they are written as."""

    where: str
    value: Any
    as_written: Callable[[], Any] | None = None


@dataclass(frozen=True)
class PromptSource:
    """The files of a path, in order, and one line that says what was taken and what was left."""

    files: list[Path]
    note: str


def find_files(path: str | Path, split: Split = "train") -> PromptSource:
    """The data files of a path: the file itself, or one split of a dataset's folder.

    Of several splits `train` is read, and for `split` "test" (an evaluation) the first of test, validation, train that is there; a folder's
    only split is read whatever it is. A split or a configuration is a whole path component, or (a split) a whole word of a file's name, in
    any case, with a number behind it or without (LiveCodeBench: test.jsonl, test2.jsonl). Hidden files and folders are not read.
    Raises UserError where more than one configuration, or several splits but none of those, are there.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return PromptSource([path], str(path))
        return _find_in(path, split)
    except OSError as error:
        raise UserError(f"{error.filename or path}: can't be read: {error.strerror}") from None


def _find_in(path: Path, split: Split) -> PromptSource:
    if (path / "dataset_dict.json").is_file():
        splits = _names_in(path / "dataset_dict.json", "splits", lambda entry: entry)
        kinds = {kind: name for name in reversed(splits) if (kind := _SPLITS.get(name.lower())) is not None}
        taken = next((kinds[kind] for kind in (_WANTED[split] if len(splits) > 1 else kinds) if kind in kinds), None)
        if taken is None:
            raise UserError(f"{path} holds the splits {', '.join(splits)}; give the folder of one: {path / splits[0]}")
        source = find_files(path / taken)
        return PromptSource(source.files, source.note + (f"; of the splits {', '.join(splits)}" if len(splits) > 1 else ""))
    if (path / "state.json").is_file():  # written by save_to_disk, which says which files and in which order
        names = _names_in(path / "state.json", "_data_files", lambda entry: entry["filename"])
        return PromptSource([path / name for name in names], f"{path}: {_shorten(names)}")
    return _pick(path, split)


def read_rows(path: str | Path, split: Split = "train") -> Iterator[Row]:
    """Rows of a file or folder, `split` as in `find_files`. Raises UserError naming file and row."""
    for file in find_files(path, split).files:
        suffix = file.suffix.lower()
        if suffix in _COMPRESSED:
            raise UserError(f"{file}: compressed files are not read; unpack it, and give the file that comes out")
        if suffix in _OTHER_TABLES:
            raise UserError(f"{file}: {suffix} files are not read; {_EXPECTED}: convert it, so that each row has a field for each column")
        yield from _arrow_rows(file) if suffix in (".parquet", ".arrow") else _json_rows(file)


def _names_in(listing: Path, key: str, name_of: Callable[[Any], Any]) -> list[str]:
    """File or folder names that a dataset's JSON file lists under `key`. Raises UserError."""
    try:
        value = read_json(listing, unique=True)
    except OSError as error:
        raise UserError(f"{listing}: can't be read: {error.strerror}") from None
    entries = value.get(key) if isinstance(value, dict) else None
    try:
        names = [name_of(entry) for entry in entries] if isinstance(entries, list) else []
    except (TypeError, KeyError):
        names = []
    if not names or not all(isinstance(name, str) and name.strip("./ ") and "\0" not in name for name in names):
        raise UserError(
            f"{listing}: {key!r} must be a list of names, not {entries!r:.100}; give the data file itself, or download it again"
        )
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{listing}: {key!r} names {name!r}, which is outside of the folder")
    return names


def _pick(folder: Path, split: Split) -> PromptSource:
    there = _walk(folder)
    by_suffix = {
        suffix: [name for name in there if name.suffix.lower() == suffix and name.name not in _NO_DATA and not _is_cache(name)]
        for suffix in _SUFFIXES
    }
    files = next((names for names in by_suffix.values() if names), [])
    if not files:
        packed = [str(name) for name in there if name.suffix.lower() in _COMPRESSED]
        reason = f" (compressed ones are not read: {_shorten(packed)}; unpack them)" if packed else ""
        raise UserError(f"{folder}: no {', '.join(_SUFFIXES)} files in it{reason}; {_EXPECTED}")
    splits = {name: _split_of(name) for name in files}
    found = set(splits.values())
    chosen = next((kind for kind in _WANTED[split] if kind in found), None)
    if len(found) > 1 and chosen is None:
        names = ", ".join(sorted(kind or "files of no split" for kind in found))
        wanted = " or ".join(map(repr, _WANTED[split]))
        raise UserError(f"{folder} holds several splits and none is {wanted} ({names}); give one file or folder: {_shorten(files)}")
    taken = [name for name in files if splits[name] == chosen] if chosen is not None else files
    for what, groups in (("configurations", _group(taken, _configuration)), ("subsets", _group(taken, _subset))):
        if len(groups) > 1:
            example = next((f", such as {folder / group}" for group in groups if group.endswith("/") and group != "./"), "")
            raise UserError(f"{folder} holds several {what} ({', '.join(groups)}); give the folder or file of one{example}")
    note = f"{folder}: {_shorten(taken)}"
    if chosen is not None:
        note += f" (split {chosen})"
    if shards := _missing_shards(taken):
        note += f"; {shards}"
    left = [name for name in files if name not in set(taken)]
    left += [name for suffix, names in by_suffix.items() if suffix != files[0].suffix.lower() and suffix != ".json" for name in names]
    return PromptSource([folder / name for name in taken], note + (f"; not read: {_shorten(left)}" if left else ""))


def _walk(folder: Path) -> list[Path]:
    """Files below a folder that are not hidden, relative to it, in order; links are followed, and one that leads nowhere is a file."""

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [] if os.path.realpath(root) in seen else [name for name in folders if not name.startswith((".", "__"))]
        if os.path.realpath(root) not in seen:
            seen.add(os.path.realpath(root))
            found += [(Path(root) / name).relative_to(folder) for name in names if not name.startswith((".", "__"))]
    return sorted(found)


def _is_cache(name: Path) -> bool:
    return name.suffix.lower() == ".arrow" and name.name.startswith("cache-")  # of `Dataset.map`, beside the data


def _label(name: Path) -> str:
    """A file's name without suffix and shard number."""
    return _SHARD.sub("", name.stem.lower())


def _split_of(name: Path) -> str | None:
    """train, validation, test, or several where the words differ; None where no word says it."""
    words = [*(part.lower() for part in name.parts[:-1]), *(word.rstrip(_DIGITS) for word in re.split(r"[-_.\s]+", _label(name)))]
    return " and ".join(sorted({_SPLITS[word] for word in words if word in _SPLITS})) or None


def _configuration(name: Path) -> str:
    parts = [part for part in name.parts[:-1] if part.lower() not in _SPLITS and not _NUMBERED.fullmatch(part.lower())]
    return "/".join(parts) + "/" if parts else "./"


def _subset(name: Path) -> str:
    """The split as the dataset names it, for files that are shards of one (train_sft-00000-of-00003)."""
    return _label(name) if _SHARD.search(name.stem.lower()) else ""


def _group(names: list[Path], key: Callable[[Path], str]) -> list[str]:
    return sorted({key(name) for name in names})


def _missing_shards(names: list[Path]) -> str | None:
    found = [match for name in names if (match := _SHARD.search(name.stem.lower()))]
    wanted = int(found[0][2]) if found else 0
    return f"{len(found)} of {wanted} shards are there" if len(found) < wanted else None


def _shorten(names: list[Any]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]}, {shown[1]}, ... {shown[-1]} ({len(shown)} files)"


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        with open_file(path) as file:
            if path.suffix.lower() == ".json" and file.read(4096).removeprefix(_BOM).lstrip().startswith(b"["):
                if os.fstat(file.fileno()).st_size > _LARGEST_ARRAY:
                    raise UserError(f"{path}: an array of more than {_LARGEST_ARRAY >> 20} MiB; write it as JSONL, a row a line")
                yield from _array_rows(path, read_bytes(path, _LARGEST_ARRAY).removeprefix(_BOM))
                return
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(_LARGEST_LINE + 1), b""), start=1):
                where = f"{path}:{number}"
                if len(line) > _LARGEST_LINE:
                    raise UserError(
                        f"{where}: a line of more than {_LARGEST_LINE >> 20} MiB; a JSONL file has a row a line, an array is to be named .json"
                    )
                if number == 1:
                    if line.startswith(_GZIP):
                        raise UserError(f"{path}: is compressed with gzip; unpack it")
                    if line.startswith(_UTF16) and b"\0" in line:
                        raise UserError(f"{path}: is in UTF-16; convert it with: iconv -f UTF-16 -t UTF-8")
                    line = line.removeprefix(_BOM)
                if line.strip():
                    # What reaches the tokenizer is looked at later; half a character elsewhere in a row does no harm.
                    yield Row(
                        where, load_json(line, where, characters=False), partial(load_json, line, where, characters=False, parse_float=str)
                    )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such prompt file; {_EXPECTED}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r}: can't be read: {reason}") from None


def _array_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of a file that holds one JSON array."""
    values, written = load_json(data, str(path), characters=False), load_json(data, str(path), characters=False, parse_float=str)
    for number, (value, again) in enumerate(zip(values, written, strict=True), start=1):
        yield Row(f"{path}, row {number}", value, partial(lambda row: row, again))


def _arrow_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import ipc, parquet

    try:
        open_file(path).close()  # a FIFO would be waited for
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
            fitting = _BATCH_BYTES * file.metadata.num_rows // max(size, 1)
            schema, batches = file.schema_arrow, file.iter_batches(max(1, min(_BATCH_ROWS, fitting)))
        else:
            batches = ipc.open_stream(pa.memory_map(str(path)))  # save_to_disk writes streams
            schema = batches.schema
        if len(set(schema.names)) < len(schema.names):
            raise UserError(f"{path}: a column name is there twice ({', '.join(schema.names)})")
        number = 0
        for batch in batches:
            batch.validate(full=True)  # offsets beyond its memory
            for value in pa.RecordBatch.from_arrays([_readable(column) for column in batch.columns], batch.schema.names).to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", value)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such prompt file; {_EXPECTED}") from None
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: can't be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def _readable(column: Any) -> Any:
    """An Arrow column as Python can take it: narrow floats by the decimals that name them (0.1, not 0.10000000149), no nanoseconds."""
    import pyarrow as pa

    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        return column.cast(pa.string()).cast(pa.float64())
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column
