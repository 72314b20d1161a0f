"""Which part of an answer is its program, and how it is put behind the source that a prompt begins with."""

from __future__ import annotations

import pytest

from megatron_opd.evaluate.code.extract import extract_program
from megatron_opd.evaluate.code.inside.compose import with_prompt


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("first\n```python\nx = 1\n```\nno, better\n```py\nx = 2\n```\nDone.", "x = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```Python3\nx = 1\n```", "x = 1"),
        ("```python title=\"a.py\"\nx = 1\n```", "x = 1"),
        ("``` {.python .numbered}\nx = 1\n```", "x = 1"),
        ("~~~python\nx = '```'\n~~~", "x = '```'"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
        ("1. do\n   ```python\n   if x:\n       y = 1\n   ```", "if x:\n    y = 1"),
        ("> ```python\nx = 1\n> ```", "x = 1"),
        ("```python\nx = 1\n```\nIt prints\n```text\n1\n```", "x = 1"),
        ("```python\nx = 1\n```\nRun it\n```bash\npython a.py\n```", "x = 1"),
        ("```python\nx = 1\n```\n```\n\n```", "x = 1"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\r"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("```python\nx = 1\n```\nand\n```python\ny = ", "y = "),
        ("```python\nx = 1\n```\nFor the input\n```\n1 2\n```", "x = 1"),
        ("```\nx = 1\n```\nor\n~~~\nx = 2\n~~~", "x = 2"),
        ("Answer: ```python\nx = 1\n```", "x = 1"),
        ("```pypy3\nx = 1\n```", "x = 1"),
        ("```cpp\nint x;\n```", None),
        ("x = 1", None),
        ("use `x = 1` here, or ```x = 2``` there", None),
        ("", None),
        ("```python\n```", None),
        ("```", None),
    ],
)  # fmt: skip
def test_the_last_block_of_python_is_the_program(answer: str, program: str | None) -> None:
    assert extract_program(answer) == program


@pytest.mark.parametrize("piece", ["`", "```", "``` ", "\n```", " ", "> ", "\n> ```python\n", "~", "```python\n", "\t``` x`"])
def test_no_answer_takes_long_to_read(piece: str) -> None:
    extract_program(piece * (1_000_000 // len(piece)))


PROMPT = 'import math\n\n\ndef area(r: float) -> float:\n    """ Of a circle. """\n'
OPEN = "def area(r):\n"  # without a docstring it does not parse


@pytest.mark.parametrize(
    ("before", "function", "program", "sources"),
    [
        ("", None, "x = 1", ["x = 1"]),
        (PROMPT, None, "def area(r): return r", [PROMPT, "def area(r): return r"]),
        (PROMPT, "area", "area = len", [PROMPT, "area = len"]),
        (PROMPT, None, "    return r", [PROMPT + "    return r"]),
        (PROMPT, None, "return r", [PROMPT + "    return r"]),
        (PROMPT, None, "s = r * r\n    return s", [PROMPT + "    s = r * r\n    return s"]),
        (PROMPT, None, "def half(x):\n    return x / 2\nreturn half(r)", [PROMPT + "    def half(x):\n        return x / 2\n    return half(r)"]),
        (PROMPT + "    import os\n", None, "return r", [PROMPT + "    import os\n    return r"]),
        (OPEN, None, "    return r", [OPEN + "    return r"]),
        (OPEN, None, "def area(r): return r", ["def area(r): return r"]),
        ("import math", None, "def f(): return math.pi", ["import math", "def f(): return math.pi"]),
        (PROMPT, None, "return (", [PROMPT + "return ("]),
    ],
)  # fmt: skip
def test_a_program_that_goes_on_with_the_prompt_is_put_behind_it(
    before: str, function: str | None, program: str, sources: list[str]
) -> None:
    assert with_prompt(program, before, function) == sources
