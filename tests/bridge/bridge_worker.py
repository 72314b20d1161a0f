"""megatron-bridge's side of test_bridge.py, in a process where Transformer Engine is a stand-in. Usage: bridge_worker.py FOLDER...

Reads FOLDER/model (Hugging Face) and FOLDER/mcore (our checkpoint of it). Writes, beside them,
    bridge-mcore.safetensors   global tensors, by checkpoint key, of the Megatron model that the bridge filled from `model`
    bridge-hf.safetensors      what the bridge exports from that model
    loaded-hf.safetensors      what it exports once Megatron-Core has loaded `mcore` over that model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import stand_ins  # noqa: F401  # isort: skip
import megatron_opd.model  # noqa: F401  # isort: skip  (prepares megatron.core, so it comes next)

import torch
import torch.distributed as dist
from megatron.bridge import AutoBridge
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from safetensors.torch import save_file

from megatron_opd.convert.to_mcore import sharded_tensors

METADATA = {"singleton_local_shards": False}


def convert(folder: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(str(folder / "model"))
    provider = bridge.to_megatron_provider()
    provider.gradient_accumulation_fusion = False  # needs a CUDA extension
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    (model,) = unwrap_model(chunks)
    save(global_tensors(model), folder / "bridge-mcore.safetensors")
    save(dict(bridge.export_hf_weights(chunks, show_progress=False)), folder / "bridge-hf.safetensors")
    load_checkpoint_(model, folder / "mcore")
    save(dict(bridge.export_hf_weights(chunks, show_progress=False)), folder / "loaded-hf.safetensors")


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


def global_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors as a checkpoint would hold them; there is one rank, so its shards are all of them."""
    sharded = dict(model.sharded_state_dict(metadata=METADATA))
    apply_factories(sharded)
    whole: dict[str, torch.Tensor] = {}
    for shard in sharded_tensors(sharded):
        tensor = whole.setdefault(shard.key, torch.full(shard.global_shape, float("nan"), dtype=shard.dtype))
        assert shard.data is not None
        tensor[shard.global_slice()] = shard.data
    return whole


def load_checkpoint_(model: Any, checkpoint: Path) -> None:
    """As a Megatron program loads it, over NaNs: what the checkpoint lacks stays one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    loaded: Any = dist_checkpointing.load(
        model.sharded_state_dict(metadata=METADATA), str(checkpoint), strict=StrictHandling.LOG_UNEXPECTED
    )
    model.load_state_dict(loaded, strict=False)


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    for name in sys.argv[1:]:
        convert(Path(name))
    dist.destroy_process_group()
