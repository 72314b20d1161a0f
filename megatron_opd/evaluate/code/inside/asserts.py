"""Assertions in a process that the program can't reach: what they call is carried out in the program's own process.

So the program sees arguments, and gives values back; it never sees what they are compared with, and no exit, exception, printing or
patched builtin of it is a success. What it returns comes as plain data: an object's own `__eq__` is not asked.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from megatron_opd.evaluate.code.inside import wire
from megatron_opd.evaluate.code.inside.compose import is_stub

FILE = "tests.py"
_LONGEST_REPLY = 64 << 20  # bytes
_SHOWN = 300  # characters
# Of the program's exceptions, what would end a test's own loop quietly, look like its assertion, or can't be made of a text.
_NOT_RAISED = (StopIteration, StopAsyncIteration, AssertionError, UnicodeError, BaseExceptionGroup)


class ProgramError(Exception):
    """The program raised something that is no builtin exception, or replied what can't be read."""


class NotSendable(ProgramError):
    """A test gives the program an object that has no form outside its process."""


class ProgramEnded(BaseException):
    """The program's process is gone."""


class _Link:
    """Requests to the program's process."""

    def __init__(self, channel: wire.Channel):
        self._channel = channel
        self.failed: wire.Message | None = None  # the last error of the program

    def receive(self) -> wire.Message:
        try:
            reply = self._channel.read(_LONGEST_REPLY)
        except (EOFError, OSError):
            raise ProgramEnded from None
        except ValueError as error:
            raise ProgramError(f"its reply can't be read: {error}") from None
        if "error" in reply:
            self.failed = reply
            kind = getattr(builtins, str(reply["error"]), None)
            if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, _NOT_RAISED):
                kind = ProgramError
            raise kind(f"{reply.get('name')}: {reply.get('text')}")
        return reply

    def receive_names(self) -> set[str]:
        """What the program defines: its first reply."""
        reply = self.receive()
        names = reply.get("loaded")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ProgramError("it replied before it was asked")
        return set(names)

    def ask(self, request: wire.Message, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None) -> Any:
        request["arguments"] = [wire.encode(each, _number) for each in arguments]
        request["keywords"] = {key: wire.encode(each, _number) for key, each in (keywords or {}).items()}
        try:
            self._channel.write(request)
        except OSError:
            raise ProgramEnded from None
        reply = self.receive()
        try:
            if request["do"] != "result":
                for given, changed in zip(arguments, reply["changed"], strict=True):
                    _change_(given, wire.decode(changed, self._foreign))
            return wire.decode(reply["value"], self._foreign)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ProgramError(f"its reply can't be read: {error}") from None

    def _foreign(self, number: int) -> Any:
        return _Remote(self, {"object": number})


class _Remote:
    """A function, a class or an object of the program. Equal to itself alone."""

    def __init__(self, link: _Link, target: wire.Message):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_target", target)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._link.ask({"do": "call", **self._target}, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._link.ask({"do": "get", "attribute": name, **self._target})

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask({"do": "set", "attribute": name, **self._target}, (value,))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask({"do": "list", **self._target}))

    def __next__(self) -> Any:
        found = self._link.ask({"do": "next", **self._target})
        if not found:
            raise StopIteration
        return found[0]

    def __bool__(self) -> bool:
        return self._link.ask({"do": "truth", **self._target})

    def __len__(self) -> int:
        try:
            return self._link.ask({"do": "method", "attribute": "__len__", **self._target})
        except AttributeError as error:  # what `list` takes for an object without a length
            raise TypeError(str(error)) from None

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask({"do": "method", "attribute": "__getitem__", **self._target}, (key,))

    def __contains__(self, value: Any) -> bool:
        return value in list(self)


