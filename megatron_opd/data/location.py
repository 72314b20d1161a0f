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
import stat
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

from megatron_opd.data.shards import CHUNK_ITEMS, ArrayFacts, ShardedArray
from megatron_opd.errors import StoreError, UserError
from megatron_opd.safety import durable
from megatron_opd.safety.redact import public_address
from megatron_opd.safety.untrusted import load_json, one_line

ATTRIBUTE, CHECKSUM = "opd", "opd_crc32c"
MAKE_AGAIN = "delete this group and make it again"
_RESTORE = (
    "if it is not of a store of ours, take another path; else put it back from a copy, "
    "or delete this file and run the stage with the settings that it had, which writes it again"
)
_LARGEST_MANIFEST = 1 << 28  # bytes; a part that excludes a million rollouts has half of it
# Values that can never be data, so that a chunk that is missing inside a file is seen, never read as zeros.
FILL = {"f": float("nan"), "i": -1, "u": 255}


class Location:
    """A folder that may hold Zarr groups; paths below it are relative, with '/'. `url` is for people, `address` for opening it."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None):
        self.address, self.url = str(url), public_address(str(url))
        self.storage_options = storage_options or {}
        if "\0" in self.address:
            raise StoreError(f"{self.url}: an address can't hold NUL characters")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.address, **self.storage_options)
        except (ValueError, ImportError) as error:
            raise StoreError(f"{self.url}: no file system for this address: {self.reason(error)}") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def reason(self, error: Exception) -> str:
        """An error's text for people."""
        return one_line(str(error).replace(self.address, self.url) or type(error).__name__)

    def path(self, relative: str) -> str:
        return f"{self.root}/{relative}" if relative else self.root

    def show(self, relative: str) -> str:
        """A path for error messages."""
        return f"{self.url.rstrip('/')}/{one_line(relative)}" if relative else self.url

    def read_attributes(self, group: str) -> dict[str, Any] | None:
        """The group's 'opd' attributes, None if there is no sealed group. Raises StoreError if they are not ours, or not as written."""
        name = f"{group}/zarr.json" if group else "zarr.json"
        content = self.read_file(name)
        if content is None:
            return None
        shown, remedy = self.show(name), MAKE_AGAIN if group else _RESTORE
        try:
            attributes = load_json(content, shown)["attributes"]
            if attributes == {}:
                return None  # as Zarr makes it when the first array is written on an object store
            record = attributes[ATTRIBUTE]
            if not isinstance(record, dict):
                raise TypeError(f"{ATTRIBUTE!r} is no object")
        except UserError as error:
            raise StoreError(f"{error}; {remedy}") from None
        except (KeyError, TypeError) as error:
            raise StoreError(f"{shown} is damaged, or not of a store (its attributes have no {ATTRIBUTE!r}: {error}); {remedy}") from None
        check_record(record, attributes.get(CHECKSUM), shown, f"{remedy}; if the change was meant, remove {CHECKSUM!r} from the file")
        return record

    def write_attributes(self, group: str, attributes: dict[str, Any] | None, *, exclusive: bool = False) -> bool:
        """Write the group's zarr.json whole, with a checksum of `attributes`; with `exclusive`, False if there is one already."""
        ours = {} if attributes is None else {ATTRIBUTE: attributes, CHECKSUM: record_checksum(attributes)}
        content = {"zarr_format": 3, "node_type": "group", "attributes": ours}
        text = json.dumps(content, indent=1).encode()
        return self.write_file(f"{group}/zarr.json" if group else "zarr.json", text, exclusive=exclusive)

    def make_group(self, group: str) -> None:
        """A group without attributes, unless it is there."""
        if not self.fs.exists(self.path(f"{group}/zarr.json")):
            self.write_attributes(group, None)

    def read_file(self, relative: str) -> bytes | None:
        """A file's content, None if there is none. Raises StoreError for what is no file or far too large, OSError."""
        path = self.path(relative)
        try:
            if self.is_local:
                found = os.stat(path)
                if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_MANIFEST:
                    raise StoreError(f"{self.show(relative)}: not a file, or over {_LARGEST_MANIFEST >> 20} MiB, which no such file has")
            return self.fs.cat_file(path)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise StoreError(f"{self.url} is a file; a store is a directory") from None

    def write_file(self, relative: str, content: bytes, *, exclusive: bool = False) -> bool:
        """Write a file whole; with `exclusive`, False if there is one already."""
        target = self.path(relative)
        if not self.is_local:
            if exclusive and self.fs.exists(target):
                return False
            self.fs.pipe_file(target, content)
            return True
        _make_folder(os.path.dirname(target))
        return durable.write_file(target, content, exclusive=exclusive)

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
        """Write arrays, then the attributes; whatever stood there unsealed is replaced. A sealed group is left as it is.

        Raises StoreError if what was written is gone before it is sealed.
        """
        if self.read_attributes(group) is not None:
            return
        if not self.is_local:
            for name, array in arrays.items():
                _write_array(self.zarr_store(group), name, array)
            self._check_written(group, arrays)
            self.write_attributes(group, attributes)
            return
        target = self.path(group)
        parent, name = os.path.split(target)
        staging = Location(os.path.join(parent, f".{name}.{uuid.uuid4().hex}.tmp"))
        _make_folder(parent)
        os.mkdir(staging.root)
        try:
            for key, array in arrays.items():
                _write_array(LocalStore(staging.root), key, array)
            staging.write_attributes("", attributes)
            durable.sync_tree(staging.root)  # takes the time; what is looked at then is renamed at once
            staging._check_written("", arrays)
            if staging.read_attributes("") is None:
                raise StoreError(f"{self.show(group)}: its manifest was deleted while it was written; run the same command again")
            _empty_unsealed(target)
            durable.publish_folder(staging.root, target)
        except OSError:
            # Another worker sealed the same group first: its data is whole, ours is dropped.
            if self.read_attributes(group) is None:
                raise
        finally:
            shutil.rmtree(staging.root, ignore_errors=True)

    def _check_written(self, group: str, arrays: dict[str, np.ndarray]) -> None:
        """Raise StoreError unless every array lies there with all its bytes; they are not read."""
        for name, array in arrays.items():
            try:
                self.open_array(group, name, ArrayFacts(array.shape, (str(array.dtype),), 0)).check_size()
            except (StoreError, ValueError, OSError) as error:
                raise StoreError(
                    f"{self.show(group)}/{name} is not there as it was written ({self.reason(error)}): deleted by somebody? "
                    "Nothing was sealed; run the same command again"
                ) from None

    def remove_group(self, group: str) -> None:
        """Remove a group, sealed or not; readers see it whole or not at all on a local disk."""
        path = self.path(group)
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            if self.is_local:
                parent, name = os.path.split(path)
                path, target = os.path.join(parent, f".{name}.{uuid.uuid4().hex}.tmp"), path
                os.rename(target, path)
            self.fs.rm(path, recursive=True)

    def remove_leftovers(self, group: str) -> None:
        """Remove what a killed worker left in `group` under a temporary name, older than a day."""
        if not self.is_local or not os.path.isdir(self.path(group)):
            return
        for entry in os.scandir(self.path(group)):
            if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError):  # another worker has just renamed it into place; a disk that is read-only
                    if time.time() - entry.stat().st_mtime > 86400:
                        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def open_array(self, group: str, name: str, facts: ArrayFacts | None = None) -> ShardedArray:
        """Raises StoreError naming the array that can't be opened, or is not as `facts` say."""
        relative = f"{group}/{name}" if group else name
        try:
            metadata = self.read_file(f"{relative}/zarr.json")
            if metadata is None:
                raise FileNotFoundError("zarr.json is missing")
            return ShardedArray(self.fs, self.path(relative), metadata, is_local=self.is_local, facts=facts)
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # damaged metadata is of any type
            raise StoreError(f"{self.show(relative)} can't be opened: {self.reason(error)}; {MAKE_AGAIN}") from None

    def read_array(self, group: str, name: str, rows: slice = slice(None), *, facts: ArrayFacts | None = None) -> np.ndarray:
        """Rows of an array; with `facts`, of one that is as they say, its checksum included. Raises StoreError naming the array."""
        array = self.open_array(group, name, facts)
        return read_rows(array, f"{self.show(group)}/{name}", rows, crc32c=facts.crc32c if facts else None)


