"""Asking a run to stop: by SIGTERM, SIGUSR1 or a file. It finishes its step, saves and exits with 0."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.processes import STOP_SIGNALS

STOP_FILE = "STOP"


class StopRequest:
    """Every rank hears of a signal to any rank, and of the file STOP in the run's output folder.

    Slurm gives a signal to every process of a step, also to those that are writing a checkpoint, and its job script repeats SIGUSR1:
    they must live through it. What this thread starts inherits that SIGUSR1 is blocked.
    """

    def __init__(self, output: Path) -> None:
        self.file = output / STOP_FILE
        self._signalled = False
        self._before = {number: signal.signal(number, self._set) for number in STOP_SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def _set(self, number: int, frame: Any) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """Called on every rank, once a step."""
        waiting = signal.SIGUSR1 in signal.sigpending()  # no other thread took it
        asked = self._signalled or waiting or (dist.get_rank() == 0 and self.file.exists())
        flag = torch.tensor(float(asked), device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def done(self) -> None:
        """The request was followed: the next run is not to stop for the same file."""
        if dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # one that waited comes to the handler now
        for number, handler in self._before.items():
            signal.signal(number, handler)
