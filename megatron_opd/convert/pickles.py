"""A checkpoint's pickles, read as data: whoever made them, none of them can name code that is run.

A pickle is a program; torch and Megatron-Core run `.metadata`, and the objects among the tensors, unseen. Importing this module puts
readers in their place that know the few classes which such files are made of.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_opd.errors import DamagedCheckpoint, UserError
from megatron_opd.safety.untrusted import read_object

METADATA_FILE, COMMON_FILE, FORMAT_FILE = ".metadata", "common.pt", "metadata.json"
_CLASSES = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


# What Transformer Engine keeps of FP8: a dictionary of tensors, numbers and one of its recipes.
_RECIPES = "transformer_engine.common.recipe"
_TENSORS = {"collections": {"OrderedDict"}, "torch._utils": {"_rebuild_tensor_v2"}}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "PosixPath" and module in ("pathlib", "pathlib._local"):  # where it was written
            return PurePosixPath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _CLASSES.get(module, ()) and not is_dtype:
            raise _strange(f"{module}.{name}")
        return super().find_class(module, name)


class _ExtraState(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if name in _TENSORS.get(module, ()):
            return super().find_class(module, name)
        found = super().find_class(module, name) if module == _RECIPES and name.isidentifier() else None
        if not isinstance(found, type) or found.__module__ != _RECIPES:
            raise _strange(f"{module}.{name}")
        return found


def _strange(name: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"it asks for {name}, which has no place there; nothing of it was run")


def read_metadata(checkpoint: Path) -> Metadata:
    """Which tensors a checkpoint has, and where in its files they lie. Raises DamagedCheckpoint naming the file, and the class if it is a strange one."""
    path = checkpoint / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        _check_metadata(metadata, checkpoint)
    except Exception as error:  # a damaged pickle can raise whatever its classes do
        raise DamagedCheckpoint(f"{path} can't be read: {_one_line(error)}") from None
    return metadata


def _check_metadata(metadata: Any, checkpoint: Path) -> None:
    """Raise ValueError unless each entry is of a known kind and lies inside a file of the checkpoint."""
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.state_dict_metadata, dict)
        or not isinstance(metadata.storage_data, dict)
    ):
        raise ValueError("it is no list of tensors")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{name!a} is a {type(entry).__name__}")
        if isinstance(entry, TensorStorageMetadata) and not (
            isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype) and isinstance(entry.chunks, list)
        ):
            raise ValueError(f"{name} has no size, type or chunks")
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        name, offset, length = place.relative_path, place.offset, place.length
        if not isinstance(index, MetadataIndex) or type(name) is not str or Path(name).name != name:
            raise ValueError(f"it names the file {name!a}, which is none of the checkpoint's")
        if name not in sizes:
            if not (checkpoint / name).is_file():
                raise ValueError(f"it names the file {name}, which is missing")
            sizes[name] = (checkpoint / name).stat().st_size
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 or offset + length > sizes[name]:
            raise ValueError(f"{index.fqn} ends at byte {offset + length} of {name}, which has {sizes[name]}; the file is cut")


def check_common(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint unless the files of what is no tensor can be read as data; Megatron-Core leaves that to torch's settings."""
    path = checkpoint / FORMAT_FILE
    try:
        kind = read_object(path).get("sharded_backend")
    except (OSError, UserError) as error:
        raise DamagedCheckpoint(f"{path} can't be read: {error}") from None
    if kind != "torch_dist":
        raise DamagedCheckpoint(f"{path}: sharded_backend = {kind!a}, but torch_dist is expected")
    path = checkpoint / COMMON_FILE
    try:
        with torch.serialization.safe_globals(_optimizer_classes()):
            if not isinstance(torch.load(path, map_location="cpu", weights_only=True), dict):
                raise ValueError("it is no dictionary")
    except Exception as error:
        raise DamagedCheckpoint(f"{path} can't be read: {_one_line(error)}") from None


def _optimizer_classes() -> list[Any]:
    """An offloading optimizer has its inner ones' classes among its settings."""
    modules = [sys.modules[name] for name in ("transformer_engine.pytorch.optimizers", "apex.optimizers") if name in sys.modules]
    return [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, *(module.FusedAdam for module in modules)]


def check_extra_state(name: str, value: Any) -> None:
    """Raise DamagedCheckpoint for what Transformer Engine, which unpickles its extra state, would run of a checkpoint."""
    try:
        if isinstance(value, torch.Tensor) and value.numel():
            _ExtraState(io.BytesIO(value.cpu().numpy().tobytes())).load()
        elif isinstance(value, io.BytesIO) and value.getbuffer().nbytes:
            torch.load(io.BytesIO(value.getvalue()), map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpoint(f"{name} can't be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """Torch's own text for a strange class goes on with how to allow it."""
    text = str(error)
    if (found := re.search(r"\bGLOBAL (\S+)", text)) is not None:
        return str(_strange(found[1]))
    return text.strip().split("\n")[0] or type(error).__name__


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    metadata = read_metadata(Path(self.path))
    metadata.storage_meta = metadata.storage_meta if isinstance(metadata.storage_meta, StorageMeta) else StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: IO[bytes]) -> None:
    """An object among the tensors, as data."""
    name = read_item.dest_index.fqn
    try:
        content = torch.load(value, weights_only=True)
    except Exception as error:
        assert self.metadata is not None
        file = self.metadata.storage_data[read_item.storage_index].relative_path
        raise DamagedCheckpoint(f"{name} in {file} can't be read: {_one_line(error)}") from None
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], content)
    else:
        self.state_dict[name] = content


FileSystemReader.read_metadata = _read_metadata
DefaultLoadPlanner.load_bytes = _load_bytes
