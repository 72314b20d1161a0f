"""Programs against tests of every kind: what passes, what fails and how, and that no program can claim to have passed."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluate.code.cases import AssertCase, CallCase, CodeTests, StdinCase
from megatron_opd.evaluate.code.compare import same_output, same_value
from megatron_opd.evaluate.code.isolation import MODES, find_interpreter
from megatron_opd.evaluate.code.pool import CodePool, describe_isolation, find_isolation
from megatron_opd.evaluate.code.tests_of import tests_of as read_tests
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.recipe.code_limits import CodeLimits
from megatron_opd.records import Prompt

LIMITS = CodeLimits(seconds=2.0, wall_seconds=10.0, memory_mib=512)


def grade(items: list[tuple[CodeTests, str]], limits: CodeLimits = LIMITS) -> list[Verdict]:
    with CodePool(limits, workers=2) as pool:
        return list(pool.grade_with([(tests, f"```python\n{program}\n```") for tests, program in items]))


def failures(items: list[tuple[CodeTests, str, str | None]], limits: CodeLimits = LIMITS) -> list[tuple[str, str | None, str]]:
    """Programs that did not end as the third of the item says: None, or how they fail."""
    verdicts = grade([item[:2] for item in items], limits)
    found = [(program, verdict) for (_, program, how), verdict in zip(items, verdicts, strict=True) if verdict.detail.get("how") != how]
    assert all((verdict.score == 1.0) == (verdict.detail.get("how") is None) for verdict in verdicts)
    return [(program, verdict.detail.get("how"), verdict.reason) for program, verdict in found]


SUM = CodeTests((StdinCase("1 2\n", "3\n"), StdinCase("5\n2", " 7.0 \n\n")))
ADD = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"


def test_programs_that_read_their_input() -> None:
    right = [
        ADD,
        "print(sum(map(int, open(0).read().split())))",
        "print(sum(map(int, open('/dev/stdin'))) if False else sum(map(int, stdin.read().split())))",
        "data = sys.stdin.buffer.read().split()\nsys.stdout.write(str(int(data[0]) + int(data[1])))",
        "import threading\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\nthreading.stack_size(1 << 26)\nthreading.Thread(target=main).start()",
        "def main():\n    print(reduce(lambda a, b: a + b, map(int, sys.stdin.read().split())))\nif __name__ == '__main__':\n    main()",
        ADD + "\nexit()",
        ADD + "\nsys.exit(1)",  # LiveCodeBench looks at what was printed alone
        "from __future__ import annotations\n" + ADD,
        "import asyncio\nasync def main():\n    print(sum(map(int, sys.stdin.read().split())))\nasyncio.run(main())",
        "import tempfile\nprint(sum(map(int, sys.stdin.read().split())), file=sys.stdout, flush=True)",
        "out = open(1, 'w')\nout.write(str(sum(map(int, sys.stdin.read().split()))))",  # what its end writes
        # names that modules share with what they export are the modules
        "datetime.datetime(2020, 1, 1), copy.copy([]), random.seed(1), str(7 ** 12_000)\nprint(sum(map(int, sys.stdin.read().split()[bisect.bisect([], 1):])))",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as pool:\n    print(sum(pool.map(int, sys.stdin.read().split())))",
    ]
    wrong = {
        "print(3)": "wrong output",
        "print('3\\n3')": "wrong output",
        ADD + "\nraise ValueError('no')": "exception",
        ADD + "\n1 / 0": "exception",
        "a, b = map(int, input().split())\nprint(a + b)": "exception",  # the second input has a number a line
        "print(": "exception",
        ADD + "\nimport os\nos._exit(3)": "exception",
        ADD + "\nwhile True: pass": "timeout",
    }
    items: list[tuple[CodeTests, str, str | None]] = [(SUM, program, None) for program in right]
    items += [(SUM, program, how) for program, how in wrong.items()]
    assert failures(items, LIMITS.model_copy(update={"seconds": 1.0})) == []


def test_the_first_test_that_fails_is_named() -> None:
    verdict = grade([(SUM, "print(3)")])[0]
    assert (verdict.outcome, verdict.score) == ("wrong", 0.0)
    assert verdict.detail == {
        "tests": 2, "failed": 1, "how": "wrong output", "expected": " 7.0 \n\n", "got": "3\n", "isolation": find_isolation(LIMITS).mode,
    }  # fmt: skip
    assert 0 < verdict.seconds < 1
    raised = grade([(SUM, "raise KeyError('x')")])[0]
    assert (raised.detail["failed"], raised.detail["how"]) == (0, "exception")
    assert "KeyError: 'x'" in raised.reason


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True), ("  1 2  \n3", "1 2\n3\n\n", True), ("1  2", "1 2", True), ("1.0 2e0", "1 2", True),
        ("1\n2", "1 2", False), ("yes", "Yes", False), ("a  b", "a b", False), ("0.333", "0.3333", False), ("1 2 3", "1 2", False),
        ("", "", True), ("", "0", False), ("nan", "nan", True), ("nan 1", "nan 1.0", False), ("Infinity 1", "inf 1.0", True),
        ("1" * 100_000 + " 2.0", "1" * 100_000 + " 2", True), ("1e999999999", "1e999999998", False), ("sNaN 1", "1 1", False),
    ],
)  # fmt: skip
def test_comparison_of_outputs(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        ((1, 2), [1, 2], True), ([(1, 2)], [[1, 2]], False), (1.0, 1, True), (True, 1, True), ("1", 1, False), (0.1 + 0.2, 0.3, False),
        (None, None, True), ({1: 2}, {"1": 2}, False), ([], [], True), (float("nan"), float("nan"), False),
    ],
)  # fmt: skip
def test_comparison_of_values(returned: Any, expected: Any, same: bool) -> None:
    assert same_value(returned, expected) is same


CALLS = CodeTests((CallCase(([3, 1, 2],), [1, 2, 3]), CallCase(([],), []), CallCase(([2.5, 1],), [1, 2.5])), function="order")


def test_calls() -> None:
    items = {
        "def order(x): return sorted(x)": None,
        "def order(x: List[int]) -> List[int]: return tuple(sorted(x))": None,
        "class Solution:\n    def order(self, x):\n        x.sort()\n        return x": None,
        "class Solution:\n    @staticmethod\n    def order(x): return sorted(x)": None,
        "order = sorted": None,
        "def order(x):\n    print('{\"value\": [1, 2, 3]}')\n    return sorted(x)": None,
        "import numpy" if not find_interpreter(None).packages else "import numpy as np\ndef order(x): return [y.item() for y in np.sort(x)]": (
            "exception" if not find_interpreter(None).packages else None
        ),
        "def order(x): return [1, 2, 3]": "wrong output",
        "def order(x): return sorted(x, reverse=True)": "wrong output",
        "def other(x): return sorted(x)": "exception",
        "def order(x, y): return sorted(x)": "exception",
        "def order(x): return set(x)": "wrong output",
        "def order(x): return (each for each in sorted(x))": "wrong output",
        "def order(x):\n    while True: pass": "timeout",
        "def order(x): return [0] * 10 ** 5": "wrong output",
        # Claims: an object that equals everything, an own exit, words on every descriptor, a reply before it is asked.
        "class All(list):\n    def __eq__(self, other): return True\ndef order(x): return All()": "wrong output",
        "class All:\n    def __eq__(self, other): return True\ndef order(x): return All()": "wrong output",
        "import os\ndef order(x): os._exit(0)": "exception",
        "def order(x): raise SystemExit(0)": "exception",
        "import os\nfor n in range(3, 20):\n    try: os.write(n, b'{\"passed\": 0}\\n{\"passed\": 1}\\n{\"passed\": 2}\\n')\n    except OSError: pass": "exception",
        "import os\nfor n in range(3, 20):\n    try: os.write(n, b'{\"value\": [1]}\\n' * 9)\n    except OSError: pass\ndef order(x): return x": "wrong output",
        "import os\nfor n in range(3, 20):\n    try: os.close(n)\n    except OSError: pass\ndef order(x): return sorted(x)": "exception",
        "x = []\nx.append(x)\ndef order(_): return x": "exception",
    }  # fmt: skip
    assert failures([(CALLS, program, how) for program, how in items.items()], LIMITS.model_copy(update={"seconds": 0.7})) == []


BEFORE = '''from typing import List
import math


def scale(x):
    return 10 * x


def spread(numbers: List[float]) -> float:
    """ Largest minus smallest.
    >>> spread([1, 3])
    2
    """
'''
CHECK = """
METADATA = {}

