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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = folder / f"{function}.json"
    environment = (
        os.environ
        | dict(environment)
        | {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        }
    )
    command = [sys.executable, str(worker), function, str(folder), str(result), json.dumps(arguments)]
    logs = [folder / f"{function}-{rank}.log" for rank in range(world)]
    children = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for child in children:
            child.wait(timeout)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    failed = [rank for rank, child in enumerate(children) if child.returncode]
    assert not failed, "\n".join(f"--- rank {rank}\n{logs[rank].read_text()[-4000:]}" for rank in failed)
    return json.loads(result.read_text())
