"""A program and the source that stands before it, such as the beginning of a function in HumanEval."""

from __future__ import annotations

import ast
import re
import textwrap

_DEFINITION = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)


def with_prompt(program: str, before: str, function: str | None) -> list[str]:
    """The sources to run, one after the other, of a program that may only go on with the source `before`.

    One that defines the function stands for itself, behind `before`, which has imports and other functions. One that does not is put
    behind the last line of `before`, indented as a body if it isn't yet.
    """
    if not before.strip():
        return [program]
    function = function or _unwritten(before)
    if function is None or _defines(program, function) or not _parses(before):
        first = before if _parses(before) else ""
        if function is not None and not first and not _defines(program, function):
            return [_continued(before, program)]
        return [each for each in (first, program) if each]
    return [_continued(before, program)]


def _continued(before: str, program: str) -> str:
    start = before if before.endswith("\n") else before + "\n"
    bodies = [program, textwrap.indent(program, "    ")]
    first, _, rest = program.partition("\n")
    bodies.append(f"    {first}\n{rest}")  # an answer that began behind the indentation
    return next((start + body for body in bodies if _parses(start + body) and not _leaves_body(start, start + body)), start + program)


def _leaves_body(before: str, whole: str) -> bool:
    """Whether the function that `before` opens stays without a body."""
    name = _unwritten(before)
    return any(is_stub(node) and getattr(node, "name", None) == name for node in ast.parse(whole).body)


def _unwritten(before: str) -> str | None:
    """The function at the end of `before` that is for the program to write."""
    if _parses(before):
        return next((getattr(node, "name", None) for node in reversed(ast.parse(before).body) if is_stub(node)), None)
    names = _DEFINITION.findall(before)
    return names[-1] if names else None


def _defines(program: str, function: str) -> bool:
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.search(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b", program, re.MULTILINE) is not None
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == function:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == function for target in node.targets):
            return True
        if isinstance(node, (ast.Import, ast.ImportFrom)) and any(function == (name.asname or name.name) for name in node.names):
            return True
    return False


def _parses(source: str) -> bool:
    try:
        compile(source, "program", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def is_stub(node: ast.stmt) -> bool:
    """Whether a statement defines a function that holds nothing but a docstring, `pass`, `...` or imports."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return all(
        isinstance(each, (ast.Pass, ast.Import, ast.ImportFrom)) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in node.body
    )
