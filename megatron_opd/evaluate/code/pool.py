"""Programs of many responses, judged in parallel: one answer a CPU, every program in an isolation of its own."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_opd.errors import UserError
from megatron_opd.evaluate.code import isolation
from megatron_opd.evaluate.code.cases import CodeTests, StdinCase
from megatron_opd.evaluate.code.extract import extract_program
from megatron_opd.evaluate.code.judge import Judge
from megatron_opd.evaluate.code.sandbox import SandboxError
from megatron_opd.evaluate.grade import answer_part
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.recipe.code_limits import CodeLimits, Mode
from megatron_opd.records import Prompt

_TRIES = 2  # of an isolation that can't be made: a machine may be short of processes for a moment


class CodePool:
    """Judges for the grader `code`; a context manager. Raises UserError where nothing isolates programs on this machine."""

    def __init__(self, limits: CodeLimits | None = None, *, workers: int | None = None):
        self._limits = limits or CodeLimits()
        self._size = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        self._local = threading.local()
        self._judges: set[Judge] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> CodePool:
        self._interpreter = isolation.find_interpreter(self._limits.python)
        self._mode: Mode = find_isolation(self._limits).mode
        self._executor = ThreadPoolExecutor(self._size, thread_name_prefix="programs")
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            judges = list(self._judges)
        for judge in judges:
            judge.kill()
        self._executor.shutdown(cancel_futures=True)
        for judge in judges:
            judge.close()

    def grade(self, items: Iterable[tuple[Prompt, str]]) -> Iterator[Verdict]:
        """A verdict for each prompt and response, in their order; only a few are held at a time. Raises UserError for unreadable prompts."""
        return self._map((_tests_of(prompt), text) for prompt, text in items)

    def grade_with(self, items: Iterable[tuple[CodeTests, str]]) -> Iterator[Verdict]:
        """The same for tests that are already read."""
        return self._map(items)

    def find_unreadable(self, prompts: Sequence[Prompt]) -> list[str]:
        """Why the tests of those prompts can't be used that have none to use."""
        found = []
        for prompt in prompts:
            try:
                _tests_of(prompt)
            except UserError as error:
                found.append(str(error))
        return found

    def _map(self, items: Iterable[tuple[CodeTests, str]]) -> Iterator[Verdict]:
        waiting: deque[Future[Verdict]] = deque()
        for tests, text in items:
            waiting.append(self._executor.submit(self._grade, tests, text))
            if len(waiting) >= 4 * self._size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _grade(self, tests: CodeTests, text: str) -> Verdict:
        answer = answer_part(text)
        if answer is None:
            return Verdict(0.0, "unclosed", reason="its thinking has no end")
        program = extract_program(answer)
        if program is None:
            return Verdict(0.0, "no_answer", reason="no block of code behind its thinking")
        found = ""
        for _ in range(_TRIES):
            try:
                return self._judge().judge(program, tests)
            except SandboxError as error:
                found = str(error)
                self._drop_judge()
        return Verdict(0.0, "error", reason=f"the isolation broke: {found}", detail={"isolation": self._mode})

    def _judge(self) -> Judge:
        """This thread's."""
        judge = getattr(self._local, "judge", None)
        with self._lock:
            if self._closed:
                raise UserError("grading was ended")
            if judge is None:
                judge = self._local.judge = Judge(self._mode, self._interpreter, self._limits)
                self._judges.add(judge)
        return judge

    def _drop_judge(self) -> None:
        judge = self._local.judge
        self._local.judge = None
        with self._lock:
            self._judges.discard(judge)
        judge.close()


def find_isolation(limits: CodeLimits) -> isolation.Isolation:
    """The first mode that works here, or the one that `limits` names, shown by a program that it runs. Raises UserError with the reasons."""
    isolation.check_platform()
    interpreter = isolation.find_interpreter(limits.python)
    modes: tuple[Mode, ...] = isolation.MODES if limits.isolation == "auto" else (limits.isolation,)
    reasons = []
    for mode in modes:
        judge = Judge(mode, interpreter, CodeLimits(python=limits.python))
        try:
            verdict = judge.judge("print(input())", CodeTests((StdinCase("it runs\n", "it runs\n"),)))
            features = judge.features
            if verdict.score == 1.0:
                return isolation.Isolation(mode, isolation.describe(mode, features))
            reasons.append(f"{mode}: a program that should pass does not: {verdict.reason}")
        except (SandboxError, UserError) as error:
            reasons.append(f"{mode}: {error}")
        finally:
            judge.close()
    raise UserError("programs can't be isolated on this machine:" + "".join(f"\n  {reason}" for reason in reasons))


def describe_isolation(limits: CodeLimits | None = None) -> str:
    """What keeps programs apart from this machine, in words. Raises UserError where nothing does."""
    found = find_isolation(limits or CodeLimits())
    return f"{found.mode} ({found.description})"


def _tests_of(prompt: Prompt) -> CodeTests:
    from megatron_opd.evaluate.code.tests_of import tests_of

    return tests_of(prompt)
