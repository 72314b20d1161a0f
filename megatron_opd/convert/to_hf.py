"""A Megatron-Core checkpoint of any layout into a Hugging Face directory; needs no model and no process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

from megatron_opd.convert.hf_files import write_hf_directory
from megatron_opd.convert.mapping import Entry, table
from megatron_opd.errors import CheckpointError
from megatron_opd.lineage import read_lineage, write_lineage
from megatron_opd.model.architecture import Architecture, read_architecture

HF_FOLDER = "hf"  # inside a checkpoint: config and tokenizer of the model that training started from


def convert_to_hf(checkpoint: Path, target: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write `checkpoint` (a step folder) as a Hugging Face directory, in the stored dtype or `dtype`. Raises UserError."""
    side_files = checkpoint / HF_FOLDER
    arch = read_architecture(side_files)
    reader = FileSystemReader(checkpoint)
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: not a whole Megatron checkpoint ({error}); use another step") from None
    stored = {key: entry for key, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    missing = [entry.mcore for entry in table(arch) if entry.mcore not in stored]
    if missing:
        raise CheckpointError(
            f"{checkpoint}: the checkpoint has no {', '.join(missing)}; it was made for another architecture than {arch.name}"
        )
    out_dtype = dtype or stored[table(arch)[0].mcore].properties.dtype
    write_hf_directory(target, _hf_tensors(reader, stored, arch, out_dtype), side_files=side_files, dtype=out_dtype)
    lineage = read_lineage(checkpoint)
    if lineage is not None:
        write_lineage(target, lineage, for_weights=True)
    return target


def _hf_tensors(
    reader: FileSystemReader, stored: dict[str, TensorStorageMetadata], arch: Architecture, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in table(arch):
        record = stored[entry.mcore]
        whole = {entry.mcore: torch.empty(record.size, dtype=record.properties.dtype)}
        load_dcp(whole, storage_reader=reader, no_dist=True)
        yield from _split(entry, whole[entry.mcore], arch, dtype)


def _split(entry: Entry, tensor: torch.Tensor, arch: Architecture, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    if not entry.per_layer:
        yield from zip(entry.hf_names(None), (part.to(dtype) for part in entry.to_hf(tensor, arch)), strict=True)
        return
    for layer in range(arch.num_layers):
        for name, part in zip(entry.hf_names(layer), entry.to_hf(tensor[layer], arch), strict=True):
            yield name, part.to(dtype).clone()
