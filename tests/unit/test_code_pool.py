"""The pool of judges: order, outcomes without a run, and that nothing of it outlives it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_opd.evaluate.code import pool as code_pool
from megatron_opd.evaluate.code.cases import CodeTests, StdinCase
from megatron_opd.evaluate.code.inside import seccomp
from megatron_opd.evaluate.code.pool import CodePool
from megatron_opd.evaluate.code.sandbox import SandboxError
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.recipe.code_limits import CodeLimits

LIMITS = CodeLimits(seconds=2.0, wall_seconds=10.0)
DOUBLE = CodeTests((StdinCase("4", "8"),))
ENDLESS = """
import signal, sys
from megatron_opd.evaluate.code.cases import CodeTests, StdinCase
from megatron_opd.recipe.code_limits import CodeLimits
from megatron_opd.evaluate.code.pool import CodePool
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    program = "```python\\nimport time\\nwhile True: time.sleep(0.1)\\n```"
    with CodePool(CodeLimits(seconds=60, wall_seconds=60), workers=2) as pool:
        verdicts = pool.grade_with([(CodeTests((StdinCase("", ""),)), program)] * 2)
        print("graded", flush=True)
        list(verdicts)
"""


def processes_of(parent: int) -> list[str]:
    """Processes that a grader with that number has started for programs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "inside/start.py" in command and f'"parent": {parent}' in command:
            found.append(folder.name)
    return found


def test_verdicts_come_in_order_whatever_the_number_of_workers() -> None:
    answers = [f"```python\nprint({number % 9})\n```" for number in range(12)]
    for workers in (1, 3):
        with CodePool(LIMITS, workers=workers) as pool:
            scores = [verdict.score for verdict in pool.grade_with((DOUBLE, answer) for answer in answers)]
        assert scores == [float(number % 9 == 8) for number in range(12)]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("<think>```python\nprint(8)\n```", "unclosed"),
        ("<think>```python\nprint(8)\n```</think> It is 8.", "no_answer"),
        ("It is print(8).", "no_answer"),
        ("<think>hm</think>```python\nprint(8)\n```", "right"),
        ("```python\nprint(9)\n```", "wrong"),
    ],
)
def test_the_program_is_looked_for_behind_the_thinking(text: str, outcome: str) -> None:
    with CodePool(LIMITS, workers=1) as pool:
        assert [verdict.outcome for verdict in pool.grade_with([(DOUBLE, text)])] == [outcome]


def test_an_isolation_that_breaks_is_tried_again_and_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1, 3]  # of the answers, how many times the isolation breaks
    whole = code_pool.Judge.judge

    def breaks(judge: code_pool.Judge, program: str, tests: CodeTests) -> Verdict:
        number = int(program[-2])
        if program.startswith("print") and number < len(left) and left[number]:
            left[number] -= 1
            raise SandboxError("broken")
        return whole(judge, program, tests)

    with CodePool(LIMITS, workers=1) as pool:
        monkeypatch.setattr(code_pool.Judge, "judge", breaks)
        verdicts = list(pool.grade_with([(DOUBLE, f"```python\nprint(8 + 0 * {number})\n```") for number in (0, 1)]))
    assert [verdict.outcome for verdict in verdicts] == ["right", "error"]
    assert verdicts[1].reason == "the isolation broke: broken"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_grader_that_is_ended(number: int, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as grader:
        assert grader.stdout is not None
        grader.stdout.readline()
        until(lambda: len(processes_of(grader.pid)) >= 4)
        grader.send_signal(number)
        grader.wait(20)
    until(lambda: not processes_of(grader.pid))
    if number == signal.SIGINT:
        assert os.listdir(tmp_path) == ["endless.py"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_program_that_the_kernel_takes(machine: str) -> None:
    """Jumps stay within it, and every path ends in a decision."""
    for writes in (True, False):
        code = seccomp.build(machine, 1234, writes=writes)
        assert len(code) < 4096
        for place, (operation, if_true, if_false, _) in enumerate(code):
            assert place + 1 + max(if_true, if_false) < len(code) or operation == 0x06
        assert code[-1][0] == 0x06
    if platform.machine() == machine:
        assert seccomp.is_supported()
