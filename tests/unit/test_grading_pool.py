"""Grading in worker processes: hostile responses are limited, isolated and counted, and cost no other response anything."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluate import grading_pool
from megatron_opd.evaluate.accuracy import check_answers
from megatron_opd.evaluate.grading_pool import GradingPool
from megatron_opd.evaluate.grading_worker import checked_eval
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.recipe.config import EvalStage
from megatron_opd.records import Prompt

RIGHT, WRONG = (1.0, "right"), (0.0, "wrong")
HOSTILE = [
    r"\boxed{7^{9^9}}", "9**9**9**9", r"\boxed{10^{10^{10}}}", r"\boxed{9^{9^{9^9}}!}", r"\boxed{" * 5000, r"\boxed{" + "{" * 200_000,
    "9" * 3_000_000, "1e999999999", r"\boxed{1e999999999}", "<answer>" * 12_000, "<think>" * 12_000 + "</think>", "$" * 100_000,
    "Answer: 1" + " " * 200_000 + "2", "\\text{" * 50_000, "the answer is " * 20_000, "**" * 100_000, "(" * 100_000 + "A", "111 " * 50_000 + "/",
]  # fmt: skip


def item(answer: str | None, text: str, index: int = 0, **meta: object) -> tuple[Prompt, str]:
    return Prompt(index, "question", answer, meta), text


def stage(grader: str) -> EvalStage:
    return EvalStage.model_validate({"prompts": "eval.jsonl", "grader": grader, "grading_seconds": 0.7})


def short(verdict: Verdict) -> tuple[float, str]:
    return verdict.score, verdict.outcome


def grade_all(grader: str, items: list[tuple[Prompt, str]], *, seconds: float = 1.0, workers: int | None = None) -> list[Verdict]:
    with GradingPool(grader, seconds=seconds, workers=workers) as pool:
        return list(pool.grade(items))


@pytest.mark.parametrize("grader", ["exact", "number", "math", "choice"])
def test_hostile_responses_end_and_the_others_are_graded(grader: str) -> None:
    if grader == "math":
        pytest.importorskip("math_verify")
    gold = "B" if grader == "choice" else "5"
    items = [each for text in HOSTILE for each in (item(gold, text), item(gold, gold))]
    verdicts = grade_all(grader, items, seconds=0.7 if grader == "math" else 4.0)
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0] * len(HOSTILE)
    assert all(short(verdict) == RIGHT for verdict in verdicts[1::2])
    outcomes = [verdict.outcome for verdict in verdicts[::2]]
    assert set(outcomes[:3]) == {"timeout"} if grader == "math" else set(outcomes) <= {"wrong", "no_answer", "unclosed"}
    assert all(len(verdict.answer or "") <= 200 and len(verdict.reason) <= 500 for verdict in verdicts)


def test_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    items = [item(str(number % 7), f"so it is {number % 3}", number) for number in range(60)]
    one, three = ([replace(verdict, seconds=0.0) for verdict in grade_all("number", items, workers=workers)] for workers in (1, 3))
    assert one == three
    assert [short(verdict) for verdict in one] == [RIGHT if number % 7 == number % 3 else WRONG for number in range(60)]


def test_the_caller_may_be_a_thread() -> None:
    pytest.importorskip("math_verify")
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(grade_all("math", [item("1/2", r"\boxed{0.5}")])))
    thread.start()
    thread.join()
    assert [short(verdict) for verdict in found] == [RIGHT]
    assert found[0].answer == "1/2"
    assert 0 < found[0].seconds < 1


def test_unreadable_answers_are_counted_and_the_first_named() -> None:
    prompts = [item(answer, "", index)[0] for index, answer in enumerate(["1", *["seven"] * 6, None])]
    with pytest.raises(UserError) as caught:
        check_answers(stage("number"), prompts)
    text = str(caught.value)
    assert text.startswith("eval.jsonl: 7 of 8 answers can't be used by the grader 'number'")
    assert "prompt 1: answer 'seven' is not a number" in text
    assert "prompt 6" not in text
    assert text.endswith("and 2 more")
    check_answers(stage("number"), prompts[:1])


def test_an_answer_that_takes_for_ever_to_read_is_unreadable() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(UserError, match=r"eval.jsonl: prompt 0: reading its answer fails: over the limit of time"):
        check_answers(stage("math"), [item("7^{9^9}", "")[0]])


def rg_item(dataset: str, text: str) -> tuple[Prompt, str]:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = json.loads(json.dumps(reasoning_gym.create_dataset(dataset, size=1, seed=5)[0]))
    return item(entry["answer"], text.replace("RIGHT", str(entry["answer"])), reasoning_gym={"dataset": dataset, "entry": entry})


@pytest.mark.parametrize("dataset", ["countdown", "spiral_matrix", "polynomial_multiplication"])
def test_what_a_model_answers_is_not_run(dataset: str, tmp_path: Path) -> None:
    """These scorers call eval, or sympy's parser, which does. Both stages of the defence have tests of their own below."""
    marker = tmp_path / "marker"
    attacks = [
        f'__import__("os").system("touch {marker}")',
        f'open("{marker}", "w")',
        f"sympify(\"__import__('os').system('touch {marker}')\")",
        "().__class__.__base__.__subclasses__()",
        "exit()",
        "[" * 5000,
    ]
    verdicts = grade_all(
        "reasoning_gym", [rg_item(dataset, f"<answer>{text}</answer>") for text in [*attacks, "[0]*10**10", "9**9**9**9", "RIGHT"]]
    )
    assert not marker.exists()
    assert all(verdict.score <= 0.01 for verdict in verdicts[:-1])  # countdown's own least score
    if dataset == "spiral_matrix":  # sympy's parser makes no list of it
        assert verdicts[-3] == Verdict(0.0, "timeout", reason="over the limit of memory", detail={"limit": "memory"})
    assert verdicts[-2].outcome == "timeout"
    assert short(verdicts[-1]) == RIGHT


