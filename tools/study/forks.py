"""megatron-opd commands in forks of one process that has imported what takes long, each with the CPU time that it took.

`fork` and IMPORTED are the tests' too (tests/fork_server.py).
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.safety.processes import end_with_parent

# In this order: megatron_opd.model.parallel prepares megatron.core.
IMPORTED = (
    "megatron_opd.model.parallel", "megatron_opd.pipeline.all_rounds", "megatron_opd.convert.commands", "megatron_opd.evaluate.run",
    "megatron_opd.serve.transformers_engine", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A command that has ended. `cpu_seconds`: user and system, of it and of the processes that it waited for; a negative code is a signal."""

    pid: int
    code: int
    cpu_seconds: float


def load() -> None:
    """Import what the commands need, each of which gets one thread: two lanes of as many threads as there are cores would wait for each other, and a
    fork can't use threads that were started before it. Raises RuntimeError if torch is there already, with more."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; torch.set_num_threads() would make a pool that no fork can use
    with warnings.catch_warnings():  # of packages that Megatron-Core does without
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)
    if (threads := importlib.import_module("torch").get_num_threads()) != 1:
        raise RuntimeError(f"torch was imported with {threads} threads before the study asked for one; set OMP_NUM_THREADS=1")


def start(words: Sequence[str], log: Path) -> int:
    """Run 'megatron-opd WORDS' in a fork, which `stop` can end as Ctrl-C would."""

    def run() -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        print(f"$ megatron-opd {' '.join(words)}", flush=True)
        from megatron_opd.cli import main

        return main(list(words))

    log.parent.mkdir(parents=True, exist_ok=True)
    return fork(run, log)


def fork(run: Callable[[], int], log: Path) -> int:
    """Exit with what `run` returns in a fork, which is a process group of its own and ends with this process. Output goes behind what is in `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        end_with_parent(parent)
        for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
            os.dup2(os.open(path, flags, 0o644), number)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))  # a test runner has others
        faulthandler.enable(2)  # an abort in a library says where
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait() -> Ended:
    """The next command that ends."""
    pid, status, usage = os.wait4(-1, 0)
    return Ended(pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)


def stop(pids: Sequence[int]) -> None:
    """Ask commands to stop, and wait until they have."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
