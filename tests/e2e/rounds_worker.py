"""Runs megatron-opd once for each line on stdin, {"words": [...], "below": folder, "kill_at": n or null, "log": path}, in a fork of this process.

Before the n-th file operation below the folder, be it of the command or of a process that writes for it, comes kill -9 to all of them.
Answers each line with {"killed": bool, "code": exit code, "operations": how many there were}.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}


def run(order: dict[str, Any], count: Any) -> None:
    os.setsid()
    file = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(order["below"]):
            with count.get_lock():
                count.value += 1
                if count.value == order["kill_at"]:
                    os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)
    from megatron_opd.cli import main

    code = main(order["words"])
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import megatron_opd.train.rounds  # noqa: F401

    context = multiprocessing.get_context("fork")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        count = context.Value("q", 0)
        pid = os.fork()
        if not pid:
            run(order, count)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        code = None if killed else os.WEXITSTATUS(status)
        print(
            json.dumps({"killed": killed, "code": code, "operations": count.get_obj().value}), flush=True
        )  # the lock died with its holder


if __name__ == "__main__":
    serve()
