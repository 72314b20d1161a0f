"""Imports everything once, then runs each task in a forked child: a line of JSON in, a line of JSON out.

    PYTHONPATH=... python fork_server.py [--no-te]

A child inherits the imported packages and nothing of its predecessors: a simulation patches what it touches, so it wants a process of its own,
and importing PyTorch, Megatron-Core and Transformer Engine takes longer than most of the cases.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import fake_tasks  # imports the simulator before torch


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print goes to the log
    fake_tasks.prepare(with_te="--no-te" not in sys.argv)
    print(json.dumps({"ready": fake_tasks.versions()}), file=answers, flush=True)
    for line in sys.stdin:
        print(run_in_child(json.loads(line)), file=answers, flush=True)


def run_in_child(task: dict[str, object]) -> str:
    """The answer of a task, as JSON: {"result": ...}, or {"error": class, "message": text, "traceback": text}."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(answer(task))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or json.dumps({"error": "ChildDied", "message": f"wait status {status}", "traceback": ""})


def answer(task: dict[str, object]) -> str:
    try:
        name, arguments = task["task"], task["arguments"]
        return json.dumps({"result": getattr(fake_tasks, str(name))(**arguments)})  # pyright: ignore[reportCallIssue]
    except BaseException as error:
        return json.dumps({"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()})


if __name__ == "__main__":
    main()