def run(before: str, cases: list[str], function: str | None, program: wire.Channel, report: wire.Channel) -> None:
    """Run the assertions one after the other and report each: {"passed": index}, or {"failed": index, "how", ...} and the end."""
    link = _Link(program)
    index = 0
    try:
        loaded = link.receive_names()
        names = _own_names(before, link)
        names.pop(function or "", None)
        for index, source in enumerate(cases):
            code = compile(source, FILE, "exec", dont_inherit=True)
            for name in _modules_of(source, set(names)):
                names[name] = importlib.import_module(name)
            for name in _called_of_program(source, set(names), loaded, function):
                if name not in names:
                    target = {"name": name}
                    names[name] = link.ask({"do": "value", **target}) if name in loaded else _Remote(link, target)
            exec(code, names)
            report.write({"passed": index})
    except ProgramEnded:
        report.write({"failed": index, "how": "ended"})
    except MemoryError:
        report.write({"failed": index, "how": "memory"})
    except BaseException as error:
        how = (
            "wrong output"
            if isinstance(error, AssertionError)
            else "exception"
            if link.failed or isinstance(error, ProgramError)
            else "wrong output"
        )
        report.write({"failed": index, "how": how, "text": _describe(error, cases[index] if cases else "")})


def _own_names(before: str, link: _Link) -> dict[str, Any]:
    """What the source before the program defines, apart from functions without a body: those are for the program to write.

    Of its other functions the program may have its own. Where the two give something else, the assertion fails: neither a wrong one of the
    program's nor one that suits a wrong answer can pass.
    """
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        tree = ast.parse(before)
        tree.body = [node for node in tree.body if not is_stub(node)]
        exec(compile(tree, FILE, "exec", dont_inherit=True), names)
    except Exception:
        pass  # it is only whole with the program, which has then run it
    # In a copy: what these functions call of each other is theirs alone.
    return {name: _both(value, link) if _is_function(value) else value for name, value in names.items()}


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and value.__code__.co_filename == FILE


def _both(own: Callable[..., Any], link: _Link) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            theirs = link.ask({"do": "result", "name": own.__name__}, arguments, keywords)
        except NotSendable:
            return own(*arguments, **keywords)
        ours = own(*arguments, **keywords)
        assert isinstance(theirs, _Remote) or theirs == ours, f"the program redefines {own.__name__}, and otherwise"
        return ours

    return call


def _modules_of(source: str, own: set[str]) -> set[str]:
    """Modules of Python that a case uses and leaves to the program to import ("math.isclose(...)"): a program's could be anything."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Attribute, ast.Name))]
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    used = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    return (used & sys.stdlib_module_names) - stored - own


def _called_of_program(source: str, own: set[str], loaded: set[str], function: str | None) -> set[str]:
    """Names of a case that are the program's. A builtin's name is, if the case uses no other: else a program could redefine `abs`."""
    used, stored, bound = set(), set(own), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(name, ast.Load()):
                used.add(name)
            case ast.Name(name):
                stored.add(name)
            case ast.arg(name) | ast.FunctionDef(name) | ast.ClassDef(name):
                bound.add(name)
            case ast.alias(name, other):
                bound.add(other or name.partition(".")[0])
            case _:
                pass
    free = used - stored
    found = {name for name in free if not hasattr(builtins, name)}
    if function in loaded:
        return found | {function}
    return found if found - bound else found | (free & loaded)


def _change_(given: Any, changed: Any) -> None:
    """Give an argument of the caller's the content that it has after the call."""
    if changed is None or type(changed) is not type(given) or changed == given:
        return
    if isinstance(given, (list, bytearray)):
        given[:] = changed
    elif isinstance(given, (dict, set)):
        given.clear()
        given.update(changed)


def _number(value: Any) -> int:
    if isinstance(value, _Remote) and "object" in value._target:
        return value._target["object"]
    raise NotSendable(f"a test passes an object of type {type(value).__name__}, which can't be given to another process")


def _describe(error: BaseException, source: str) -> str:
    """The line of the tests at which they failed, and the error where it is no bare assertion."""
    line = ""
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            line = (source.splitlines() or [""])[min(trace.tb_lineno, len(source.splitlines())) - 1].strip()
        trace = trace.tb_next
    text = f"{type(error).__name__}: {error}" if str(error) or not isinstance(error, AssertionError) else "AssertionError"
    return f"{line[:_SHOWN]}  ({text[:_SHOWN]})"
