"""Asking a run to stop: by SIGTERM, SIGUSR1 or a file, or by Ctrl-C. It finishes its step, saves and exits with 0, after Ctrl-C with 130."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.checkpoints.saved import last_saved
from megatron_opd.errors import INTERRUPTED
from megatron_opd.safety.processes import INTERRUPT, STOP_SIGNALS

STOP_FILE = "STOP"
STOPPING = "interrupted: the step under way is finished and saved first; a second Ctrl-C ends at once"


def not_started(output: str | Path) -> str:
    return f"interrupted before training had started; {last_saved(output)}; the same command goes on"


def ended_at_once(output: str | Path) -> str:
    return f"interrupted again: ended at once; {last_saved(output)}; steps that no checkpoint holds are lost; the same command goes on"


class StopRequest:
    """Every rank hears of a signal to any rank, and of the file STOP in the run's output folder.

    Slurm gives a signal to every process of a step, also to those that are writing a checkpoint, and its job script repeats SIGUSR1:
    they must live through it. What this thread starts inherits that SIGUSR1 is blocked. A second Ctrl-C ends the process at once; in
    a rank of our launcher, which alone hears the terminal's SIGINT and passes it on as `processes.INTERRUPT`, the launcher does that.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.file = output, output / STOP_FILE
        self._process = os.getpid()
        self._signalled = self._interrupted = False
        self.interrupted = False  # a Ctrl-C, on whatever rank, is among what `requested` found
        self._before = {number: signal.signal(number, self._set) for number in STOP_SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def listen_to_interrupts(self) -> None:
        """Called on every rank before the first step; until then, Ctrl-C ends the run as it ends any program."""
        self._before |= {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, INTERRUPT)}
        self.requested()  # a collective: when it returns, every rank listens

    def _set(self, number: int, frame: Any) -> None:
        self._signalled = True

    def _interrupt(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a writer of a checkpoint, forked a moment ago
            return
        again, self._interrupted = self._interrupted, True
        if number == INTERRUPT:
            return
        os.write(2, f"\n{ended_at_once(self.output) if again else STOPPING}\n".encode())  # print may be interrupted itself
        if again:
            os._exit(INTERRUPTED)

    def noticed(self) -> bool:
        """On the first rank alone, while the others wait for it: whether `requested` will find something."""
        return self._signalled or self._interrupted or signal.SIGUSR1 in signal.sigpending() or self.file.exists()

    def requested(self) -> bool:
        """Called on every rank, once a step."""
        waiting = signal.SIGUSR1 in signal.sigpending()  # no other thread took it
        asked = self._signalled or waiting or (dist.get_rank() == 0 and self.file.exists())
        flags = torch.tensor([float(asked), float(self._interrupted)])  # between hosts: a GPU would first finish its step
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        by_signal, interrupted = flags.tolist()
        self.interrupted = bool(interrupted)
        return bool(by_signal or interrupted)

    def done(self) -> None:
        """The request was followed: the next run is not to stop for the same file."""
        if dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # one that waited comes to the handler now
        for number, handler in self._before.items():
            if number != INTERRUPT:
                signal.signal(number, handler)
        signal.signal(INTERRUPT, signal.SIG_IGN)  # everything is saved: a late one must not end this rank before the others
