"""MODEL.prompts.jsonl: a row for every sample of an evaluation, with its response, its verdict and the reason.

Rows are written as verdicts come. What was interrupted goes on: rows whose `key` is that of the response, the answer, the grader and its
limits of now are kept, others are made again. A file that is finished has one row a sample, in the order of the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, get_args

from megatron_opd.errors import UserError
from megatron_opd.evaluate.verdict import Outcome
from megatron_opd.safety.durable import open_new, sync
from megatron_opd.safety.locks import Lock
from megatron_opd.safety.untrusted import load_json, open_file

_LONGEST_ROW = 256 << 20  # bytes
_WAIT_SECONDS = 60.0  # for another process that writes the rows
_OUTCOMES = {*get_args(Outcome), "excluded"}
_AGAIN = "run 'megatron-opd eval' again, which grades what is missing or damaged"
SampleName = tuple[int, int]  # index of the prompt, number of its sample


@dataclass(frozen=True)
class Row:
    """One sample. `outcome` is a verdict's or "excluded", which has no score, no response and no end ("finish").

    prompt: its index in the file. id: the row's own name there. sample: from 0 within the prompt. tokens: of the response.
    key: sha256 in hex of all that the verdict depends on.
    """

    prompt: int
    id: str | None
    sample: int
    outcome: Outcome | Literal["excluded"]
    score: float | None
    answer: str | None
    gold: str | None
    reason: str
    seconds: float
    detail: dict[str, Any]
    finish: Literal["stop", "length"] | None
    tokens: int
    key: str
    response: str | None

    @property
    def name(self) -> SampleName:
        return self.prompt, self.sample


_NAMES = [field.name for field in fields(Row)]
_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (int,), "id": (str, type(None)), "sample": (int,), "outcome": (str,), "score": (int, float, type(None)),
    "answer": (str, type(None)), "gold": (str, type(None)), "reason": (str,), "seconds": (int, float), "detail": (dict,),
    "finish": (str, type(None)), "tokens": (int,), "key": (str,), "response": (str, type(None)),
}  # fmt: skip


def key_of(*parts: Any) -> str:
    """sha256 in hex of values that JSON can write (others by their text)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a finished file, in order. Raises UserError that names file and line for rows that are damaged or there twice."""
    known: set[SampleName] = set()
    try:
        file = open_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; 'megatron-opd eval' writes it") from None
    with file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_ROW), b""), start=1):
            where = f"{path}, line {number}"
            if not line.endswith(b"\n"):
                raise UserError(f"{where}: is cut off: grading was interrupted; {_AGAIN}")
            row = parse_row(line, where)
            if row.name in known:
                raise UserError(f"{where}: sample {row.sample} of prompt {row.prompt} is there twice: grading was interrupted; {_AGAIN}")
            known.add(row.name)
            yield row


def parse_row(line: bytes, where: str) -> Row:
    """A row of the file. Raises UserError."""
    value = load_json(line, where, characters=False)
    if not isinstance(value, dict) or value.keys() != set(_NAMES):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: not a row of graded samples: its fields must be {', '.join(_NAMES)}, not {found}; {_AGAIN}")
    for name, types in _TYPES.items():
        if not isinstance(value[name], types) or isinstance(value[name], bool):
            raise UserError(f"{where}: {name} is {value[name]!r:.80}; {_AGAIN}")
    excluded = value["outcome"] == "excluded"
    faults = {
        "prompt": value["prompt"] < 0,
        "sample": value["sample"] < 0,
        "outcome": value["outcome"] not in _OUTCOMES,
        "score": (value["score"] is None) != excluded or not 0 <= (value["score"] or 0.0) <= 1,
        "finish": value["finish"] not in ((None,) if excluded else ("stop", "length")),
        "response": (value["response"] is None) != excluded,
    }
    for name, wrong in faults.items():
        if wrong:
            raise UserError(f"{where}: {name} is {value[name]!r:.80}, which a row of outcome {value['outcome']!r:.40} can't have; {_AGAIN}")
    return Row(**value)


@dataclass(frozen=True)
class _Place:
    """Where a row lies in the file; `row` is without its response, which may be long."""

    row: Row
    offset: int
    size: int


class RowWriter:
    """The file while it is written, by one process at a time; a context manager. `find` gives the row of an earlier time, `add` appends,
    `finish` puts in order. Raises UserError while another process writes the file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = Lock(self.path, of_file=True, wait_seconds=_WAIT_SECONDS)
        self._lock.acquire()
        self._places: dict[SampleName, _Place] = {}
        self._size = self._num_lines = 0
        self._read()
        self._file: IO[bytes] = self.path.open("ab")

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()
        self._lock.release()

    def find(self, name: SampleName, key: str) -> Row | None:
        """The row of that sample, without its response, if it has that key."""
        place = self._places.get(name)
        return place.row if place is not None and place.row.key == key else None

    def add(self, row: Row) -> None:
        line = json.dumps(asdict(row)).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._note(row, len(line))

    def finish(self, order: Iterable[SampleName]) -> None:
        """Leave the rows of those samples alone, in that order; they must all be there."""
        places = [self._places[name] for name in order]
        os.fsync(self._file.fileno())
        ends = [place.offset + place.size for place in places]
        if [place.offset for place in places] == [0, *ends[:-1]] and self._num_lines == len(places):
            return
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with self.path.open("rb") as old, open_new(temporary) as file:
                for place in places:
                    old.seek(place.offset)
                    file.write(old.read(place.size))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(self.path.parent)

    def _read(self) -> None:
        """Note the rows that are there; of a sample the last counts. A last line that was cut off is dropped, damaged ones are said."""
        if not self.path.exists():
            return
        damaged = 0
        with open_file(self.path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_ROW), b""), start=1):
                if not line.endswith(b"\n"):
                    os.truncate(self.path, self._size)
                    break
                try:
                    self._note(parse_row(line, f"{self.path}, line {number}"), len(line))
                except UserError:
                    damaged += 1
                    self._size += len(line)
                    self._num_lines += 1
        if damaged:
            print(f"{self.path}: {damaged} rows are damaged or of another version; they are made again")

    def _note(self, row: Row, size: int) -> None:
        self._places[row.name] = _Place(replace(row, response=None), self._size, size)
        self._size += size
        self._num_lines += 1


def by_prompt(rows: Iterable[Row]) -> Mapping[int, list[Row]]:
    """Rows of each prompt without what was excluded, and without responses, which may be long."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row.outcome != "excluded":
            found.setdefault(row.prompt, []).append(replace(row, response=None))
    return found
