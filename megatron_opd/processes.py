"""Child processes that end with the process that started them, kill -9 included, and who of them hears which signal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what asks a training run to save and stop
# Ctrl-C in the words of our launcher: a terminal gives SIGINT to every process at once, and a rank would count it twice.
INTERRUPT = signal.SIGUSR2


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
    for number in (*STOP_SIGNALS, signal.SIGINT, INTERRUPT):
        signal.signal(number, signal.SIG_IGN)


def leave_interrupts_to_parent() -> None:
    """In a process that writes for its parent: Ctrl-C, which a terminal gives to all, is for the parent to act on."""
    for number in (signal.SIGINT, INTERRUPT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals that ask to stop wait until the end of the block; a process that is started in it never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGINT, INTERRUPT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
