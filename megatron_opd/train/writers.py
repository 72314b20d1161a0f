"""The processes that write a checkpoint while training goes on: one a rank, with one of its own a file. None can end unseen.

Megatron-Core's writer waits for its workers for ever if one is killed, and reports to its rank through a third process; here the writer
looks after its workers, reports through a file that it shares with its rank, and the rank looks after it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_opd.checkpoints.checksums import sum_files, write_part
from megatron_opd.safety.processes import end_with_parent, leave_interrupts_to_parent, signal_name

_FAILED = 1  # exit code of a writer
_LOOK_SECONDS = 0.5


class Results:
    """What a rank's writer hands to its rank, the last thing alone: memory, which a forked process shares."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("writer"), "r+b")
        self.rank = os.getpid()

    def install(self) -> None:
        """Let Megatron-Core's writers of this process use it."""
        filesystem_async._results_queue = self  # pyright: ignore[reportAttributeAccessIssue]

    def put(self, value: Any) -> None:
        """In the writer, its signal handlers included."""
        descriptor = self._file.fileno()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, pickle.dumps(value), 0)

    def get_nowait(self) -> Any:
        """Raises queue.Empty."""
        descriptor = self._file.fileno()
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        os.ftruncate(descriptor, 0)
        try:
            return pickle.loads(content)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


def write_and_sum(write: Callable[..., None], staging: Path, results: Results, rank: int, *args: Any) -> None:
    """The writer of a rank: write the rank's files, then read them back for their checksums; training goes on meanwhile."""
    leave_interrupts_to_parent()
    gc.disable()  # as Megatron-Core does: the parent's CUDA tensors must not be freed here
    end_with_parent(results.rank)
    writer = os.getpid()
    os.register_at_fork(after_in_child=lambda: _end_with(writer))  # a worker alone would wait for its writer for ever
    signal.signal(signal.SIGALRM, lambda number, frame: _look_after_workers(results))
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)  # a SIGCHLD that comes just before a wait would not end it
    try:
        write(rank, *args)
    except Exception as error:
        results.put(f"process {writer}, which wrote its files: {type(error).__name__}: {error}")
        os._exit(_FAILED)
    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(OSError):  # a full disk: publishing finds what is lacking
        write_part(staging, rank, sum_files(staging, (path.name for path in staging.glob(f"__{rank}_*"))))


def _end_with(writer: int) -> None:
    try:
        end_with_parent(writer)
    except SystemExit:
        os._exit(_FAILED)


def _look_after_workers(results: Results) -> None:
    """End with a reason once one of them has ended otherwise than by itself; Megatron-Core would wait for it."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            if code:
                results.put(f"process {ended[0]}, which wrote one of its files, {_ending(code)}")
                os._exit(_FAILED)


def how_it_ended(writer: Any, results: Results) -> str | None:
    """Why a rank's writer, which is not alive, did not do its work; None if it did."""
    if not writer.exitcode:
        return None
    with contextlib.suppress(queue.Empty):
        if writer.exitcode == _FAILED and isinstance(reason := results.get_nowait(), str):
            return reason
    return f"process {writer.pid}, which wrote its files, {_ending(writer.exitcode)}"


def _ending(code: int) -> str:
    return f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
