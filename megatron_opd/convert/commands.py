"""`megatron-opd convert` and tools/convert_checkpoint.py: from paths to conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_opd.checksums import content_id, record_checksums, sum_files, write_part
from megatron_opd.config import Recipe, require
from megatron_opd.convert.hf_files import copy_side_files, hash_tensor
from megatron_opd.convert.mcore_files import McoreTensors, write_mcore_checkpoint
from megatron_opd.convert.source import global_tensor, open_source, stored_dtype
from megatron_opd.convert.staging import whole_directory
from megatron_opd.convert.to_hf import HF_FOLDER, checkpoint_origin, convert_to_hf, hf_tensors
from megatron_opd.cost import provenance
from megatron_opd.durable import write_json
from megatron_opd.errors import CheckpointError, UserError
from megatron_opd.lineage import ORIGIN_FILE, hash_tensors, read_lineage, write_lineage
from megatron_opd.model.architecture import Architecture, read_architecture
from megatron_opd.progress import stage_progress
from megatron_opd.records import Lineage
from megatron_opd.train.saved import STATE_FILE, latest_checkpoint
from megatron_opd.untrusted import read_object


def to_hf(checkpoint: str, target: str, *, dtype: str | None = None) -> Path:
    """Convert a run's latest checkpoint, or one step folder. Raises UserError."""
    path = Path(checkpoint)
    if not (path / STATE_FILE).exists():
        latest = latest_checkpoint(path)
        if latest is None:
            raise CheckpointError(f"{path}: neither a checkpoint nor the output of a run with one (checkpoints/latest)")
        path = latest
    return convert_to_hf(path, Path(target), dtype=None if dtype is None else getattr(torch, dtype))


def trained_to_hf(recipe: Recipe, stage: str) -> str:
    """Convert what `sft` or `train` made to the directory that rollout or eval reads; says what was done.

    A directory that holds the latest checkpoint's model is left alone. Raises UserError for one that holds another model, and for a run
    that is not finished.
    """
    source = Path(recipe.sft.output if stage == "sft" else recipe.train.output)
    target = Path(require(recipe.rollout, "rollout").model if stage == "sft" else require(recipe.eval, "eval").model)
    progress = stage_progress(recipe, stage)
    if not progress.finished:
        raise CheckpointError(f"{source}: {progress.done} of {progress.total} steps; finish it ('megatron-opd {stage}'), then convert")
    latest = latest_checkpoint(source)
    if latest is None or not (target / "config.json").exists():
        return f"wrote {to_hf(str(source), str(target))}"
    now, origin = checkpoint_origin(latest), _read_origin(target)
    read_lineage(target)  # raises if its weights are others than were written
    if origin is not None and None not in (origin["content"], now["content"]):
        same = origin["content"] == now["content"]
    else:  # an older version made one of them: the weights themselves tell
        same = _holds_model_of(latest, target)
        if same:
            write_json(target / ORIGIN_FILE, now | provenance())
    if not same:
        made_of = f"step {origin['step']} ({origin['checkpoint']})" if origin else "another model, it is not recorded which"
        raise UserError(
            f"{target} was made of {made_of}, but the latest checkpoint of {source} is of step {now['step']} ({latest.name}); what was made with "
            "that model (rollouts, evaluations) is of it too: move the directory away and convert again, or give another run_dir"
        )
    return f"{target} is there already, of step {now['step']}"


def _read_origin(target: Path) -> dict[str, Any] | None:
    """What `target` was converted from, None if that is not recorded. Raises UserError."""
    path = target / ORIGIN_FILE
    try:
        origin = read_object(path)
        return {key: origin[key] for key in ("step", "content", "checkpoint")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}); remove this file, and the weights are compared instead") from None


def _holds_model_of(checkpoint: Path, target: Path) -> bool:
    """Whether every tensor in `target` is the checkpoint's, in the dtype that it has there."""
    arch = read_architecture(checkpoint / HF_FOLDER)
    found, dtype = hash_tensors(target), stored_dtype(str(target))
    names = set()
    for name, tensor in hf_tensors(McoreTensors(checkpoint, arch), arch, dtype):
        if found.get(name) != hash_tensor(name, tensor):
            return False
        names.add(name)
    return names == found.keys()


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
        write_part(staging, 0, sum_files(staging.glob("*.distcp")))
        record_checksums(staging)
        copy_side_files(model, staging / HF_FOLDER)
        write_lineage(staging, lineage or Lineage(), for_weights=False)
        write_json(staging / STATE_FILE, {"step": 0, "position": {}, "content": content_id(staging), **provenance()})
    return folder


def _check_same_tensors(written: McoreTensors, arch: Architecture, model: str) -> None:
    """Raise CheckpointError unless every tensor, mapped back, has the hash that it has in the Hugging Face directory."""
    wanted = hash_tensors(model)
    wrong = [name for name, tensor in hf_tensors(written, arch, written.dtype) if hash_tensor(name, tensor) != wanted[name]]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors read back from disk are not what was written ({', '.join(wrong[:5])}); is the disk sound?"
        )
