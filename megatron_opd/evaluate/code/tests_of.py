"""Tests of a prompt, from the columns of its row: LiveCodeBench, HumanEval, MBPP, or our own `tests` (docs/data.md)."""

from __future__ import annotations

import base64
import binascii
import keyword
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from megatron_opd.data.benchmarks import PRIVATE_TESTS, PUBLIC_TESTS, layout_of, setup_lines, text_column, text_list
from megatron_opd.errors import UserError
from megatron_opd.evaluate.code.cases import AssertCase, CallCase, Case, CodeTests, StdinCase
from megatron_opd.records import Prompt
from megatron_opd.safety.untrusted import load_json

_LARGEST_TESTS = 512 << 20  # bytes of one row's private tests, unpacked
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_AROUND_A_TEXT = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_MOST_OPCODES = 8  # a text takes six at most
_KINDS = {"stdin": ("stdin", "stdout"), "call": ("arguments", "expected")}
_OWN = ("kind", "cases", "function", "before")
_REMEDY = "download the file again"


def tests_of(prompt: Prompt) -> CodeTests:
    """The tests of a prompt. Raises UserError naming its row and the field; nothing of the row is run, whatever it holds."""
    where, row = prompt.where or f"prompt {prompt.index}", prompt.meta
    match layout_of(row):
        case "livecodebench":
            return _livecodebench(row, where)
        case "humaneval":
            name = _function(row["entry_point"], f"{where}: 'entry_point'")
            source = f"{text_column(row, 'test', where)}\n\ncheck({name})\n"
            return CodeTests((AssertCase(source),), name, text_column(row, "prompt", where))
        case "mbpp":
            # Behind the program, as in the benchmark: setup may use its classes ("root = Node(1)").
            setup = "".join(f"{text}\n" for text in setup_lines(row, where))
            cases = tuple(AssertCase(setup + source) for source in text_list(row, "test_list", where) if source.strip())
            if not cases:
                raise UserError(f"{where}: 'test_list' is empty; {_REMEDY}")
            return CodeTests(cases)
        case None:
            if row.get("tests") is None:
                fields = ", ".join(row) or "none"
                raise UserError(
                    f"{where}: no tests for a program (other fields: {fields:.200}); give a field 'tests', or a benchmark's file as published"
                )
            return _own(row["tests"], f"{where}: 'tests'")


def _livecodebench(row: Mapping[str, Any], where: str) -> CodeTests:
    """Public and private tests: all of standard input and output, or all calls of the function that `metadata` names."""
    tests = [
        test for name in (PUBLIC_TESTS, PRIVATE_TESTS) if row.get(name) is not None for test in _entries(row[name], f"{where}: {name!r}")
    ]
    if not tests:
        raise UserError(f"{where}: {PUBLIC_TESTS!r} and {PRIVATE_TESTS!r} hold no test; {_REMEDY}")
    kinds = {kind for _, kind, _, _ in tests}
    if kinds == {"stdin"}:
        return CodeTests(tuple(StdinCase(given, wanted) for _, _, given, wanted in tests))
    if kinds != {"functional"}:
        raise UserError(f"{where}: 'testtype' is 'stdin' in some tests and 'functional' in others; {_REMEDY}")
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        metadata = load_json(metadata, f"{where}: 'metadata'")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    return CodeTests(tuple(_call(*test) for test in tests), _function(name, f"{where}: 'func_name' of 'metadata'"))


def _call(at: str, _: str, given: str, wanted: str) -> CallCase:
    """The input has an argument a line, the output is what is to be returned, all of it JSON."""
    lines = [line for line in given.split("\n") if line.strip()]
    arguments = tuple(load_json(line, f"{at}: argument {number}", unique=False) for number, line in enumerate(lines, start=1))
    return CallCase(arguments, load_json(wanted, f"{at}: output", unique=False))


def _entries(value: Any, where: str) -> list[tuple[str, str, str, str]]:
    """(where, testtype, input, output) of each test of a column. Raises UserError."""
    if isinstance(value, str):
        text = value if value.lstrip().startswith("[") else _unpack(value, where)
        value = load_json(text, where, unique=False)
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of tests, not {value!r:.80}; {_REMEDY}")
    found = []
    for number, entry in enumerate(value, start=1):
        at = f"{where}, test {number}"
        fields = [entry.get(name) if isinstance(entry, dict) else None for name in ("testtype", "input", "output")]
        kind, given, wanted = fields
        if not isinstance(given, str) or not isinstance(wanted, str) or kind not in ("stdin", "functional"):
            raise UserError(f"{at} must have the texts input and output, and a testtype stdin or functional, not {entry!r:.200}; {_REMEDY}")
        found.append((at, kind, given, wanted))
    return found


