"""The program in a response."""

from __future__ import annotations

import re
import textwrap

_PYTHON = ("py", "python", "python3", "py3", "pypy", "pypy3")
# An opening or closing fence: at the start of a line, indented by a list perhaps; CommonMark, section 4.5. Models also open one behind
# words ("Answer: ```python").
_FENCE = re.compile(
    rf"^(?:[ \t]*+(?:>[ \t]?)*+(`{{3,}}+|~{{3,}}+)([^`\n]*+)|[^`\n]*+(`{{3,}}+)((?:{'|'.join(_PYTHON)})[ \t\r]*+))$",
    re.MULTILINE | re.IGNORECASE,
)


def extract_program(answer: str) -> str | None:
    """The last fenced block of Python in an answer, else the last of no language; None where it has neither.

    A block that the answer's end leaves open counts, as far as it goes. Blocks of other languages (output, shell) are passed over, and so
    are those of no language where another is said to be Python: they mostly show input or output.
    """
    found: dict[bool, str] = {}  # of blocks with a language, and of those without
    opened: tuple[str, str, int] | None = None  # fence, language, where the block begins
    for fence in _FENCE.finditer(answer):
        marks, info = fence[1] or fence[3], (fence[2] or fence[4] or "").strip()
        if opened is None:
            words = re.split(r"[\s{},.:]+", info.strip("{}. ").lower(), maxsplit=1)
            opened = (marks, words[0], fence.end() + 1)
        elif not info and marks[0] == opened[0][0] and len(marks) >= len(opened[0]):
            _take_(found, opened[1], answer[opened[2] : fence.start()])
            opened = None
    if opened is not None:
        _take_(found, opened[1], answer[opened[2] :])
    return found.get(True, found.get(False))


def _take_(found: dict[bool, str], language: str, block: str) -> None:
    if (not language or language in _PYTHON) and block.strip():
        found[bool(language)] = textwrap.dedent(block).strip("\n")
