"""Sealed Zarr v3 groups under a local directory or any fsspec URL.

A group is *sealed* when its zarr.json stands: the arrays are written first, the group's attributes last. On a local disk a
group is made under a temporary name and renamed into place, so that two workers can never mix their arrays; on object stores
the attributes carry a CRC-32C of every array, which readers check.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore

from megatron_opd.data.shards import ShardedArray
from megatron_opd.errors import StoreError

ATTRIBUTE = "opd"
CHUNK_ITEMS = 1 << 15
# Values that can never be data, so that a chunk that is missing inside a file is seen, never read as zeros.
FILL = {"f": float("nan"), "i": -1, "u": 255}


class Location:
    """A folder that may hold Zarr groups; paths below it are relative, with '/'."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None):
        self.url = str(url)
        self.storage_options = storage_options or {}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **self.storage_options)
        except (ValueError, ImportError) as error:
            raise StoreError(f"{self.url}: no file system for this address: {error}") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}" if relative else self.root

    def show(self, relative: str) -> str:
        """A path for error messages."""
        return f"{self.url.rstrip('/')}/{relative}" if relative else self.url

    def read_attributes(self, group: str) -> dict[str, Any] | None:
        """The group's 'opd' attributes, None if there is no sealed group. Raises StoreError if it is not ours or broken."""
        try:
            text = self.fs.cat_file(self.path(f"{group}/zarr.json" if group else "zarr.json"))
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise StoreError(f"{self.url} is a file; a store is a directory") from None
        try:
            return json.loads(text).get("attributes", {}).get(ATTRIBUTE)
        except (ValueError, AttributeError) as error:
            raise StoreError(f"{self.show(group)}/zarr.json is damaged ({error}); delete this group and make it again") from None

    def write_attributes(self, group: str, attributes: dict[str, Any] | None, *, exclusive: bool = False) -> bool:
        """Write the group's zarr.json whole; with `exclusive`, False if there is one already."""
        content = {"zarr_format": 3, "node_type": "group", "attributes": {} if attributes is None else {ATTRIBUTE: attributes}}
        text = json.dumps(content, indent=1).encode()
        return self.write_file(f"{group}/zarr.json" if group else "zarr.json", text, exclusive=exclusive)

    def write_file(self, relative: str, content: bytes, *, exclusive: bool = False) -> bool:
        """Write a file whole; with `exclusive`, False if there is one already."""
        target = self.path(relative)
        if not self.is_local:
            if exclusive and self.fs.exists(target):
                return False
            self.fs.pipe_file(target, content)
            return True
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise StoreError(f"{self.url} is a file; a store is a directory") from None
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not exclusive:
                os.replace(temporary, target)
                return True
            os.link(temporary, target)
            return True
        except FileExistsError:
            return False
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def children(self, group: str) -> list[str]:
        """Names of the folders in `group`, temporary ones left out."""
        try:
            entries = (
                self.fs.ls(self.path(group), detail=True, refresh=True) if not self.is_local else self.fs.ls(self.path(group), detail=True)
            )
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]
        return sorted(name for name in names if not name.startswith("."))

    def zarr_store(self, group: str) -> Any:
        path = self.path(group)
        if self.is_local:
            return LocalStore(path)
        return FsspecStore.from_url(self.fs.unstrip_protocol(path), storage_options=self.storage_options or None)

    def write_sealed_group(self, group: str, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
        """Write arrays, then the attributes; whatever stood there unsealed is replaced. A sealed group is left as it is."""
        if self.read_attributes(group) is not None:
            return
        if not self.is_local:
            for name, array in arrays.items():
                _write_array(self.zarr_store(group), name, array)
            self.write_attributes(group, attributes)
            return
        parent, name = os.path.split(self.path(group))
        staging = os.path.join(parent, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            for key, array in arrays.items():
                _write_array(LocalStore(staging), key, array)
            Location(staging).write_attributes("", attributes)
            _sync_tree(staging)
            if os.path.isdir(self.path(group)) and self.read_attributes(group) is None:
                shutil.rmtree(self.path(group), ignore_errors=True)  # another worker may be at it too
            os.rename(staging, self.path(group))
        except OSError:
            # Another worker sealed the same group first: its data is whole, ours is dropped.
            if self.read_attributes(group) is None:
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def remove_leftovers(self, group: str) -> None:
        """Remove temporary folders that a killed worker left in `group`, older than a day."""
        if not self.is_local or not os.path.isdir(self.path(group)):
            return
        for entry in os.scandir(self.path(group)):
            if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                with contextlib.suppress(FileNotFoundError):  # another worker has just renamed it into place
                    if time.time() - entry.stat().st_mtime > 86400:
                        shutil.rmtree(entry.path, ignore_errors=True)

    def open_array(self, group: str, name: str) -> ShardedArray:
        """Raises StoreError naming the array that can't be opened."""
        try:
            return ShardedArray(self.fs, self.path(f"{group}/{name}"), is_local=self.is_local)
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # damaged metadata is of any type
            raise StoreError(f"{self.show(group)}/{name} can't be opened: {error}; delete this group and make it again") from None

    def read_array(self, group: str, name: str, rows: slice = slice(None), *, crc32c: int | None = None) -> np.ndarray:
        """Rows of an array; checks the whole array's CRC-32C where it is given. Raises StoreError naming the array."""
        return read_rows(self.open_array(group, name), f"{self.show(group)}/{name}", rows, crc32c=crc32c)


def read_rows(array: ShardedArray, shown: str, rows: slice = slice(None), *, crc32c: int | None = None) -> np.ndarray:
    """Rows of an open array with errors that name it."""
    try:
        values = array.read(rows)
    except (OSError, ValueError, RuntimeError, IndexError) as error:  # RuntimeError: zstd does not understand the bytes
        raise StoreError(f"{shown} is damaged: {error}; delete this group and make it again") from None
    if crc32c is not None and checksum(values) != crc32c:
        raise StoreError(f"{shown} is damaged: its checksum is not the one in the manifest; delete this group and make it again")
    return values


def checksum(array: np.ndarray) -> int:
    """CRC-32C of the array's raw little-endian bytes."""
    return int(google_crc32c.value(np.ascontiguousarray(array)))  # by the buffer protocol, without a copy


def _write_array(store: Any, name: str, array: np.ndarray) -> None:
    row_items = int(np.prod(array.shape[1:])) or 1
    rows = len(array)
    chunk_rows = max(1, min(rows, CHUNK_ITEMS // row_items))
    shard_rows = -(-rows // chunk_rows) * chunk_rows
    created = zarr.create_array(
        store=store,
        name=name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk_rows, *array.shape[1:]),
        shards=(shard_rows, *array.shape[1:]) if rows else None,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=FILL[array.dtype.kind],
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    if rows:
        created[:] = array


def _sync_tree(folder: str) -> None:
    """fsync every file, so that a sealed group survives a power cut."""
    for parent, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