def _unpack(packed: str, where: str) -> str:
    """The text of base64 of zlib of a pickle of one text, as LiveCodeBench packs its private tests. Raises UserError.

    A pickle is a program. This one is not run: its opcodes are listed, and of all there are only those that make a text may occur.
    """
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(packed, validate=True), _LARGEST_TESTS + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise UserError(f"{where}: neither JSON nor tests packed as base64 of zlib: {error}; {_REMEDY}") from None
    if len(content) > _LARGEST_TESTS:
        raise UserError(f"{where}: more than {_LARGEST_TESTS >> 20} MiB when unpacked, which no such tests have; leave the row out")
    if not unpacker.eof or unpacker.unused_data:
        raise UserError(f"{where}: the packed tests {'go on behind their end' if unpacker.eof else 'are cut'}; {_REMEDY}")
    return _pickled_text(content, where)


def _pickled_text(content: bytes, where: str) -> str:
    texts: list[str] = []
    end = 0
    strange = None
    try:
        for number, (opcode, argument, position) in enumerate(pickletools.genops(content)):
            if number == _MOST_OPCODES or opcode.name not in _TEXT | _AROUND_A_TEXT:
                strange = f"{opcode.name} {argument!r:.60}" if argument is not None else opcode.name
                break
            if opcode.name in _TEXT:
                texts.append(str(argument))
            end = (position or 0) + 1
    except ValueError as error:
        raise UserError(f"{where}: a damaged pickle: {error}; {_REMEDY}") from None
    if strange is not None:
        raise UserError(f"{where}: a pickle of more than a text (it asks for {strange}), of which nothing was run; don't use this file")
    if len(texts) != 1 or end != len(content):
        raise UserError(f"{where}: a pickle that is not one text alone; {_REMEDY}")
    return texts[0]


def _function(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"{where} must be the name of a function, not {name!r:.80}")
    return name


def _own(tests: Any, where: str) -> CodeTests:
    """Our own layout: {"kind": "stdin" | "call" | "assert", "cases": [...], "function": of calls, "before": source}; or this as JSON text."""
    if isinstance(tests, str):
        tests = load_json(tests, where)
    if not isinstance(tests, dict) or (strange := [name for name in tests if name not in _OWN]):
        detail = f"{tests!r:.100}" if not isinstance(tests, dict) else f"with {', '.join(map(repr, strange)):.100}"
        raise UserError(f"{where} must be an object with {', '.join(_OWN)}, not {detail}")
    kind, cases, before = tests.get("kind"), tests.get("cases"), tests.get("before")
    if kind not in ("stdin", "call", "assert"):
        raise UserError(f"{where}: 'kind' must be 'stdin', 'call' or 'assert', not {kind!r:.80}")
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{where}: 'cases' must be a list of at least one case, not {cases!r:.80}")
    if not isinstance(before, str | None):
        raise UserError(f"{where}: 'before' must be Python source, not {before!r:.80}")
    function = tests.get("function")
    if kind == "call" or function is not None:
        function = _function(function, f"{where}: 'function'")
    return CodeTests(
        tuple(_own_case(kind, case, f"{where}, case {number}") for number, case in enumerate(cases, start=1)), function, before or ""
    )


def _own_case(kind: str, case: Any, at: str) -> Case:
    if kind == "assert":
        if not isinstance(case, str) or not case.strip():
            raise UserError(f"{at} must be Python source, not {case!r:.80}")
        return AssertCase(case)
    first, second = _KINDS[kind]
    if not isinstance(case, dict) or set(case) != {first, second}:
        raise UserError(f"{at} must be an object with {first!r} and {second!r}, not {case!r:.100}")
    given, wanted = case[first], case[second]
    if kind == "call":
        if not isinstance(given, list):
            raise UserError(f"{at}: 'arguments' must be a list of values, not {given!r:.80}")
        return CallCase(tuple(given), wanted)
    if not isinstance(given, str) or not isinstance(wanted, str):
        raise UserError(f"{at}: 'stdin' and 'stdout' must be texts, not {given!r:.60} and {wanted!r:.60}")
    return StdinCase(given, wanted)
