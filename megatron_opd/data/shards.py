"""Reads arrays of the store: one shard file an array, chunks of zstd with a CRC-32C, their places in an index at the file's end.

That is the layout that Zarr v3's `sharding_indexed` codec defines (zarr-specs, "Sharding codec", 1.0) and zarr writes here. Zarr could
read it too, at more than a millisecond a read; and a chunk that is not there is an error here, where Zarr gives fill values.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress

_INDEX_ENTRY = 16  # offset and length, uint64 each
_ABSENT = (1 << 64) - 1
_CRC = 4
_THREADS = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="store")  # zstd runs without the interpreter's lock


class ShardedArray:
    """An array whose rows are read by `read`. Raises ValueError, OSError, KeyError or IndexError for what is not as it was written."""

    def __init__(self, fs: Any, path: str, *, is_local: bool):
        self._fs, self._is_local = fs, is_local
        meta = json.loads(fs.cat_file(f"{path}/zarr.json"))
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        self._file = f"{path}/c/" + "/".join("0" * len(self.shape))
        self._index: np.ndarray | None = None
        self.chunk_rows = 1
        if not math.prod(self.shape):
            return
        (codec,) = meta["codecs"]
        sharding = codec["configuration"]
        names = [inner["name"] for inner in sharding["codecs"]]
        if codec["name"] != "sharding_indexed" or names != ["bytes", "zstd", "crc32c"] or sharding.get("index_location", "end") != "end":
            raise ValueError(f"codecs {codec['name']} of {names}, not those that the store is written with")
        self.chunk_rows = int(sharding["chunk_shape"][0])
        self._num_chunks = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0]) // self.chunk_rows
        if self._num_chunks * self.chunk_rows < self.shape[0] or tuple(sharding["chunk_shape"][1:]) != self.shape[1:]:
            raise ValueError("more than one shard file")
        if not fs.exists(self._file):
            raise FileNotFoundError("the data file is missing")

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows as an array of their own."""
        start, stop, _ = rows.indices(self.shape[0])
        result = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        if not result.size:
            return result
        index = self._read_index()

        def fill(chunk: int) -> None:
            first = chunk * self.chunk_rows
            values = self._read_chunk(index, chunk)[max(start - first, 0) : stop - first]
            at = max(first - start, 0)
            result[at : at + len(values)] = values

        chunks = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
        for _ in map(fill, chunks) if len(chunks) < 3 else _THREADS.map(fill, chunks):
            pass
        return result

    def _read_index(self) -> np.ndarray:
        """uint64 [chunks, 2]: offset and length of each chunk."""
        if self._index is None:
            length = self._num_chunks * _INDEX_ENTRY + _CRC
            content = self._bytes(None, length)
            if len(content) != length:
                raise ValueError("the file is too short")
            self._index = np.frombuffer(_without_crc(content, "the index of its chunks"), "<u8").reshape(-1, 2)
        return self._index

    def _read_chunk(self, index: np.ndarray, chunk: int) -> np.ndarray:
        offset, length = (int(value) for value in index[chunk])
        if offset == _ABSENT:
            raise ValueError(f"chunk {chunk} is not there")
        content = self._bytes(offset, length)
        if len(content) != length:
            raise ValueError(f"chunk {chunk} is cut off")
        values = decompress(_without_crc(content, f"chunk {chunk}"))
        return np.frombuffer(values, self.dtype).reshape(self.chunk_rows, *self.shape[1:])

    def _bytes(self, offset: int | None, length: int) -> bytes:
        """`length` bytes from `offset`, or the file's last."""
        if not self._is_local:
            return self._fs.cat_file(
                self._file, start=-length if offset is None else offset, end=None if offset is None else offset + length
            )
        with open(self._file, "rb") as file:
            if offset is None:
                size = file.seek(0, os.SEEK_END)
                offset = max(0, size - length)
            file.seek(offset)
            return file.read(length)


def _without_crc(content: bytes, what: str) -> memoryview:
    """`content` less the CRC-32C at its end, which must be right."""
    body = content[:-_CRC]
    if google_crc32c.value(body) != int.from_bytes(content[-_CRC:], "little"):
        raise ValueError(f"{what} has another checksum")
    return memoryview(body)
