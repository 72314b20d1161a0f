"""Runs a function of a worker script on several gloo ranks and gives back what rank 0 wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from fork_server import Job, shared_server

from megatron_opd.safety.processes import LISTENER

WORKER = Path(__file__).with_name("worker.py")
KERNEL_WORKER = Path(__file__).with_name("kernel_worker.py")
LOSS_WORKER = Path(__file__).with_name("loss_worker.py")
TRAINER_WORKER = Path(__file__).with_name("trainer_worker.py")


def run_ranks(
    function: str,
    world: int,
    folder: Path,
    *,
    worker: Path = WORKER,
    timeout: float = 600,
    on_gpus: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
    **arguments: Any,
) -> Any:
    """On CPUs unless `on_gpus`. Raises AssertionError with the failing rank's output; every rank has ended when this returns."""
    result = folder / f"{function}.json"
    common = {
        **environment,
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    words = [function, str(folder), str(result), json.dumps(arguments)]
    logs = [folder / f"{function}-{rank}.log" for rank in range(world)]
    for log in logs:
        log.unlink(missing_ok=True)
    if on_gpus or environment or torch.cuda.is_available():  # what these change is looked at when something is imported
        codes = _processes([sys.executable, str(worker), *words], ranks, logs, timeout)
    else:
        jobs = [Job(words, str(log), str(worker), rank) for rank, log in zip(ranks, logs, strict=True)]
        codes = [ending.code for ending in shared_server().run(*jobs, timeout=timeout)]
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    assert not failed, "\n".join(f"--- rank {rank}\n{logs[rank].read_text()[-4000:]}" for rank in failed)
    return json.loads(result.read_text())


def _processes(command: list[str], ranks: list[dict[str, str]], logs: list[Path], timeout: float) -> list[int | None]:
    with socket.create_server(("127.0.0.1", 0), backlog=len(ranks)) as meeting:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1]), LISTENER: str(meeting.fileno())}
        children = [
            subprocess.Popen(
                command,
                env=os.environ | world | rank,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                pass_fds=() if number else (meeting.fileno(),),
            )
            for number, (rank, log) in enumerate(zip(ranks, logs, strict=True))
        ]
    try:
        for child in children:
            child.wait(timeout)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    return [child.returncode for child in children]
