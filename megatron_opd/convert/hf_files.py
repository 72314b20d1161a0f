"""Reading tensors out of, and writing, Hugging Face model directories; files appear whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_opd.convert.staging import not_written, whole_directory
from megatron_opd.convert.turn_files import write_turns
from megatron_opd.convert.written import sum_folder
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import ORIGIN_FILE, hash_tensors, remember_hashes, tensor_index, write_lineage
from megatron_opd.hf.model_config import carried_config
from megatron_opd.records import Lineage
from megatron_opd.safety.durable import write_file, write_json
from megatron_opd.safety.untrusted import read_json

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors
# What travels with a model besides its weights: configuration, every kind of tokenizer file, chat templates.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "tekken.json",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
)
_CODE = (".py", ".pyc")  # remote code, which is never run, stays behind


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
            self._files[path] = _reading(path, lambda: safe_open(path, framework="pt"))
        return _reading(path, lambda: self._files[path].get_tensor(name))


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives. Raises UserError for a file that the library can't read."""
    try:
        return read()
    except SafetensorError as error:
        raise UserError(f"{path}: can't be read: {error}; copy or convert it again") from None


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy configuration, tokenizer files and chat templates; of a link (as in a download cache) the content."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for path in sorted({path for pattern in SIDE_FILES for path in Path(source).glob(pattern)}):
        name = path.relative_to(source)
        if path.is_file() and path.suffix not in _CODE and not path.name.startswith((".", "opd_")):
            (Path(target) / name).parent.mkdir(exist_ok=True)
            write_file(Path(target) / name, path.read_bytes())


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
    """Write a model directory under a temporary name, read it back, then publish it. `tensors` may be a generator: one file at a time is held.

    `origin`, what was converted, goes into ORIGIN_FILE, with the sums of the files that were written.

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
        _write_configs(staging, dtype)
        if lineage is not None:
            if lineage.sft is not None:
                write_turns(staging, lineage.sft)
            write_lineage(staging, lineage, for_weights=True)
        if origin is not None:
            write_json(staging / ORIGIN_FILE, origin | {"files": sum_folder(staging)})


def _write_configs(folder: Path, dtype: torch.dtype) -> None:
    """config.json as the weights now are; both it and tokenizer_config.json for every version, without remote code. Raises UserError."""
    path = folder / "config.json"
    config = carried_config(read_json(path), str(path))
    for key in {"dtype", "torch_dtype"} & set(config) or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    write_json(path, config)
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path) if path.exists() else None
    if isinstance(tokenizer, dict):
        tokenizer.pop("auto_map", None)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # what version 5 calls it, which version 4 doesn't know
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, tokenizer)


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
    (probe := folder / "mode").touch()  # has the mode that the umask gives, which nothing else tells without a change to it
    mode = probe.stat().st_mode
    probe.unlink()

    def flush() -> None:
        if held:
            path = folder / f"shard-{len(files):05d}.safetensors"
            try:
                save_file(held, path, metadata={"format": "pt"})
            except (SafetensorError, OSError) as error:  # a full disk
                raise not_written(path, error) from None
            path.chmod(mode)  # safetensors writes for the owner alone
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
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes
