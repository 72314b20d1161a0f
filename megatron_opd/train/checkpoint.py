"""Checkpoints: Megatron's distributed format with the data position inside; they appear whole and load into any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_opd.convert.hf_files import copy_side_files
from megatron_opd.convert.to_hf import HF_FOLDER
from megatron_opd.errors import CheckpointError
from megatron_opd.lineage import write_json_atomic, write_lineage
from megatron_opd.records import Lineage
from megatron_opd.train.optim import Trainee

STATE_FILE = "opd_state.json"
_LATEST = "latest"


def checkpoint_folder(output: Path) -> Path:
    return output / "checkpoints"


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none. Raises CheckpointError if `latest` names what is not there."""
    pointer = checkpoint_folder(output) / _LATEST
    if not pointer.exists():
        return None
    path = checkpoint_folder(output) / pointer.read_text().strip()
    if not (path / STATE_FILE).exists():
        raise CheckpointError(
            f"{pointer} names {path.name}, which is not a whole checkpoint; write the name of another step folder into it"
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Step, data position and the settings that must not change. Raises CheckpointError."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: no checkpoint of a run ({error})") from None


def save_checkpoint(output: Path, trainee: Trainee, state: dict[str, Any], *, init: str, lineage: Lineage, keep_last: int) -> Path:
    """Save on every rank under a temporary name, then rename and point `latest` to it. `state` has 'step'."""
    folder = checkpoint_folder(output)
    name = f"step_{state['step']:06d}"
    staging, final = folder / f".{name}.tmp", folder / name
    first = dist.get_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
    dist.barrier()
    metadata = _content_metadata(trainee)
    dist_checkpointing.save(
        _sharded_state(trainee, metadata, is_loading=False),
        str(staging),
        content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
    )
    dist.barrier()
    if first:
        copy_side_files(init, staging / HF_FOLDER)
        write_lineage(staging, lineage, for_weights=False)
        write_json_atomic(staging / STATE_FILE, state)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        pointer = folder / _LATEST
        pointer.with_suffix(".tmp").write_text(name + "\n")
        pointer.with_suffix(".tmp").replace(pointer)
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def load_checkpoint(checkpoint: Path, trainee: Trainee) -> None:
    """Fill model and optimizer, whatever layout the checkpoint was saved with. Raises CheckpointError."""
    _prime_optimizer(trainee.optimizer)
    try:
        metadata = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        loaded: Any = dist_checkpointing.load(_sharded_state(trainee, metadata, is_loading=True), str(checkpoint))
    except (OSError, EOFError, KeyError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{checkpoint} can't be loaded: {error}; point {_LATEST} to another step folder") from error
    trainee.student.load_state_dict(loaded["model"])
    with torch.no_grad():
        trainee.optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(trainee.optimizer)


def _content_metadata(trainee: Trainee) -> dict[str, Any]:
    """How the state dict is laid out; 'fully_reshardable' is the optimizer format that any other layout can load."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if trainee.ddp.ddp_config.use_distributed_optimizer:
        metadata |= {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return metadata


def _sharded_state(trainee: Trainee, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    model_state = trainee.student.sharded_state_dict(metadata=metadata)
    return {"model": model_state, "optimizer": trainee.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)}


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def _prime_optimizer(optimizer: Any) -> None:
    """Make the Adam states that a load fills: Megatron asks a loading optimizer for tensors that torch makes at its first step."""
    for inner in _torch_optimizers(optimizer):
        if not isinstance(inner, torch.optim.Adam):  # apex and Transformer Engine make them by Megatron's own call
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _unshare_steps(optimizer: Any) -> None:
    """After a load all states share one 'step' tensor, which every parameter's update would count up; give each its own."""
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
