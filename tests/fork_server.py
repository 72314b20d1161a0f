"""Runs commands and scripts in forks of one process that has imported what takes long: a run then costs no imports.

The server is this file as a program: a line on its stdin is an order, a line on its stdout the answer. `ForkServer` is its client.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_opd.safety.processes import LISTENER

TOOLS = str(Path(__file__).parents[1] / "tools")
sys.path.insert(0, TOOLS)
try:
    from study import forks
finally:
    sys.path.remove(TOOLS)

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
IMPORTED = (
    *forks.IMPORTED, "megatron_opd.train.logp", "megatron_opd.checks.calibrate", "megatron_opd.report.write",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3_moe")),
)  # fmt: skip
_POLL_SECONDS = 0.003
_GRACE_SECONDS = 30.0  # of jobs beside one that failed


@dataclass(frozen=True)
class Job:
    """One process: a megatron-opd command, or with `script` a program; `log` has its output.

    environment: those with a RANK meet at a socket of the server's, as a port that was free a moment ago may be taken.
    threads: of PyTorch; sums, and so last bits, depend on them.
    kill_at: kill -9 comes before the n-th file operation on a path with `below` in it, be it of the process or of one that it started.
    """

    words: Sequence[str]
    log: str
    script: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    below: str | None = None
    kill_at: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Ending:
    """How a job ended: `code` is None of a killed one; `operations` were made on files below `Job.below`."""

    code: int | None
    operations: int

    @property
    def killed(self) -> bool:
        return self.code is None


class ForkServer:
    """Starts the server, which is ready when it has imported `IMPORTED`."""

    def __init__(self) -> None:
        # What runs on a GPU is started otherwise: a fork could not use it, and Megatron-Core is prepared for CPUs when it is imported.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *jobs: Job, kill_after: float | None = None, timeout: float = 600) -> list[Ending]:
        """Run jobs beside one another until all have ended. After `kill_after` seconds they are killed; after
        `timeout`, too, with AssertionError; and a while after one of them has failed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(
            json.dumps({"jobs": [asdict(job) for job in jobs], "seconds": timeout if kill_after is None else kill_after}),
            file=stdin,
            flush=True,
        )
        answer = json.loads(stdout.readline())
        endings = [Ending(**ending) for ending in answer["endings"]]
        failed = any(ending.code != 0 for ending in endings)
        assert kill_after is not None or failed or not answer["late"], f"not done after {timeout} s: {[job.log for job in jobs]}"
        return endings

    def close(self) -> None:
        self._process.communicate()


@cache
def shared_server() -> ForkServer:
    """The one of this test run."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def _work(job: Job, count: Any, meeting: socket.socket) -> int:
    """In the fork."""
    os.environ |= job.environment
    if "RANK" in job.environment:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1]), LISTENER: str(meeting.fileno())}
    if job.environment.get("RANK") == "0":
        meeting.detach()  # it is torch's now
    meeting.close()
    if job.threads > 1:
        import torch

        torch.set_num_threads(job.threads)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and job.below in str(arguments[0]):  # pyright: ignore
            with count.get_lock():
                count.value += 1
                if count.value == job.kill_at:
                    os.killpg(0, signal.SIGKILL)

    if job.below is not None:
        sys.addaudithook(hook)
    if job.script is None:
        from megatron_opd.cli import main

        return main(list(job.words))
    sys.argv = [job.script, *job.words]
    sys.path.insert(0, str(Path(job.script).parent))
    runpy.run_path(job.script, run_name="__main__")
    return 0


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        order = json.loads(line)
        jobs = [Job(**job) for job in order["jobs"]]
        counts = [context.Value("q", 0) for _ in jobs]
        with socket.create_server(("127.0.0.1", 0), backlog=len(jobs)) as meeting:
            running = {
                forks.fork(partial(_work, job, count, meeting), Path(job.log)): number
                for number, (job, count) in enumerate(zip(jobs, counts, strict=True))
            }
        codes: dict[int, int | None] = {}
        end, late = time.monotonic() + order["seconds"], False
        while running:
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[running.pop(pid)] = code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                    if code != 0:  # those that wait for it have a while to say so
                        end = min(end, time.monotonic() + _GRACE_SECONDS)
            if running and time.monotonic() > end:
                late = True  # again and again: a fork that is a moment old has no group yet
                for pid in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS if running else 0)
        # A count's lock may have died with its holder.
        endings = [{"code": codes[number], "operations": count.get_obj().value} for number, count in enumerate(counts)]
        print(json.dumps({"endings": endings, "late": late}), flush=True)


if __name__ == "__main__":
    _serve()
