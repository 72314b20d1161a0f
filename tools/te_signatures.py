"""Read the functions, arguments and enums of transformer_engine_torch, the compiled half of Transformer Engine, from its sdist's C++ sources.

    tar xzf transformer_engine_torch-2.20.2.tar.gz
    python tools/te_signatures.py transformer_engine_torch-2.20.2 megatron_opd/simulate/te-2.20.2.json

The sdist's file is on the package index: download it there by hand. `pip download --no-deps --no-build-isolation --no-binary :all:
transformer-engine-torch==2.20.2` runs its setup.py for the metadata, which fails where PyTorch is a CPU build ("Invalid version: None": there is
no torch.version.cuda).

megatron_opd/simulate binds every call of a simulated step to these. With --check the file is compared instead of written.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OPEN, _CLOSE = "(<{[", ")>}]"


def read_sources(root: Path) -> dict[str, Any]:
    """{'enums': {name: {member: value}}, 'functions': {name: arguments}}.

    Arguments are [name, has a default] each, ['*', False] before keyword-only ones; or, of a function without names, their number.
    Raises FileNotFoundError for a folder that is no such sdist.
    """
    bindings = (root / "csrc/extensions/pybind.cpp").read_text(encoding="utf-8")
    helper = (root / "common_headers/common/util/pybind_helper.h").read_text(encoding="utf-8").replace("\\\n", "\n")
    declarations = (root / "csrc/extensions.h").read_text(encoding="utf-8")
    headers = "".join(
        path.read_text(encoding="utf-8") for path in sorted((root / "common_headers/common/include/transformer_engine").glob("*.h"))
    )
    values = _enum_values(headers)
    enums = {
        name: {member: values.get((name, member), number) for number, member in enumerate(members)}
        for text in (helper, bindings)
        for name, members in _bound_enums(text)
    }
    return {"enums": enums, "functions": dict(_functions(bindings, declarations))}


def _bound_enums(text: str) -> Iterator[tuple[str, list[str]]]:
    """Enums that Python sees, and their members."""
    for name, body in re.findall(r'enum_<[^>]+>\(\s*m,\s*"(\w+)"[^;]*?\)((?:\s*\.value\([^;]*?\))+)', text):
        yield name, re.findall(r'\.value\(\s*"(\w+)"', body)


def _enum_values(headers: str) -> dict[tuple[str, str], int]:
    """(enum, member) -> value, by C's rule: one more than the member before, unless it says otherwise."""
    values: dict[tuple[str, str], int] = {}
    for name, body in re.findall(r"enum (?:class )?(\w+)[^{;]*\{(.*?)\};", headers, re.DOTALL):
        following = 0
        for item in _split(re.sub(r"/\*.*?\*/|//[^\n]*", "", body, flags=re.DOTALL)):
            member = re.match(r"\s*(\w+)\s*(?:=\s*(-?\w+))?\s*$", item, re.DOTALL)
            if member is None:
                continue
            if (given := member[2]) is not None:
                following = int(given, 0) if re.fullmatch(r"-?\d+|0x\w+", given) else values.get((name, given), following)
            values[name, member[1]] = following
            following += 1
    return values


def _functions(bindings: str, declarations: str) -> Iterator[tuple[str, list[list[Any]] | int]]:
    """m.def("name", target, ..., py::arg("x"), py::arg("y") = ...); without py::arg the declaration has the number of arguments."""
    for found in re.finditer(r'\bm\.def\(\s*"(\w+)"', bindings):
        start = bindings.index("(", found.start())
        pieces = _split(bindings[start + 1 : _closing(bindings, start)])
        arguments: list[list[Any]] = []
        for piece in pieces:
            if argument := re.match(r'\s*py::arg\("(\w+)"\)\s*(=)?', piece, re.DOTALL):
                arguments.append([argument[1], bool(argument[2])])
            elif "kw_only" in piece:
                arguments.append(["*", False])
        yield found[1], arguments or _number_of_arguments(pieces[1], declarations)


def _number_of_arguments(target: str, declarations: str) -> list[list[Any]] | int:
    name = re.search(r"(?:pytorch::)?(\w+)\s*$", target.strip())
    declared = re.search(rf"\b{name[1]}\(", declarations) if name else None
    if declared is None:
        return []
    inside = declarations[declared.end() : _closing(declarations, declared.end() - 1)]
    return len([part for part in _split(inside) if part.strip()])


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text[start:].strip() else parts


def _closing(text: str, opening: int) -> int:
    """Index of the bracket that closes the one at `opening`. Raises ValueError where none does."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"a bracket that is not closed: {text[opening : opening + 60]!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="folder of the unpacked sdist of transformer-engine-torch")
    parser.add_argument("table", type=Path, help="JSON file to write")
    parser.add_argument("--check", action="store_true", help="compare with the file, and exit with 1 where they differ")
    args = parser.parse_args()
    found = read_sources(args.sdist)
    if args.check:
        kept = json.loads(args.table.read_text(encoding="utf-8"))
        differing = [
            f"{kind}: {name}"
            for kind in ("enums", "functions")
            for name in sorted(found[kind].keys() | kept[kind].keys())
            if found[kind].get(name) != kept[kind].get(name)
        ]
        print("\n".join(differing) or f"{args.table}: {len(kept['enums'])} enums and {len(kept['functions'])} functions, as in the sources")
        return int(bool(differing))
    args.table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{args.table}: {len(found['enums'])} enums, {len(found['functions'])} functions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
