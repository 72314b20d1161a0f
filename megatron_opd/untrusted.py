"""Text that others wrote (recipes, prompts, model files, manifests, answers of servers), read within bounds of size, depth and type.

Whatever is wrong with it is one UserError that names the place.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError

DEEPEST = 100  # levels; tool schemas have about ten, and Python's own limit is about a thousand
LARGEST_JSON = 1 << 30  # bytes of a file; tokenizers of 256,000 tokens take about 40 MiB
LARGEST_TOML = 1 << 20
# A dotted key of so many pieces; tomllib takes the square of their number in memory.
_LONG_KEY = re.compile(rf"(?<![\w-])(?:(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')[ \t]*\.[ \t]*){{{DEEPEST + 1}}}")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def read_bytes(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """A file's content. Raises UserError for one that is too large or no file, FileNotFoundError and other OSErrors as they come."""
    path = Path(path)
    if not path.is_file() and path.exists():
        raise UserError(f"{path}: not a file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UserError(f"{path}: more than {largest >> 20} MiB, which no such file has")
    return content


def read_json(path: str | Path, *, unique: bool = False) -> Any:
    """The value of a JSON file. Raises UserError for what is none, OSError if it isn't there."""
    return load_json(read_bytes(path), str(path), unique=unique)


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError, OSError if it isn't there."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def load_json(text: bytes | str, where: str, *, unique: bool = True, **options: Any) -> Any:
    """The value of a JSON text in UTF-8; `options` are json.loads'.

    Raises UserError, also for more than DEEPEST levels, half of a surrogate pair and, with `unique`, a key that is there twice.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if "\0" in text:
            raise UserError(f"{where}: not JSON: holds NUL bytes; the file is damaged, or not in UTF-8")
        if unique:
            options["object_pairs_hook"] = _once
        value = json.loads(text, **options)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not JSON in UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1} (Latin-1?); "
            "convert it with: iconv -f LATIN1 -t UTF-8"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
    if _ESCAPED_SURROGATE.search(text):
        for piece in _strings(value):
            check_characters(piece, where)
    return value


def load_toml(text: str, where: str) -> dict[str, Any]:
    """The table of a TOML text. Raises UserError, also for more than DEEPEST levels."""
    if len(text) > LARGEST_TOML:
        raise UserError(f"{where}: more than {LARGEST_TOML >> 20} MiB of TOML")
    if _LONG_KEY.search(text):
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep") from None
    except ValueError as error:  # TOMLDecodeError; a number of too many digits
        raise UserError(f"{where}: not TOML: {error}") from None
    if is_deep(value):
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
    return value


def printable(text: object) -> str:
    """`text` for a console: control characters, which could move the cursor or colour the rest, as escapes."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def check_characters(text: str, where: str) -> None:
    """Raise UserError if `text` holds half of a surrogate pair, which can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a character ({error.object[error.start]!a}); tokenizers refuse it") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def is_deep(value: Any) -> bool:
    """Whether containers nest deeper than DEEPEST, found without recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item for entry in level if isinstance(entry, list | dict) for item in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return False
    return True


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included; `value` is not deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
