"""Grading in processes that a response can slow down, fill or crash without harm: a pool of `grading_worker`s.

Every response gets one verdict, in the order they are given in, and it does not depend on the number of workers: the limit of an item
is CPU time and memory of its own. A worker that overruns is ended and replaced.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import check_package
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.records import Prompt
from megatron_opd.safety.untrusted import load_json

CPU_TIME, MEMORY = "CPU time", "memory"  # limits, as a verdict's `detail` names them
_START_SECONDS = 120.0
_LONGEST_REPLY = 1 << 20  # bytes
_MAIN = "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); from megatron_opd.evaluate.grading_worker import main; main()"
# Where a cluster keeps Python's own libraries; nothing else of the caller's environment reaches a worker.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class GradingPool:
    """Workers for one grader; a context manager. `seconds`: CPU time of an item. Raises UserError if they can't start."""

    def __init__(self, grader: str, *, seconds: float, workers: int | None = None):
        check_package(grader)
        self._grader = grader
        self._seconds = seconds
        self._size = workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._local = threading.local()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> GradingPool:
        self._executor = ThreadPoolExecutor(self._size, thread_name_prefix="grading")
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            left = list(self._workers)
            for worker in left:
                worker.kill()
        self._executor.shutdown(cancel_futures=True)
        for worker in left:
            worker.close()

    def grade(self, items: Iterable[tuple[Prompt, str]]) -> Iterator[Verdict]:
        """A verdict for each prompt and response, in their order; only a few are held at a time. Raises UserError for unreadable prompts."""
        for reply in self._map(("grade", prompt, text) for prompt, text in items):
            if "refused" in reply:
                raise UserError(reply["refused"])
            yield _verdict(reply)

    def find_unreadable(self, prompts: Sequence[Prompt]) -> list[str]:
        """Why the grader can't compare with the answers of those prompts where it can't."""
        found = []
        for prompt, reply in zip(prompts, self._map(("check", prompt, "") for prompt in prompts), strict=True):
            if "refused" in reply:
                found.append(reply["refused"])
            elif "readable" not in reply:
                found.append(f"prompt {prompt.index}: reading its answer fails: {_verdict(reply).reason}")
        return found

    def _map(self, tasks: Iterable[tuple[str, Prompt, str]]) -> Iterator[dict[str, Any]]:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for task in tasks:
            waiting.append(self._executor.submit(self._ask, *task))
            if len(waiting) >= 4 * self._size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, task: str, prompt: Prompt, text: str) -> dict[str, Any]:
        """The reply of this thread's worker. A worker that is killed from outside, as for want of memory, gets one successor."""
        request = {"task": task, "grader": self._grader, "index": prompt.index, "answer": prompt.answer, "text": text}
        request |= {"meta": {key: prompt.meta[key] for key in ("reasoning_gym",) if key in prompt.meta}}
        request |= {"seconds": self._seconds}
        line = json.dumps(request, default=str).encode() + b"\n"
        reply: dict[str, Any] = {}
        for _ in range(2):
            worker = getattr(self._local, "worker", None) or self._start()
            reply = worker.ask(line, 60.0 + 10 * self._seconds)
            if "died" not in reply:
                return reply
            self._local.worker = None
            self._workers.discard(worker)
            if reply["died"] in (-signal.SIGPROF, -signal.SIGXCPU):
                return {"over": CPU_TIME}
            if reply["died"] is None:
                return {"over": "wall-clock time"}
        return {"error": f"the grading process ended with code {reply['died']}, twice"}

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise UserError("grading was ended")
            worker = self._local.worker = _Worker(self._grader)
            self._workers.add(worker)
        reply = worker.read(_START_SECONDS)
        if "ready" not in reply:
            self._local.worker = None
            raise UserError(f"a grading process can't start: {reply.get('error') or reply}; the command that it runs is {worker.command}")
        return worker


def _verdict(reply: dict[str, Any]) -> Verdict:
    if "verdict" in reply:
        return Verdict(**reply["verdict"])
    limit = MEMORY if "memory" in reply else reply.get("over")
    if limit is not None:
        return Verdict(0.0, "timeout", reason=f"over the limit of {'memory' if limit == MEMORY else 'time'}", detail={"limit": limit})
    return Verdict(0.0, "error", reason=reply["error"])


class _Worker:
    """One process, its pipes and its empty folder."""

    def __init__(self, grader: str):
        self._folder = tempfile.TemporaryDirectory(prefix="grading-")
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        # -P, -s and an environment of our own are what -I is, but for the hash seed, which fixes the order of sympy's sets.
        self.command = [sys.executable, "-P", "-s", "-c", _MAIN, paths, grader]
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "HOME": self._folder.name, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=environment,
            start_new_session=True,
        )
        self._pending = b""

    def ask(self, line: bytes, seconds: float) -> dict[str, Any]:
        """The reply to a request; {"died": code} if the process ended, {"died": None} if it was ended for giving none in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            return self._died()
        return self.read(seconds)

    def read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    return {"died": None}
                found = os.read(self._process.stdout.fileno(), 1 << 16)
                if not found:
                    return self._died()
                self._pending += found
                if len(self._pending) > _LONGEST_REPLY:  # no reply of ours: what it ran writes in its place
                    self.close()
                    return {"died": None}
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            return load_json(line, "a reply")
        except UserError:
            self.close()
            return {"died": None}

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # what was not sent to a process that has ended
        self._folder.cleanup()

    def _died(self) -> dict[str, Any]:
        code = self._process.wait()
        self.close()
        return {"died": code}
