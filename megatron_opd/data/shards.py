"""Reads arrays of the store: one shard file an array, chunks of zstd with a CRC-32C, their places in an index at the file's end.

That is the layout that Zarr v3's `sharding_indexed` codec defines (zarr-specs, "Sharding codec", 1.0) and zarr writes here. Zarr could
read it too, at more than a millisecond a read; and a chunk that is not there is an error here, where Zarr gives fill values.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress

from megatron_opd.safety.untrusted import load_json

CHUNK_ITEMS = 1 << 15  # of a chunk, unless a row has more
_LARGEST_ROW = 1 << 20
_SMALL_FILE = 1 << 12  # bytes; is read at once
_DTYPES = ("int32", "int64", "uint8", "float16", "float32")
_INDEX_ENTRY = 16  # offset and length, uint64 each
_ABSENT = (1 << 64) - 1
_CRC = 4
_THREADS = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="store")  # zstd runs without the interpreter's lock


@dataclass(frozen=True)
class ArrayFacts:
    """What a manifest says of an array; its data type is one of `dtypes`."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    crc32c: int


class ShardedArray:
    """An array whose rows are read by `read`. `metadata` (its zarr.json) must be as the store writes it and, where they are given, as
    `facts` say; nothing is allocated for what the file is too short for.

    Raises UserError, ValueError, OSError, KeyError, IndexError, TypeError or AttributeError for what is not as it was written.
    """

    def __init__(self, fs: Any, path: str, metadata: bytes, *, is_local: bool, facts: ArrayFacts | None = None):
        self._fs, self._is_local = fs, is_local
        meta = load_json(metadata, "zarr.json")
        self.shape = _sizes(meta["shape"], least=0)
        if meta["data_type"] not in _DTYPES:
            raise ValueError(f"data type {meta['data_type']!r:.80}; {', '.join(_DTYPES)} are known")
        if facts is not None and (self.shape != facts.shape or meta["data_type"] not in facts.dtypes):
            raise ValueError(f"{meta['data_type']} {list(self.shape)}, but by the manifest {' or '.join(facts.dtypes)} {list(facts.shape)}")
        self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        self._file = f"{path}/c/" + "/".join("0" * len(self.shape))
        self._index: np.ndarray | None = None
        self._small: bytes | None = None  # all of a small file, until it was read
        self.chunk_rows, self._num_chunks, self._data_size = 1, 0, 0
        if 0 in self.shape:
            return
        (codec,) = meta["codecs"]
        sharding = codec["configuration"]
        names = [inner["name"] for inner in sharding["codecs"]]
        if codec["name"] != "sharding_indexed" or names != ["bytes", "zstd", "crc32c"] or sharding.get("index_location", "end") != "end":
            raise ValueError(f"codecs {codec['name']} of {names}, not those that the store is written with")
        chunk, shard = _sizes(sharding["chunk_shape"], least=1), _sizes(meta["chunk_grid"]["configuration"]["chunk_shape"], least=1)
        self.chunk_rows, self._num_chunks = chunk[0], -(-self.shape[0] // chunk[0])
        if shard != (self._num_chunks * self.chunk_rows, *self.shape[1:]) or chunk[1:] != self.shape[1:]:
            raise ValueError(f"chunks of {list(chunk)} in a shard of {list(shard)}, not one shard file of whole rows")
        if math.prod(chunk) > (CHUNK_ITEMS if chunk[0] > 1 else _LARGEST_ROW):
            raise ValueError(f"chunks of {list(chunk)} are larger than the store writes them")

    def check_size(self) -> None:
        """Raise ValueError or OSError unless the index is whole and the file has the bytes of all chunks, which are not read."""
        if self._num_chunks:
            for chunk in range(self._num_chunks):
                self._place(self._read_index(), chunk)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows as an array of their own."""
        start, stop, _ = rows.indices(self.shape[0])
        shape = (max(stop - start, 0), *self.shape[1:])
        if 0 in shape:
            return np.empty(shape, self.dtype)
        index = self._read_index()
        result = np.empty(shape, self.dtype)

        def fill(chunk: int) -> None:
            first = chunk * self.chunk_rows
            values = self._read_chunk(index, chunk)[max(start - first, 0) : stop - first]
            at = max(first - start, 0)
            result[at : at + len(values)] = values

        chunks = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
        for _ in map(fill, chunks) if len(chunks) < 3 else _THREADS.map(fill, chunks):
            pass
        self._small = None
        return result

    def _read_index(self) -> np.ndarray:
        """uint64 [chunks, 2]: offset and length of each chunk."""
        if self._index is None:
            length = self._num_chunks * _INDEX_ENTRY + _CRC
            size, content = self._tail(max(length, _SMALL_FILE))
            if size < length:
                raise ValueError("the file is too short")
            self._index = np.frombuffer(_without_crc(content[-length:], "the index of its chunks"), "<u8").reshape(-1, 2)
            self._data_size, self._small = size - length, content if len(content) == size else None
        return self._index

    def _place(self, index: np.ndarray, chunk: int) -> tuple[int, int]:
        """Offset and length of a chunk, which lie in the file."""
        offset, length = (int(value) for value in index[chunk])
        if offset == _ABSENT:
            raise ValueError(f"chunk {chunk} is not there")
        if offset + length > self._data_size:
            raise ValueError(f"chunk {chunk} is beyond the end of the file")
        return offset, length

    def _read_chunk(self, index: np.ndarray, chunk: int) -> np.ndarray:
        offset, length = self._place(index, chunk)
        content = self._bytes(offset, length)
        if len(content) != length:
            raise ValueError(f"chunk {chunk} is cut off")
        frame = _without_crc(content, f"chunk {chunk}")
        shape = (self.chunk_rows, *self.shape[1:])
        if _content_size(frame) != self.dtype.itemsize * math.prod(shape):
            raise ValueError(f"chunk {chunk} is of another size")
        return np.frombuffer(decompress(frame), self.dtype).reshape(shape)

    def _tail(self, length: int) -> tuple[int, bytes]:
        """The file's size, and its last bytes: `length` of them, or all."""
        if not self._is_local:
            size = int(self._fs.size(self._file))
            return size, self._bytes(max(0, size - length), min(size, length))
        with open(self._file, "rb", opener=_at_once) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length))
            return size, file.read(min(size, length))

    def _bytes(self, offset: int, length: int) -> bytes:
        if self._small is not None:
            return self._small[offset : offset + length]
        if not self._is_local:
            return self._fs.cat_file(self._file, start=offset, end=offset + length)
        with open(self._file, "rb", opener=_at_once) as file:
            file.seek(offset)
            return file.read(length)


def _at_once(path: str, flags: int) -> int:
    """Opens a file; of a named pipe it would wait for the other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _without_crc(content: bytes, what: str) -> memoryview:
    """`content` less the CRC-32C at its end, which must be right."""
    body = content[:-_CRC]
    if google_crc32c.value(body) != int.from_bytes(content[-_CRC:], "little"):
        raise ValueError(f"{what} has another checksum")
    return memoryview(body)


def _sizes(value: Any, *, least: int) -> tuple[int, ...]:
    """A shape as JSON has it. Raises ValueError."""
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= 2
        or any(type(size) is not int or not least <= size < 1 << 40 for size in value)
    ):
        raise ValueError(f"{value!r:.80} is not the shape of an array or a chunk here")
    return tuple(value)


def _content_size(frame: memoryview) -> int | None:
    """Bytes that a zstd frame says it unpacks to (RFC 8878, 3.1.1.1), so that no more is allocated; None where it doesn't say."""
    if len(frame) < 5:
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    length = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(frame[start : start + length], "little") + (256 if length == 2 else 0) if length else None
