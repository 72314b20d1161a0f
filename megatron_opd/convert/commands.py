"""`megatron-opd convert` and tools/convert_checkpoint.py: from paths to conversions."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_opd.checkpoints.checksums import collect_sums, id_of, record_checksums, sum_files, write_part
from megatron_opd.checkpoints.saved import STATE_FILE, find_checkpoint
from megatron_opd.convert.hf_files import copy_side_files, hash_tensor
from megatron_opd.convert.mcore_files import McoreTensors, write_mcore_checkpoint
from megatron_opd.convert.source import global_tensor, open_source, stored_dtype
from megatron_opd.convert.staging import whole_directory
from megatron_opd.convert.to_hf import HF_FOLDER, convert_to_hf, hf_tensors
from megatron_opd.cost.meter import provenance
from megatron_opd.errors import CheckpointError, DamagedCheckpoint
from megatron_opd.hf.lineage import hash_tensors, read_lineage, write_lineage
from megatron_opd.model.architecture import Architecture, read_architecture
from megatron_opd.records import Lineage
from megatron_opd.safety.durable import write_json


def to_hf(checkpoint: str, target: str, *, dtype: str | None = None) -> Path:
    """Convert a run's latest checkpoint, or one step folder. Raises UserError."""
    path, out_dtype = Path(checkpoint), None if dtype is None else getattr(torch, dtype)
    if (path / STATE_FILE).exists():
        return _convert_one(path, Path(target), out_dtype)
    damaged: dict[Path, str] = {}
    while True:
        found = find_checkpoint(path, damaged)
        if found.checkpoint is None:
            raise CheckpointError(f"{path}: neither a checkpoint nor the output of a run with one (checkpoints/latest)")
        try:
            written = convert_to_hf(found.checkpoint, Path(target), dtype=out_dtype)
        except DamagedCheckpoint as error:
            damaged[found.checkpoint] = str(error)
            continue
        for note in found.notes:
            print(f"WARNING: {note}", flush=True)
        return written


def _convert_one(checkpoint: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Convert this checkpoint and no other."""
    try:
        return convert_to_hf(checkpoint, target, dtype=dtype)
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error}; use another step folder") from None


def to_mcore(model: str, target: str) -> Path:
    """Write a Hugging Face directory as a Megatron-Core checkpoint (torch_dist), in its dtype, one tensor at a time; then read it back.

    Raises UserError, also if what is read back is not bit for bit what was given.
    """
    folder = Path(target)
    arch, lineage = read_architecture(model), read_lineage(model)
    source = open_source(model, arch)
    with whole_directory(folder) as staging:
        write_mcore_checkpoint(staging, arch, stored_dtype(model), lambda entry, index: global_tensor(source, entry, arch, index))
        _check_same_tensors(McoreTensors(staging, arch), arch, model)
        write_part(staging, 0, sum_files(staging, (path.name for path in staging.glob("*.distcp"))))
        data = collect_sums(staging)
        copy_side_files(model, staging / HF_FOLDER)
        write_lineage(staging, lineage or Lineage(), for_weights=False)
        write_json(staging / STATE_FILE, {"step": 0, "position": {}, "content": id_of(data), **provenance()})
        record_checksums(staging, data)
    return folder


def _check_same_tensors(written: McoreTensors, arch: Architecture, model: str) -> None:
    """Raise CheckpointError unless every tensor, mapped back, has the hash that it has in the Hugging Face directory."""
    wanted = hash_tensors(model)
    wrong = [name for name, tensor in hf_tensors(written, arch, written.dtype) if hash_tensor(name, tensor) != wanted[name]]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors read back from disk are not what was written ({', '.join(wrong[:5])}); is the disk sound?"
        )
