"""Values between a program and who judges it, as lines of JSON. Nothing here runs what it reads.

Lists, texts, numbers, booleans and None are themselves. Anything else is an object with one key, its kind: {"tuple": [...]}. An object
that has no such form stays where it is, and {"object": number} stands for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_SAFE_INT = 1 << 63  # larger ones are written in hexadecimal: Python refuses decimal numbers of more than 4300 digits

Message = dict[str, Any]


class Foreign:
    """An object of another process: equal to itself alone."""

    def __init__(self, number: int):
        self.number = number

    def __repr__(self) -> str:
        return "<an object that is no plain data>"


def encode(value: Any, number_of: Callable[[Any], int]) -> Any:
    """`value` as JSON; number_of: the number by which an object without a form of its own is known."""
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return value if -_SAFE_INT < value < _SAFE_INT else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(each, number_of) for each in value]
    for kind, name in ((tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            return {name: [encode(each, number_of) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, number_of), encode(each, number_of)] for key, each in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), number_of)
    return {"object": number_of(value)}


def decode(data: Any, object_of: Callable[[int], Any], most_hashed: int | None = None) -> Any:
    """The value that `encode` was given. Raises ValueError for what it never writes.

    most_hashed: of a set or a dict, unless its keys are texts; larger ones are refused. Numbers can be chosen that all have one hash, and
    then it takes time with the square of their number. Python hashes texts in a way of each process.
    """
    if isinstance(data, list):
        return [decode(each, object_of, most_hashed) for each in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("not a value")
    ((kind, content),) = data.items()
    try:
        if kind == "object":
            return object_of(int(content))
        if kind == "int":
            return int(content, 16)
        if kind in _SEQUENCES:
            values = [decode(each, object_of, most_hashed) for each in content]
            if kind != "tuple":
                _check_hashed(values, most_hashed)
            return _SEQUENCES[kind](values)
        if kind == "dict":
            pairs = [(decode(key, object_of, most_hashed), decode(each, object_of, most_hashed)) for key, each in content]
            _check_hashed([key for key, _ in pairs], most_hashed)
            return dict(pairs)
        if kind in _BYTES:
            return _BYTES[kind](bytes.fromhex(content))
        if kind == "complex":
            return complex(*content)
        if kind == "range":
            return range(*content)
    except (TypeError, OverflowError) as error:  # a list as a key, a number for a list, an infinite one
        raise ValueError(str(error)) from None
    raise ValueError(f"no such kind: {str(kind)[:50]}")


def _check_hashed(keys: list[Any], most: int | None) -> None:
    if most is not None and len(keys) > most and not all(type(key) is str for key in keys):
        raise ValueError(f"more than {most} elements or keys that are no texts")


_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_BYTES: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "bytearray": bytearray}


class Channel:
    """Messages over a connected socket or pair of pipes that blocks."""

    def __init__(self, descriptor: int):
        self._reader = open(descriptor, "rb", closefd=False)  # noqa: SIM115
        self._writer = open(descriptor, "wb", closefd=False)  # noqa: SIM115

    def write(self, message: Message) -> None:
        """Raises OSError where nobody reads, ValueError or RecursionError for what is no JSON, before anything is written."""
        self.send(to_line(message))

    def send(self, line: bytes) -> None:
        self._writer.write(line)
        self._writer.flush()

    def read(self, longest: int) -> Message:
        """The next message. Raises EOFError where the other side has ended or sends more than `longest` bytes, ValueError for what is none."""
        line = self._reader.readline(longest + 1)
        if not line.endswith(b"\n"):
            raise EOFError
        return from_line(line)


def to_line(message: Message) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


def from_line(line: bytes) -> Message:
    """Raises ValueError for what is no message."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message