def test_a_scorer_that_raises_is_counted_as_an_error() -> None:
    verdicts = grade_all("reasoning_gym", [rg_item("prime_factorization", f"<answer>{text}</answer>") for text in ("[1,2]", "RIGHT")])
    assert verdicts[0].outcome == "error"
    assert verdicts[0].reason.startswith("ValueError: invalid literal for int()")
    assert short(verdicts[1]) == RIGHT


@pytest.mark.parametrize("text", ["[1, 'a', (2,)]", "-3 + 0x10 << 2", "{1: 2.5}", "max(1, 2)", "abs(-1) == 1"])
def test_arithmetic_is_evaluated(text: str) -> None:
    assert checked_eval(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "open('x')", "exit()", "(1).__class__", "[i for i in [1]]", "lambda: 0", "print(1)", "getattr(1, 'real')",
        "(lambda: 0)()", "f'{1}'", "sympify('1')", "eval('1')", "[1][0]", "(a := 1)",
    ],
)  # fmt: skip
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        checked_eval(text, {"sympify": eval})


FILES = [
    "open('marker', 'w')", "os.open('marker', os.O_CREAT)", "os.mkdir('marker')", "os.remove('there')", "os.rename('there', 'marker')",
    "pathlib.Path('marker').touch()", "os.symlink('there', 'marker')", "subprocess.run(['touch', 'marker'])", "os.execv('/bin/true', ['true'])",
]  # fmt: skip
MORE = [
    "os.system('touch marker')", "os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.kill(os.getppid(), 9)",
    "socket.create_connection(('127.0.0.1', 9))", "ctypes.CDLL(None).system(b'touch marker')", "bytearray(1 << 31)",
]  # fmt: skip


@pytest.mark.parametrize("with_hook", [True, False], ids=["hook", "kernel"])
def test_a_locked_process_can_do_nothing(with_hook: bool, tmp_path: Path) -> None:
    """The worker's second defence, for what a parser might let through after all. `kernel`: without Python's hook, on Landlock alone."""
    (tmp_path / "there").write_text("whole")
    code = f"""
import ctypes, os, pathlib, resource, signal, socket, subprocess, sys
from megatron_opd.evaluate import grading_worker
if ctypes.CDLL(None).syscall(grading_worker._LANDLOCK_CREATE, None, 0, 1) < 0 and not {with_hook}:
    raise SystemExit(5)
if not {with_hook}:
    grading_worker._forbid = lambda event, arguments: None
grading_worker._lock()
for attempt in {FILES + MORE if with_hook else FILES!r}:
    try:
        eval(attempt)
    except (OSError, MemoryError):
        continue
    print(attempt)
print(open("there").read(), sorted(os.listdir()))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    if run.returncode == 5:
        pytest.skip("this kernel has no Landlock")
    assert run.stdout == "whole ['there']\n", run.stdout + run.stderr


def grade_with(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of this test grade by an expression of (name, prompt, text); `w` is their module."""
    grader = (
        f"; from megatron_opd.evaluate import grading_worker as w; import ctypes, os; w.grade = lambda name, prompt, text: {code}; main()"
    )
    monkeypatch.setattr("megatron_opd.evaluate.grading_pool._MAIN", grading_pool._MAIN.replace("; main()", grader))


def test_a_worker_has_nothing_of_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    grade_with("exec('raise ValueError([sorted(os.environ), os.listdir()])')", monkeypatch)
    (verdict,) = grade_all("exact", [item("5", "5")])
    names = ["HOME", "LC_CTYPE", "LD_LIBRARY_PATH", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    names += ["PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONUTF8"]
    listed, empty = ast.literal_eval(verdict.reason.removeprefix("ValueError: "))
    assert set(listed) <= set(names)
    assert empty == []


def test_a_worker_that_is_killed_is_replaced_and_its_response_graded() -> None:
    with GradingPool("exact", seconds=1.0, workers=1) as pool:
        assert list(map(short, pool.grade([item("5", "5")]))) == [RIGHT]
        (worker,) = pool._workers
        worker._process.send_signal(signal.SIGKILL)
        worker._process.wait()
        assert list(map(short, pool.grade([item("5", "5"), item("5", "6")]))) == [RIGHT, WRONG]


def test_a_response_that_crashes_every_worker_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmentation fault, as a parser in C may have."""
    grade_with("ctypes.string_at(0); w._forbid = lambda event, arguments: None", monkeypatch)
    verdicts = grade_all("exact", [item("5", "5"), item("5", "5")], workers=1)
    assert [verdict.outcome for verdict in verdicts] == ["error", "error"]
    assert verdicts[0].reason == f"the grading process ended with code {-signal.SIGSEGV}, twice"


def test_workers_that_cannot_start_are_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opd.evaluate.grading_pool._MAIN", "raise SystemExit(3)")
    with pytest.raises(UserError, match="a grading process can't start"):
        grade_all("exact", [item("5", "5")])
