"""Reading tensors out of, and writing, Hugging Face model directories; files appear whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_opd.errors import UserError
from megatron_opd.lineage import tensor_index, write_json_atomic

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
    """Tensors of a directory by name, read when asked for. Raises UserError for what is not there."""

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
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path].get_tensor(name)


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy configuration and tokenizer files."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def write_hf_directory(
    target: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, side_files: Path, dtype: torch.dtype, max_shard_bytes: int = 5 << 30
) -> None:
    """Write a model directory under a temporary name, then rename. `tensors` may be a generator: one file at a time is held.

    Raises UserError if `target` holds something already.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not empty; choose another directory, or remove it")
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_weights(staging, tensors, max_shard_bytes)
        copy_side_files(side_files, staging)
        config = json.loads((staging / "config.json").read_text())
        for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
        write_json_atomic(staging / "config.json", config)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    files: list[list[str]] = []
    total = 0
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if held:
            save_file(held, folder / f"shard-{len(files):05d}.safetensors", metadata={"format": "pt"})
            files.append(list(held))
            held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and sum(t.numel() * t.element_size() for t in held.values()) + size > max_shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        total += size
    flush()
    weight_map = {}
    for number, names in enumerate(files):
        final = "model.safetensors" if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"shard-{number:05d}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(files) > 1:
        write_json_atomic(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
