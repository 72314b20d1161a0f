"""Trains once for each line on stdin, {"recipe": [...overrides], "kill_at": n or null, "log": path}, in a fork of this process.

With "words", it is that command instead; with "kill_after", kill -9 comes after so many seconds. The n-th file operation below a folder named `checkpoints`, be it of the trainer or of a process that writes for it, is not made:
kill -9 comes first. Answers each line with {"killed": bool, "code": exit code, "operations": how many were made}. A fork a run saves
the imports, which take longer than the run.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}


def work(words: list[str], kill_at: int | None, log: str, count: Any) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and "/checkpoints/" in str(arguments[0]):
            with count.get_lock():
                count.value += 1
                if count.value == kill_at:
                    os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)
    from megatron_opd.cli import main

    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def wait(pid: int, kill_after: float | None) -> int:
    end = time.monotonic() + (kill_after if kill_after is not None else 3600)
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def serve() -> None:
    import megatron_opd.calibrate
    import megatron_opd.convert.commands
    import megatron_opd.evaluate
    import megatron_opd.evaluate.report
    import megatron_opd.serve.transformers_engine
    import megatron_opd.train.logp
    import megatron_opd.train.loop  # noqa: F401

    context = multiprocessing.get_context("fork")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        count = context.Value("q", 0)
        pid = os.fork()
        if not pid:
            work(order.get("words") or ["train", "tiny", *order["recipe"]], order.get("kill_at"), order["log"], count)
        status = wait(pid, order.get("kill_after"))
        killed = os.WIFSIGNALED(status)
        answer = {
            "killed": killed,
            "code": None if killed else os.WEXITSTATUS(status),
            "operations": count.get_obj().value,
        }  # the lock died with its holder
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
