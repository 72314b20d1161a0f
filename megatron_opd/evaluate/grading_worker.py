"""The process that grades: JSON lines in, JSON lines out. It holds no secrets, and what it runs for an answer can do nothing.

What models answered goes through parsers that can loop, fill the memory or crash, and some of reasoning_gym's scorers call `eval` on it.
So this process has an empty folder, an almost empty environment and a limit of CPU time and memory for every item; from `_lock` on it
can't write files, run programs, fork or open connections; and `eval` within the scorers takes arithmetic alone (`checked_eval`). The
first and the last hold everywhere, Landlock and the namespace without a network where the kernel allows them.

    in    {"task": "grade" | "check", "grader", "index", "answer", "meta", "text", "seconds"}
    out   {"verdict": {fields of a Verdict}} | {"readable": true} | {"refused": reason} (the prompt's answer is unreadable)
          | {"error": text} | {"memory": true}
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import PACKAGES, check_gold, grade
from megatron_opd.evaluate.graders.reading import LONGEST_ANSWER
from megatron_opd.evaluate.verdict import Verdict

_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # system calls, the same on every architecture
# Of the rights that Landlock's first version knows: all but reading files and folders (execute, write, remove, make).
_LANDLOCK_RIGHTS = 0x1FFF & ~0b1100
_NO_NEW_PRIVILEGES = 38
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
# Audit events by which code reaches files, programs, other processes, the network and memory. `open` is looked at below.
_FORBIDDEN = ("os.", "shutil.", "subprocess.", "pty.", "socket.", "signal.", "ctypes.", "mmap.", "resource.")
_HARMLESS = {"os.listdir", "os.scandir"}  # an import on first use reads folders
_LONGEST_REASON = 500  # characters
_MEMORY = 1 << 30  # bytes that grading may take on top of the libraries
_ALLOWED = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Call,
    ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_PLAIN_CALLS = {"abs", "min", "max", "round", "sqrt", "cbrt", "root"}


@dataclass
class _Evaluation:
    """What `checked_eval` saw that a scorer may hide by catching every exception."""

    out_of_memory: bool = False


_evaluation = _Evaluation()


@dataclass(frozen=True)
class _Item:
    """What a grader reads of a prompt; numpy and pydantic, which `records.Prompt` needs, would double the time of a start."""

    index: int
    answer: str | None
    meta: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Serve until stdin ends."""
    requests = sys.stdin
    # Scorers may print: stdout is the protocol's alone, under a number that they don't know.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process
    for number in (signal.SIGPROF, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        _load(sys.argv[1])
        _lock()
    except Exception as error:
        _reply(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    _reply(replies, {"ready": True})
    for line in requests:
        _reply(replies, _serve(json.loads(line)))


def _reply(replies: IO[str], record: dict[str, Any]) -> None:
    replies.write(json.dumps(record) + "\n")
    replies.flush()


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    prompt: Any = _Item(request["index"], request["answer"], request["meta"])
    # Ends the process. The clock is the CPU's, so that a busy machine grades as an idle one.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    _evaluation.out_of_memory = False
    try:
        if request["task"] == "check":
            check_gold(request["grader"], prompt)
            return {"readable": True}
        started = time.process_time()
        verdict = grade(request["grader"], prompt, request["text"])
        return {"memory": True} if _evaluation.out_of_memory else {"verdict": _record(verdict, time.process_time() - started)}
    except UserError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:  # an answer may well raise SystemExit
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _record(verdict: Verdict, seconds: float) -> dict[str, Any]:
    """The verdict as JSON; what it quotes of a response is cut, and half a character of it replaced."""
    record: dict[str, Any] = asdict(verdict) | {"seconds": round(seconds, 6)}
    for name, longest in (("answer", LONGEST_ANSWER), ("reason", _LONGEST_REASON)):
        if record[name] is not None:
            record[name] = record[name][:longest].encode("utf-8", "replace").decode()
    return record


def _load(grader: str) -> None:
    """Import what the grader needs, before imports are all that may be read."""
    if grader in PACKAGES:
        __import__(PACKAGES[grader])
    if grader == "reasoning_gym":
        parser = __import__("sympy.parsing.sympy_parser", fromlist=["sympy_parser"])
        for module in [parser, *(module for name, module in sys.modules.items() if name.startswith("reasoning_gym."))]:
            vars(module)["eval"] = checked_eval


def checked_eval(source: Any, global_names: dict[str, Any] | None = None, local_names: dict[str, Any] | None = None) -> Any:
    """`eval` of literals, arithmetic, and sympy's own classes and functions of it. Raises ValueError for anything else.

    Stands in for `eval` in reasoning_gym's scorers and in sympy's parser. Attributes, comprehensions, lambdas and every other call are
    refused; names alone can do nothing.
    """
    names = {**vars(builtins), **(global_names or {}), **(local_names or {})}
    if isinstance(source, str):
        for node in ast.walk(ast.parse(source.strip(), mode="eval")):
            if not isinstance(node, _ALLOWED):
                raise ValueError(f"{type(node).__name__} in an answer is not evaluated")
            if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and _may_call(node.func.id, names)):
                raise ValueError("such a call in an answer is not evaluated")
    try:
        return builtins.eval(source, {} if global_names is None else global_names, local_names)
    except MemoryError:
        _evaluation.out_of_memory = True
        raise


def _may_call(name: str, names: dict[str, Any]) -> bool:
    sympy = sys.modules.get("sympy")
    called = names.get(name)
    return name in _PLAIN_CALLS or (sympy is not None and isinstance(called, type) and issubclass(called, sympy.Basic))


def _lock() -> None:
    """Give up what grading does not need, for good."""
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="utf-8") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = taken + _MEMORY if most == resource.RLIM_INFINITY else min(most, taken + _MEMORY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        libc = ctypes.CDLL(None)
        libc.unshare(_NEW_USER | _NEW_NET)  # a network of its own, with nobody in it
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        rights = ctypes.c_uint64(_LANDLOCK_RIGHTS)  # handled by a ruleset that has no rule: allowed nowhere
        ruleset = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rights), ctypes.sizeof(rights), 0)
        if ruleset >= 0:
            libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
            os.close(ruleset)
    sys.addaudithook(_forbid)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else False
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            raise PermissionError("an answer may not write files")
    elif event.startswith(_FORBIDDEN) and event not in _HARMLESS:
        raise PermissionError(f"an answer may not use {event}")