def _make_folder(path: str) -> None:
    try:
        durable.make_folder(path)
    except (FileExistsError, NotADirectoryError):
        raise StoreError(f"{one_line(path)} is a file; a store is a directory") from None


def check_record(record: dict[str, Any], crc32c: Any, shown: str, remedy: str) -> None:
    """Raise StoreError unless `record` has this checksum; None has a record of an older version."""
    if crc32c is not None and crc32c != record_checksum(record):
        raise StoreError(f"{shown} is not as it was written (its checksum is another): damaged, or edited by hand; {remedy}")


def record_checksum(record: dict[str, Any]) -> int:
    """CRC-32C of a record's JSON, in whatever order and with whatever white space its file has it."""
    read_back = json.loads(json.dumps(record))  # keys become strings
    return int(google_crc32c.value(json.dumps(read_back, sort_keys=True, separators=(",", ":")).encode()))


def read_rows(array: ShardedArray, shown: str, rows: slice = slice(None), *, crc32c: int | None = None) -> np.ndarray:
    """Rows of an open array with errors that name it."""
    try:
        values = array.read(rows)
    except (OSError, ValueError, RuntimeError, IndexError, MemoryError) as error:  # RuntimeError: zstd does not understand the bytes
        raise StoreError(f"{shown} is damaged: {error or 'it asks for too much memory'}; {MAKE_AGAIN}") from None
    if crc32c is not None and checksum(values) != crc32c:
        raise StoreError(f"{shown} is damaged: its checksum is not the one in the manifest; {MAKE_AGAIN}")
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


def _empty_unsealed(folder: str) -> None:
    """Empty a folder that stands where a group is to be, so that a folder can be renamed over it; a sealed group is left alone.

    It is opened first: a group that another worker renames to this path in the meantime is another folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        if _is_sealed(descriptor):
            return
        for name in os.listdir(descriptor):
            try:
                os.unlink(name, dir_fd=descriptor)
            except IsADirectoryError:
                shutil.rmtree(name, ignore_errors=True, dir_fd=descriptor)  # another worker may be at it too
            except FileNotFoundError:
                pass
    finally:
        os.close(descriptor)


def _is_sealed(descriptor: int) -> bool:
    try:
        with open("zarr.json", "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=descriptor)) as file:
            return f'"{ATTRIBUTE}"'.encode() in file.read()
    except FileNotFoundError:
        return False
