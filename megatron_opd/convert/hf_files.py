"""Reading tensors out of, and writing, Hugging Face model directories; files appear whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_opd.convert.staging import not_written, whole_directory
from megatron_opd.convert.turn_files import write_turns
from megatron_opd.errors import UserError
from megatron_opd.lineage import hash_tensors, remember_hashes, tensor_index, write_json_atomic, write_lineage
from megatron_opd.records import Lineage

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors
ORIGIN_FILE = "opd_converted.json"
# What travels with a model besides its weights.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class HfTensors:
    """Tensors of a directory by name, read when asked for; two files are open at a time. Raises UserError for what is not there."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.index = tensor_index(self.directory)
        self._files: dict[Path, Any] = {}

    def names(self) -> set[str]:
        return set(self.index)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.index:
            raise UserError(f"{self.directory}: no tensor {name!r} in its safetensors files; does config.json belong to these weights?")
        path = self.index[name][0]
        if path not in self._files:
            if len(self._files) > 1:  # an open file is mapped into memory: drop the oldest
                del self._files[next(iter(self._files))]
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path].get_tensor(name)


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy configuration and tokenizer files."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def write_hf_directory(
    target: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    side_files: Path,
    dtype: torch.dtype,
    lineage: Lineage | None = None,
    origin: dict[str, Any] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a model directory under a temporary name, read it back, then rename. `tensors` may be a generator: one file at a time is held.

    `origin`, what was converted, goes into ORIGIN_FILE.

    Raises UserError if `target` holds something already, or if a tensor read back is not the one that was given.
    """
    with whole_directory(target) as staging:
        given = _write_weights(staging, tensors, max_shard_bytes)
        found = hash_tensors(staging)
        wrong = sorted(name for name in given | found if given.get(name) != found.get(name))
        if wrong:
            raise UserError(
                f"{target}: {len(wrong)} tensors read back from disk are not what was written ({', '.join(wrong[:5])}); is the disk sound?"
            )
        remember_hashes(staging, given)
        copy_side_files(side_files, staging)
        config = json.loads((staging / "config.json").read_text())
        for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
        write_json_atomic(staging / "config.json", config)
        if lineage is not None:
            if lineage.sft is not None:
                write_turns(staging, lineage.sft)
            write_lineage(staging, lineage, for_weights=True)
        if origin is not None:
            write_json_atomic(staging / ORIGIN_FILE, origin)


def hash_tensor(name: str, tensor: torch.Tensor) -> str:
    """What `lineage.hash_tensors` finds for this tensor in a file: sha256 of name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)]).encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> dict[str, str]:
    """Returns the hash of each tensor as it was given."""
    hashes: dict[str, str] = {}
    files: list[list[str]] = []
    total = 0
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if held:
            path = folder / f"shard-{len(files):05d}.safetensors"
            try:
                save_file(held, path, metadata={"format": "pt"})
            except (SafetensorError, OSError) as error:  # a full disk
                raise not_written(path, error) from None
            files.append(list(held))
            held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and sum(t.numel() * t.element_size() for t in held.values()) + size > max_shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        hashes[name] = hash_tensor(name, tensor)
        total += size
    flush()
    weight_map = {}
    for number, names in enumerate(files):
        final = "model.safetensors" if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"shard-{number:05d}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(files) > 1:
        write_json_atomic(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes
