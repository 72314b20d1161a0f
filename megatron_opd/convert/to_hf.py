"""A Megatron-Core checkpoint of any layout into a Hugging Face directory; needs no model and no process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_opd.checkpoints.checksums import check_files, content_id, said_of
from megatron_opd.checkpoints.saved import read_state
from megatron_opd.convert.hf_files import write_hf_directory
from megatron_opd.convert.mcore_files import McoreTensors, pieces_by_layer
from megatron_opd.cost.meter import provenance
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import read_lineage
from megatron_opd.model.architecture import Architecture, read_architecture

HF_FOLDER = "hf"  # inside a checkpoint: config and tokenizer of the model that training started from


def convert_to_hf(checkpoint: Path, target: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 << 30) -> Path:
    """Write `checkpoint` (a step folder) as a Hugging Face directory, in the stored dtype or `dtype`; its files are checked first. Raises UserError,
    DamagedCheckpoint where an older checkpoint may be whole.

    One layer and one file of the result are held at a time.
    """
    if unchecked := said_of(checkpoint, check_files(checkpoint)):
        print(unchecked, flush=True)
    side_files, origin = checkpoint / HF_FOLDER, checkpoint_origin(checkpoint)
    arch, lineage = read_architecture(side_files), read_lineage(checkpoint)
    source = McoreTensors(checkpoint, arch)
    out_dtype = dtype or source.dtype
    write_hf_directory(
        target,
        hf_tensors(source, arch, out_dtype),
        side_files=side_files,
        dtype=out_dtype,
        lineage=lineage,
        origin={**origin, "dtype": str(out_dtype).removeprefix("torch."), **provenance()},
        max_shard_bytes=max_shard_bytes,
    )
    return target


def checkpoint_origin(checkpoint: Path) -> dict[str, Any]:
    """Who a checkpoint is, for the directory that is made of it: its step and, where checksums were recorded, its content; its path for people."""
    return {"step": read_state(checkpoint)["step"], "content": content_id(checkpoint), "checkpoint": str(checkpoint.absolute())}


def hf_tensors(source: McoreTensors, arch: Architecture, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its Hugging Face name, layer by layer."""
    for group in pieces_by_layer(arch):
        for (entry, index), tensor in zip(group, source.read(group), strict=True):
            for name, part in zip(entry.hf_names(index), entry.to_hf(tensor, arch), strict=True):
                yield name, _cast(name, part, dtype).clone()


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Raises UserError for a value that `dtype` can't hold."""
    cast = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and bool((cast.isinf() & ~tensor.isinf()).any()):
        largest = tensor[~tensor.isinf()].abs().max().item()
        raise UserError(
            f"{name} has values up to {largest:.6g}, which {str(dtype).removeprefix('torch.')} can't hold (at most {torch.finfo(dtype).max:.6g}); "
            "convert to bfloat16 or float32"
        )
    return cast
