"""Starts torch.distributed and Megatron-Core's parallel groups for this process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.layout import ParallelConfig
from megatron_opd.safety.processes import LISTENER


def start(parallel: ParallelConfig, *, seed: int, timeout_minutes: int = 30) -> torch.device:
    """Join the world that torchrun (or our launcher) describes, or a world of one, and make the groups. Returns the device.

    Raises ConfigError if the world's size is not a multiple of what the groups need.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.check_ranks(world)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"rank {local} of this node has no GPU, there are {count}; start {count} ranks here, or set CUDA_VISIBLE_DEVICES='' for CPUs"
            )
        if parallel.tp > 1 or parallel.cp > 1:  # so that messages overlap with matrix products; before Blackwell it takes this
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with _on_loopback() if "RANK" not in os.environ else contextlib.nullcontext():
        if not dist.is_initialized():
            _join_world(device, world, timedelta(minutes=timeout_minutes))
        if parallel_state.model_parallel_is_initialized():
            _drop_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=timeout_minutes,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    return device


def _join_world(device: torch.device, world: int, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if listener := os.environ.pop(LISTENER, None):
        rank = int(os.environ["RANK"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Its socket is one that the launcher bound to this machine's own address; torch would listen on all.
        make_store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        store = make_store(address, port, world, rank == 0, timeout, master_listen_fd=int(listener) if rank == 0 else None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Groups that a process makes for itself listen on this machine's own address; programs that it starts are told nothing of it."""
    ours = sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ
    if ours:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if ours:
            del os.environ["GLOO_SOCKET_IFNAME"]


def make_deterministic() -> None:
    """Choose kernels that give the same bits each time, in this process from now on; before CUDA and NCCL start.

    PyTorch warns of an operation that has no such kernel. Transformer Engine and cuBLAS read the variables, NCCL its algorithm.
    """
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill: Any = torch.utils.deterministic
    fill.fill_uninitialized_memory = False  # helps to find bugs, and is slow


def stop() -> None:
    """Leave the world; the next start makes a new one."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _drop_groups() -> None:
    """Forget the groups of an earlier layout: each gloo group keeps threads that wake up all the time."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
