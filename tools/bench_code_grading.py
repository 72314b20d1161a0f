#!/usr/bin/env python3
"""How fast programs are graded: python tools/bench_code_grading.py [--answers 200] [--workers 1 2] [--isolation auto] [--json FILE]

Answers of three kinds, as benchmarks have them: programs that read five inputs, functions that are called with five lists, functions
with assertions. Every fourth is wrong. Each program computes for about SECONDS a test, so that what is timed is what grading is: the
programs, and what isolating them costs. Prints a Markdown table, seconds by the clock and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from megatron_opd.evaluate.code.cases import AssertCase, CallCase, CodeTests, StdinCase
from megatron_opd.evaluate.code.pool import CodePool, describe_isolation
from megatron_opd.recipe.code_limits import CodeLimits

NUMBERS = [[3, 1, 2], [5], [2, 2], list(range(20)), [9, -4]]
WORK = "sum(n * n for n in range(100_000))"  # about 10 ms
PROGRAMS = (
    (
        CodeTests(tuple(StdinCase(" ".join(map(str, each)), str(sum(each))) for each in NUMBERS)),
        f"{WORK}\nprint(sum(map(int, input().split())) + WRONG)",
    ),
    (
        CodeTests(tuple(CallCase((each,), sorted(each)) for each in NUMBERS), "order"),
        f"def order(x):\n    {WORK}\n    return sorted(x)[WRONG:]",
    ),
    (
        CodeTests((AssertCase("def check(f):\n" + "".join(f"    assert f({each}) == {max(each)}\n" for each in NUMBERS) + "check(most)"),)),
        f"def most(x):\n    {WORK}\n    return max(x) + WRONG",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    limits = CodeLimits(isolation=arguments.isolation)
    isolation = describe_isolation(limits)
    print(
        f"{arguments.answers} answers, {os.cpu_count()} CPUs, {isolation}\n\n| workers | seconds | CPU seconds | an answer |\n|---|---|---|---|"
    )
    measured = [_measure(limits, arguments.answers, workers) for workers in arguments.workers]
    if arguments.json is not None:
        record = {"answers": arguments.answers, "cpus": os.cpu_count(), "isolation": isolation, "measured": measured}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _measure(limits: CodeLimits, count: int, workers: int) -> dict[str, Any]:
    items = []
    for number in range(count):
        tests, program = PROGRAMS[number % len(PROGRAMS)]
        items.append((tests, f"```python\n{program.replace('WRONG', str(int(number % 4 == 0)))}\n```"))
    with CodePool(limits, workers=workers) as pool:
        cpu, start = _cpu_seconds(), time.perf_counter()
        verdicts = list(pool.grade_with(items))
        seconds = time.perf_counter() - start
    cpu = _cpu_seconds() - cpu
    wrong = [number for number, verdict in enumerate(verdicts) if (verdict.score == 1.0) == (number % 4 == 0)]
    if wrong:
        raise SystemExit(f"answer {wrong[0]} has a verdict that it should not have: {verdicts[wrong[0]]}")
    print(f"| {workers} | {seconds:.1f} | {cpu:.1f} | {1000 * seconds / count:.0f} ms |")
    return {"workers": workers, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