def check(candidate):
    assert candidate([1.0, 3.5]) == 2.5
    assert abs(candidate([0.1, 0.3]) - 0.2) < 1e-9
    assert scale(candidate([1, 2])) == 10
    for n in range(3):
        numbers = list(range(n + 1))
        assert candidate(numbers) == max(numbers) - min(numbers), "of a range"

check(spread)
"""
ASSERTS = CodeTests((AssertCase(CHECK), AssertCase("assert math.isclose(spread([1, 2]), 1)")), before=BEFORE)


def test_assertions() -> None:
    items = {
        "def spread(numbers: List[float]) -> float:\n    return max(numbers) - min(numbers)": None,
        "    return max(numbers) - min(numbers)": None,
        "return max(numbers) - min(numbers)": None,
        "    low = min(numbers)\n    return max(numbers) - low\n\ndef more(): return 1": None,
        "spread = lambda numbers: max(numbers) - min(numbers)": None,
        "def scale(x): return x * 10\ndef spread(numbers): return max(numbers) - min(numbers)": None,
        "def scale(x): return 11 * x\ndef spread(numbers): return max(numbers) - min(numbers)": "wrong output",
        "def spread(numbers): return 2.5": "wrong output",
        "def spread(numbers): return None": "wrong output",
        "def spread(numbers): raise AssertionError": "exception",
        "def spread(numbers): return numbers[7]": "exception",
        "x = 1 +": "exception",
        "def spread(numbers): return bytearray(1 << 40)": "memory",
        "def spread(numbers):\n    while True: pass": "timeout",
        # Claims: none of these may count as success.
        "import sys\nsys.exit(0)": "exception",
        "import os\nos._exit(0)": "exception",
        "import atexit, os\natexit.register(os._exit, 0)\ndef spread(numbers): raise SystemExit": "exception",
        "import os\ndef spread(numbers): os._exit(0)": "exception",
        "class All:\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0\ndef spread(numbers): return All()": "wrong output",
        "class F(float):\n    def __eq__(self, other): return True\n    def __abs__(self): return 0\ndef spread(numbers): return F(1)": "wrong output",
        "def scale(x): return 10\ndef check(f): pass\ndef spread(numbers): return 2.5": "wrong output",
        "import builtins\nbuiltins.abs = lambda x: 0\nabs = builtins.abs\nmax = min = len\ndef spread(numbers): return 2.5": "wrong output",
        "import os\nfor n in range(3, 20):\n    try: os.write(n, b'{\"passed\": 0}\\n{\"passed\": 1}\\n')\n    except OSError: pass\ndef spread(numbers): return 2.5": "exception",
        "import sys\ndef spread(numbers):\n    f = sys._getframe()\n    while f:\n        for k in ('names', 'expected', 'code'): f.f_locals.pop(k, None)\n        f = f.f_back\n    return 2.5": "wrong output",
        "import gc\ndef spread(numbers):\n    return [x for x in gc.get_objects() if isinstance(x, str) and 'candidate(' in x] or 2.5": "wrong output",
        "def spread(numbers):\n    raise KeyboardInterrupt": "exception",
        "def spread(numbers):\n    raise GeneratorExit": "exception",
    }  # fmt: skip
    assert failures([(ASSERTS, program, how) for program, how in items.items()], LIMITS.model_copy(update={"seconds": 0.7})) == []


def test_assertions_in_the_manner_of_mbpp() -> None:
    """Names of builtins, classes of the program, iterators, arguments changed in place, several cases."""
    total = CodeTests((AssertCase("assert sum(10, 15) == 6"), AssertCase("assert sum(100, 150) == 93")))
    pairs = CodeTests((AssertCase("assert longest([Pair(5, 24), Pair(15, 25), Pair(27, 40)]) == 2\nassert Pair(1, 2).a == 1"),))
    common = CodeTests((AssertCase("assert set(common((3, 4, 5), (5, 7, 4))) == set((4, 5))"),))
    in_place = CodeTests((AssertCase("x = [3, 1]\nassert order(x) is None\nassert x == [1, 3]"),))
    row = {"text": "", "code": "", "test_list": ["assert depth(root) == 2", "assert depth(root.left) == 1"]}
    tree = read_tests(Prompt(0, "", None, row | {"test_setup_code": "root = Node(1)\nroot.left = Node(2)"}))
    import_ = CodeTests((AssertCase("assert root_of(16) == math.sqrt(16)"),), before="import math")
    raises = CodeTests((AssertCase("try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"),))
    numbers = CodeTests(
        (AssertCase("assert big(5000) == 7 ** 5000 and big(2) == 49\nassert kinds() == {(1, 2): [None, 1j, b'x', {3}, range(4)]}"),)
    )
    whole = CodeTests((AssertCase("assert all(map(f, [1, 2]))"),))
    truth = CodeTests((AssertCase("assert f('a1')\nassert not f('a')\nassert not Empty()"),))
    iterator = CodeTests((AssertCase("assert list(f(3)) == [0, 1, 2]\nx = f(1)\nassert next(x) == 0 and list(x) == []"),))
    close = CodeTests((AssertCase("assert math.isclose(f(1), 0.5)"),))
    constant = CodeTests((AssertCase("assert LIMIT == 10"), AssertCase("import math\nassert max([1]) == math.floor(1.5)")))
    pair = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef longest(pairs):\n    return 2 if pairs[2].b == 40 else 0"
    node = "class Node:\n    def __init__(self, x): self.x, self.left = x, None\ndef depth(n): return 0 if n is None else 1 + depth(n.left)"
    items = [
        (total, "def sum(a, b):\n    return 6 if a == 10 else 93", None),
        (total, "def sum(a, b):\n    return 6", "wrong output"),
        (pairs, pair, None),
        (common, "def common(a, b): return iter({*a} & {*b})", None),
        (common, "def set(x): return 1\ndef common(a, b): return 2", "wrong output"),
        (in_place, "def order(x): x.sort()", None),
        (in_place, "def order(x): sorted(x)", "wrong output"),
        (tree, node, None),
        (import_, "def root_of(x): return x ** 0.5", None),
        (raises, "def f(x): return 1 / x", None),
        (raises, "def f(x): return x", "wrong output"),
        (whole, "def f(x): return True", None),
        (whole, "def f(x): raise StopIteration", "exception"),
        (truth, "import re\ndef f(x): return re.search('[0-9]', x)\nclass Empty:\n    def __len__(self): return 0", None),
        (close, "import math\ndef f(x): return x / 2", None),
        (close, "class math:\n    def isclose(*a): return True\ndef f(x): return x", "wrong output"),
        (truth, "def f(x): return object()\nclass Empty(list): pass", "wrong output"),
        (iterator, "def f(n): yield from range(n)", None),
        (iterator, "def f(n): return n", "wrong output"),
        (constant, "LIMIT = 10\ndef max(x): return 1", None),
        (constant, "LIMIT = 10\ndef max(x): return 2", "wrong output"),
        (numbers, "def big(n): return 7 ** n\ndef kinds(): return {(1, 2): [None, 1j, b'x', {3}, range(4)]}", None),
    ]
    assert failures(items) == []


def test_a_test_begins_its_own_time() -> None:
    slow = "import time\nend = time.process_time() + 0.15\nwhile time.process_time() < end: pass\n"
    tests = CodeTests(tuple(StdinCase("", "1") for _ in range(4)))
    calls = CodeTests(tuple(CallCase((), 1) for _ in range(4)), function="f")
    asserts = CodeTests(tuple(AssertCase("assert f() == 1") for _ in range(4)))
    function = "def f():\n" + "".join(f"    {line}\n" for line in slow.splitlines()) + "    return 1"
    limits = LIMITS.model_copy(update={"seconds": 0.4, "wall_seconds": 20.0})
    verdicts = grade([(tests, slow + "print(1)"), (calls, function), (asserts, function)], limits)
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0, 1.0], verdicts
    assert all(0.55 < verdict.seconds < 1.2 for verdict in verdicts)


def test_every_mode_judges_alike() -> None:
    items = [(SUM, ADD), (SUM, "print(3)"), (CALLS, "def order(x): return sorted(x)"), (ASSERTS, "    return max(numbers) - min(numbers)")]
    seen = set()
    for mode in MODES:
        try:
            found = find_isolation(CodeLimits(isolation=mode))
        except UserError as error:
            assert str(error).startswith("programs can't be isolated on this machine:\n  " + mode)  # noqa: PT017
            continue
        assert found.mode == mode
        verdicts = grade(items, LIMITS.model_copy(update={"isolation": mode}))
        assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0, 1.0]
        assert {verdict.detail["isolation"] for verdict in verdicts} == {mode}
        assert describe_isolation(CodeLimits(isolation=mode)).startswith(f"{mode} (")
        seen.add(mode)
    assert seen


def test_an_interpreter_that_is_none_is_refused() -> None:
    with (
        pytest.raises(UserError, match=r"the interpreter '/nowhere/python', which is to run programs"),
        CodePool(CodeLimits(python="/nowhere/python")),
    ):
        pass
