"""Child processes that end with the process that started them, kill -9 included."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what asks a training run to save and stop


def end_with_parent(parent: int) -> None:
    """In a child: ask the kernel to end this process when `parent`, its starter, ends. Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this one has ended")


def serve_parent(parent: int) -> None:
    """In a helper process: live exactly as long as `parent`; a stop signal to the whole job is for `parent` to act on."""
    end_with_parent(parent)
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
