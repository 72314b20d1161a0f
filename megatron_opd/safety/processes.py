"""Child processes that end with the process that started them, kill -9 included, and who of them hears which signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what asks a training run to save and stop
# Ctrl-C in the words of our launcher: a terminal gives SIGINT to every process at once, and a rank would count it twice.
INTERRUPT = signal.SIGUSR2
LISTENER = "OPD_LISTENER"  # in a rank of our launcher: the socket at which the first rank listens for the others


def end_with_parent(parent: int) -> None:
    """In a child: ask the kernel to end this process when `parent`, its starter, ends. Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this one has ended")


def leave_interrupts_to_parent() -> None:
    """In a process that writes for its parent: Ctrl-C, which a terminal gives to all, is for the parent to act on."""
    for number in (signal.SIGINT, INTERRUPT):
        signal.signal(number, signal.SIG_IGN)


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU; asks no library, so that nothing is started on it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
