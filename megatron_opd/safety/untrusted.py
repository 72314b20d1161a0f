"""Text that others wrote (recipes, prompts, model files, manifests, answers of servers), read within bounds of size, depth and type.

Whatever is wrong with it is one UserError that names the place.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from megatron_opd.errors import UserError

DEEPEST = 100  # levels; tool schemas have about ten, and Python's own limit is about a thousand
LARGEST_JSON = 64 << 20  # bytes of a file; the index of a model's 100,000 tensors takes about 10 MiB
LARGEST_TOML = 1 << 20
MOST_DIGITS = 300  # of a whole number; more is no float
_LONG_NUMBER = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")
_STRIDE = 29  # every so many characters of a text are looked at first; of a long number at least MOST_DIGITS // _STRIDE in a row
_DIGITS_IN_A_ROW = re.compile(rf"\d{{{MOST_DIGITS // _STRIDE},}}")
_MOST_SHOWN = 2000  # characters of a line
# A dotted key of so many pieces, where keys begin; tomllib takes the square of their number in memory.
_LONG_KEY = re.compile(
    rf"(?:^[ \t]*\[{{0,2}}|[{{,])[ \t]*(?:(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')[ \t]*\.[ \t]*){{{DEEPEST + 1}}}", re.MULTILINE
)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def open_file(path: str | Path) -> IO[bytes]:
    """A file for reading. Raises UserError for a name that none can have and for what is no file, without waiting for it (a FIFO, say).

    FileNotFoundError and other OSErrors come as they are.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, half of a surrogate pair
        raise UserError(f"{str(path)!r}: no name of a file: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """A file's content. Raises UserError for one that is too large or no file, FileNotFoundError and other OSErrors as they come."""
    with open_file(path) as file:
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


def load_json(text: bytes | str, where: str, *, unique: bool = True, characters: bool = True, **options: Any) -> Any:
    """The value of a JSON text in UTF-8; `options` are json.loads'.

    Raises UserError, also for more than DEEPEST levels, numbers of more than MOST_DIGITS digits, with `characters` for half of a surrogate
    pair and, with `unique`, for a key that is there twice.
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
    except MemoryError:
        raise UserError(f"{where}: takes more memory than there is") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
    if (characters and _ESCAPED_SURROGATE.search(text)) or _has_long_number(text):
        for piece in leaves(value):
            if characters or not isinstance(piece, str):
                _check_leaf(piece, where)
    return value


def _has_long_number(text: str) -> bool:
    """Whether `_LONG_NUMBER` is found, which alone takes five times what parsing does: rows of prompt files may have tens of MiB."""
    dense = ((found.start() - 1, found.end() + 1) for found in _DIGITS_IN_A_ROW.finditer(text[::_STRIDE]))
    return any(_LONG_NUMBER.search(text, max(0, start * _STRIDE), end * _STRIDE) is not None for start, end in dense)


class NotToml(UserError):
    """A text whose syntax is not TOML's."""


def load_toml(text: str, where: str) -> dict[str, Any]:
    """The table of a TOML text. Raises UserError, also for more than DEEPEST levels and numbers of more than MOST_DIGITS digits."""
    if len(text) > LARGEST_TOML:
        raise UserError(f"{where}: more than {LARGEST_TOML >> 20} MiB of TOML")
    if _LONG_KEY.search(text):
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep") from None
    except tomllib.TOMLDecodeError as error:
        raise NotToml(f"{where}: not TOML: {error}") from None
    except ValueError as error:  # a number of too many digits
        raise UserError(f"{where}: {error}") from None
    if is_deep(value):
        raise UserError(f"{where}: nested more than {DEEPEST} levels deep")
    for leaf in leaves(value):
        _check_leaf(leaf, where)
    return value


def one_line(text: object) -> str:
    """`text` for a console, line ends as escapes too."""
    return printable(text).replace("\n", "\\n")


def printable(text: object) -> str:
    """`text` for a console: control characters, which could move the cursor or colour the rest, as escapes."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def shortened(text: str) -> str:
    """`text` with the middle of very long lines left out: values of others stand in messages."""
    half = _MOST_SHOWN // 2
    return "\n".join(line if len(line) <= _MOST_SHOWN else f"{line[:half]} ... {line[-half:]}" for line in text.split("\n"))


class Console(io.TextIOBase):
    """A text stream to which all is written `printable`."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    @property
    def unwrapped(self) -> TextIO:
        """The stream itself, for escapes of ours between texts that are printable already."""
        return self._stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


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


def _check_leaf(leaf: Any, where: str) -> None:
    if isinstance(leaf, str):
        check_characters(leaf, where)
    elif isinstance(leaf, int) and leaf.bit_length() > 3.3 * MOST_DIGITS:
        raise UserError(f"{where}: holds a whole number of more than {MOST_DIGITS} digits")


def leaves(value: Any) -> Iterator[Any]:
    """Every key and every value that is no container; `value` is not deep."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    else:
        yield value
