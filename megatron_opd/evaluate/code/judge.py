"""A program against its tests: what each is run with, and what its outcome is. The comparison is made out of the program's reach."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass, field
from typing import Any

from megatron_opd.evaluate.code import isolation
from megatron_opd.evaluate.code.cases import AssertCase, CallCase, CodeTests, StdinCase
from megatron_opd.evaluate.code.compare import same_output, same_value
from megatron_opd.evaluate.code.inside import wire
from megatron_opd.evaluate.code.sandbox import Conversation, Run, Sandbox, TooLong, signal_of
from megatron_opd.evaluate.verdict import Outcome, Verdict
from megatron_opd.recipe.code_limits import CodeLimits, Mode

_SHOWN = 200  # characters of what was expected and of what came
_LONGEST_NAMES = 1 << 20  # bytes of the names that a program defines
_SMALL_REPLY = 1 << 16
_MOST_HASHED = 1000  # of keys that are no texts, and so none of JSON
_OVER_LIMITS = ("timeout", "memory", "output limit", "threads")


@dataclass
class _Failure:
    """How the first test that failed did."""

    index: int
    how: str
    text: str = ""
    expected: str | None = None
    got: str | None = None


@dataclass(eq=False)
class Judge:
    """Judges programs one after the other. `close` ends what it has open; `kill` does so from another thread."""

    mode: Mode
    interpreter: isolation.Interpreter
    limits: CodeLimits
    features: dict[str, Any] = field(default_factory=dict)  # of the last isolation, as serve.py says
    _tests_sandbox: Sandbox | None = None
    _open: list[Sandbox] = field(default_factory=list)
    _killed: bool = False

    def judge(self, program: str, tests: CodeTests) -> Verdict:
        """Run a program against its tests, up to the first that fails. Raises SandboxError if the isolation breaks."""
        sources = {"program": program, "before": tests.before, "function": tests.function}
        asserts = isinstance(tests.cases[0], AssertCase)
        sandbox = self._new_sandbox(prelude=not asserts)
        try:
            if asserts:
                failure, seconds = self._run_asserts(sandbox, sources, tests)
            elif isinstance(tests.cases[0], CallCase):
                failure, seconds = self._run_calls(sandbox, sources, tests)
            else:
                failure, seconds = self._run_main(sandbox, sources, tests)
        finally:
            self._open.remove(sandbox)
            sandbox.close()
        return _verdict(failure, len(tests.cases), seconds, self.mode)

    def close(self) -> None:
        """End what is open."""
        for sandbox in self._open:
            sandbox.close()
        self._open.clear()
        self._tests_sandbox = None

    def kill(self) -> None:
        """From another thread: `judge` raises SandboxError soon."""
        self._killed = True
        for sandbox in list(self._open):
            sandbox.kill()

    def _new_sandbox(self, *, prelude: bool) -> Sandbox:
        sandbox = Sandbox(self.mode, self.interpreter, self.limits, prelude=prelude)
        self._open.append(sandbox)
        if self._killed:
            sandbox.kill()
        self.features = sandbox.features
        return sandbox

    def _run_main(self, sandbox: Sandbox, sources: dict[str, Any], tests: CodeTests) -> tuple[_Failure | None, float]:
        """A process for each test, which finds the test's input on stdin."""
        seconds = 0.0
        for index, case in enumerate(tests.cases):
            assert isinstance(case, StdinCase)
            run = sandbox.start("main", sources, stdin=case.stdin, cpu_seconds=self.limits.seconds)
            try:
                run.wait()
            finally:
                run.close()
            seconds += run.seconds
            if (failure := _ending(run, index)) is not None:
                return failure, seconds
            if not same_output(run.output, case.stdout):
                return _Failure(index, "wrong output", expected=_brief(case.stdout), got=_brief(run.output)), seconds
        return None, seconds

    def _run_calls(self, sandbox: Sandbox, sources: dict[str, Any], tests: CodeTests) -> tuple[_Failure | None, float]:
        """One process, which is told the arguments of a test when the one before it has passed."""
        ours, theirs = socket.socketpair()
        with ours:
            run = sandbox.start("serve", sources, cpu_seconds=self.limits.seconds * len(tests.cases), channels=(theirs,))
            try:
                failure = _converse(Conversation(ours, run), run, tests)
            finally:
                run.close()
        if failure is not None and failure.how == "ended":
            failure = _ending(run, failure.index, always=True)
        return failure, run.seconds

    def _run_asserts(self, sandbox: Sandbox, sources: dict[str, Any], tests: CodeTests) -> tuple[_Failure | None, float]:
        """Two processes apart from each other: the program's, and that of the tests, which calls the former over a socket."""
        if self._tests_sandbox is None:
            self._tests_sandbox = self._new_sandbox(prelude=False)
        given = {
            "before": tests.before,
            "cases": [case.source for case in tests.cases if isinstance(case, AssertCase)],
            "function": tests.function,
        }
        seconds = self.limits.seconds * len(tests.cases)
        ours, report = socket.socketpair()
        calls, served = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            run = sandbox.start("serve", sources, cpu_seconds=seconds, channels=(served,))
            stack.callback(run.close)
            asking = self._tests_sandbox.start("asserts", given, cpu_seconds=seconds, channels=(calls, report))
            stack.callback(asking.close)
            conversation = Conversation(ours, asking, run)
            failure = _hear(conversation, run, asking, len(tests.cases))
        if failure is not None and failure.how == "ended":
            failure = _ending(asking if asking.fault else run, failure.index, always=True)
        return failure, run.seconds


