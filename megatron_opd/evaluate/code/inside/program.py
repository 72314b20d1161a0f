"""A program in its own process, isolated: reading stdin, or serving calls of what it defines.

The process holds nothing that the program must not see: its source, one input at a time, and no expected value.
"""

from __future__ import annotations

import atexit
import builtins
import io
import itertools
import os
import sys
import threading
import traceback
import types
from typing import Any

from megatron_opd.evaluate.code.inside import wire
from megatron_opd.evaluate.code.inside.compose import with_prompt

FILE = "program.py"
# LiveCodeBench runs programs with these modules at hand, under their names and with what they export (its runner, testing_util.py).
PRELUDE = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools", "functools",
    "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_RECURSION = 50_000  # levels, as LiveCodeBench sets it
_DIGITS = 50_000  # of a number that is read or written; its compute_code_generation_metrics.py
_LONGEST_CALL = 64 << 20  # bytes
_SHOWN = 500  # characters of an error


def import_prelude() -> None:
    """Import the modules once, for all programs of this sandbox."""
    for name in PRELUDE:
        __import__(name)


def run_main(given: dict[str, Any], *, prelude: bool) -> None:
    """Run a program as __main__ on this process's stdin and stdout. Ends the process: 0, or 1 with a traceback if it raised."""
    code = 0
    try:
        _load(given, "__main__", prelude=prelude)
        _finish()
    except SystemExit:  # whatever its code: LiveCodeBench judges what was printed
        code = _end_quietly()
    except BaseException:
        _explain()
        code = 1
    os._exit(code)


def serve(given: dict[str, Any], channel: wire.Channel, *, prelude: bool) -> None:
    """Load a program, then carry out the requests of `channel`: calls of what it defines, and uses of what those return."""
    try:
        names = _load(given, "program", prelude=prelude)
    except BaseException as error:
        channel.write(_error(error))
        return
    channel.write({"loaded": sorted(name for name in names if isinstance(name, str))})
    server = _Server(names)
    while True:
        try:
            request = channel.read(_LONGEST_CALL)
        except EOFError:
            return
        try:
            line = wire.to_line(server.answer(request))
        except BaseException as error:
            line = wire.to_line(_error(error))
        channel.send(line)


class _Server:
    """Answers requests {"do", "name" | "object", "arguments", "keywords"} about a program's names and objects."""

    def __init__(self, names: dict[str, Any]):
        self._names = names
        self._objects: list[Any] = []
        self._solution: Any = None

    def answer(self, request: wire.Message) -> wire.Message:
        arguments = [wire.decode(each, self._object) for each in request.get("arguments", ())]
        keywords = {key: wire.decode(each, self._object) for key, each in request.get("keywords", {}).items()}
        target = self._object(request["object"]) if "object" in request else self._name(request["name"])
        do = request["do"]
        if do == "method":
            value = getattr(target, request["attribute"])(*arguments, **keywords)
        elif do == "get":
            value = getattr(target, request["attribute"])
        elif do == "set":
            value = setattr(target, request["attribute"], arguments[0])
        elif do == "list":
            value = list(target)
        elif do == "next":
            value = list(itertools.islice(target, 1))
        elif do == "truth":
            value = bool(target)
        elif do == "value":
            value = target
        else:
            value = target(*arguments, **keywords)
        if do == "result":  # nobody looks at the arguments any more
            return {"value": wire.encode(value, self._number)}
        # What a call changes in place is part of what it does.
        changed = [wire.encode(each, self._number) if isinstance(each, (list, dict, set, bytearray)) else None for each in arguments]
        return {"value": wire.encode(value, self._number), "changed": changed}

    def _name(self, name: str) -> Any:
        """A method of the class Solution where the program has that class and method; else what it defines by that name."""
        solution = self._names.get("Solution")
        if name != "Solution" and hasattr(solution, name):
            if self._solution is None:
                self._solution = solution() if isinstance(solution, type) else solution
            return getattr(self._solution, name)
        if name not in self._names:
            raise NameError(f"name {name!r} is not defined")
        return self._names[name]

    def _object(self, number: int) -> Any:
        return self._objects[number]

    def _number(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1


def _load(given: dict[str, Any], name: str, *, prelude: bool) -> dict[str, Any]:
    """The names that a program defines. given: its source `program`, the source `before` it, and the `function` it is to define, or None."""
    _open_standard_streams()
    sys.argv[:] = [FILE]
    module = types.ModuleType(name)
    sys.modules[name] = module
    names = vars(module)
    # What the module `site` would define, which is not loaded.
    quitter = __import__("_sitebuiltins").Quitter
    for each in ("exit", "quit"):
        setattr(builtins, each, quitter(each, "Ctrl-D (i.e. EOF)"))
    if prelude:
        for line in ("from {} import *", "import {}"):  # in this order: bisect, copy, datetime, random are the modules
            for each in PRELUDE:
                exec(line.format(each), names)
        sys.setrecursionlimit(_RECURSION)
        sys.set_int_max_str_digits(_DIGITS)
    for source in with_prompt(given["program"], given["before"], given["function"]):
        exec(compile(source, FILE, "exec", dont_inherit=True), names)
    return names


def _open_standard_streams() -> None:
    """Those of before were opened on other files."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        errors = "backslashreplace" if number == 2 else "surrogateescape"
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _finish() -> None:
    """What an interpreter does at its end: it waits for threads, calls what was registered, writes what is left."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    kept = [each for each in vars(sys.modules["__main__"]).values() if isinstance(each, io.IOBase)]  # open(1, "w"), never closed
    for stream in {id(each): each for each in (sys.stdout, sys.__stdout__, *kept)}.values():
        if stream is not None and not getattr(stream, "closed", True):
            stream.flush()


def _end_quietly() -> int:
    try:
        _finish()
    except BaseException:
        _explain()
        return 1
    return 0


def _explain() -> None:
    """The traceback, from the program's first line on; raises nothing."""
    try:
        kind, error, trace = sys.exc_info()
        while trace is not None and trace.tb_frame.f_code.co_filename != FILE:
            trace = trace.tb_next
        text = io.StringIO()
        traceback.print_exception(kind, error, trace, limit=-10, file=text)
        os.write(2, text.getvalue()[-4000:].encode("utf-8", "backslashreplace"))
    except BaseException:
        os.write(2, b"MemoryError" if isinstance(sys.exc_info()[1], MemoryError) else b"the program raised what can't be shown")


def _error(error: BaseException) -> wire.Message:
    kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins")
    try:
        text = str(error)[:_SHOWN]
    except BaseException:
        text = ""
    return {"error": kind, "name": type(error).__name__[:_SHOWN], "text": text}
