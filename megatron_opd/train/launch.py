"""Starts the ranks of one node when nobody else (torchrun, Slurm) has; ends them all when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from megatron_opd.processes import STOP_SIGNALS, end_with_parent

_LAUNCHED = "OPD_LAUNCHED_BY"


def is_rank() -> bool:
    """True in a process that torchrun, or `launch`, started."""
    return "RANK" in os.environ


def default_ranks(model_parallel: int) -> int:
    """Ranks to start on this node: one a GPU, or as few as the model-parallel layout needs on a CPU."""
    import torch

    return torch.cuda.device_count() or model_parallel


def launch(arguments: list[str], ranks: int) -> int:
    """Run `megatron-opd ARGUMENTS` as `ranks` processes of this node; returns the first exit code that is not 0.

    SIGTERM, SIGINT and SIGUSR1 are passed on. Should this process be killed, its ranks end too.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        _LAUNCHED: str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    children = [
        subprocess.Popen([sys.executable, "-m", "megatron_opd", *arguments], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]

    def pass_on(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code]
            if failed:
                time.sleep(1)  # let the others say what they have to say
                return next(
                    (code for code in (child.poll() for child in children) if code == 2), failed[0] if failed[0] > 0 else 128 - failed[0]
                )
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.1)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()  # the others wait in a collective; what counts is on disk
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """In a rank of ours: ask the kernel to end this process when its launcher ends (kill -9 included)."""
    launcher = os.environ.get(_LAUNCHED)
    if launcher is not None:
        end_with_parent(int(launcher))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