def _converse(conversation: Conversation, run: Run, tests: CodeTests) -> _Failure | None:
    """Call the function once for each case, and compare."""
    index = 0
    try:
        reply = conversation.receive(_LONGEST_NAMES)
        for index, case in enumerate(tests.cases):
            assert isinstance(case, CallCase)
            if reply is not None and "error" not in reply:
                # What is much longer can't be equal, and need not be read.
                longest = _SMALL_REPLY + 4 * len(json.dumps(case.expected))
                conversation.send(
                    {"do": "result", "name": tests.function, "arguments": [wire.encode(each, _no_object) for each in case.arguments]}
                )
                reply = conversation.receive(longest)
            if reply is None:
                run.settle()
                return _Failure(index, "ended")
            if "error" in reply:
                return _raised(reply, index)
            value = wire.decode(reply["value"], wire.Foreign, _MOST_HASHED)
            if not same_value(value, case.expected):
                return _Failure(index, "wrong output", expected=_brief(case.expected), got=_brief(value))
            run.begin_test()
    except TooLong:
        return _Failure(index, "wrong output", "it returned far more than was expected")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return _Failure(index, "exception", f"its reply can't be read: {error}")
    return None


def _hear(conversation: Conversation, run: Run, asking: Run, count: int) -> _Failure | None:
    """What the process of the tests reports."""
    for index in range(count):
        message = conversation.receive(_LONGEST_NAMES)
        if message is None or message.get("how") == "ended":
            run.settle()
            return _Failure(index, "ended")
        if "failed" in message:
            return _Failure(index, message["how"], message.get("text", ""))
        assert message == {"passed": index}
        run.begin_test()
        asking.begin_test()
    return None


def _ending(run: Run, index: int, *, always: bool = False) -> _Failure | None:
    """What is wrong with the way a run ended. always: it should not have ended at all."""
    if run.fault is not None:
        return _Failure(index, run.fault)
    assert run.status is not None
    if run.stopped:
        return _Failure(index, "exception", "it ended the connection by which it answers")
    name = signal_of(run.status)
    if name in ("SIGXCPU", "SIGALRM", "SIGPROF"):
        return _Failure(index, "timeout", f"ended by {name}")
    if name is not None:
        return _Failure(index, "killed", f"ended by {name}")
    last = run.errors.rpartition("\n")[2]
    if last.startswith("MemoryError"):
        return _Failure(index, "memory", "MemoryError")
    if run.status != 0:
        return _Failure(index, "exception", last[:_SHOWN] or f"exit status {run.status >> 8}")
    return _Failure(index, "exception", "it ended its process before it answered") if always else None


def _raised(reply: wire.Message, index: int) -> _Failure:
    if reply["error"] == "MemoryError":
        return _Failure(index, "memory", "MemoryError")
    return _Failure(index, "exception", f"{reply.get('name')}: {reply.get('text')}"[:_SHOWN])


def _no_object(_: Any) -> int:
    raise AssertionError("arguments are values of JSON")


def _verdict(failure: _Failure | None, count: int, seconds: float, mode: Mode) -> Verdict:
    detail: dict[str, Any] = {"tests": count, "isolation": mode}
    if failure is None:
        return Verdict(1.0, "right", reason=f"passes {count} tests", seconds=seconds, detail=detail)
    detail |= {"failed": failure.index, "how": failure.how}
    detail |= {key: value for key, value in (("expected", failure.expected), ("got", failure.got)) if value is not None}
    outcome: Outcome = "timeout" if failure.how in _OVER_LIMITS else "wrong"
    shown = f"expected {failure.expected}, got {failure.got}" if failure.expected is not None else failure.text
    reason = f"test {failure.index} of {count} (from 0): {failure.how}" + (f": {shown}" if shown else "")
    return Verdict(0.0, outcome, reason=_writable(reason), seconds=seconds, detail=detail)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else _shown(value)
    text = text[: _SHOWN + 1]
    return _writable(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _writable(text: str) -> str:
    """The text without halves of surrogate pairs, which a program may return and UTF-8 does not have."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of more digits than Python writes
        return f"a {type(value).__name__} too large to show"
