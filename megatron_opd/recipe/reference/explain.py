"""`megatron-opd recipe explain`: what a field is, and which shipped recipes set it otherwise."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from megatron_opd.recipe.files import read_tree, shipped_recipes
from megatron_opd.recipe.reference.fields import BELOW, NAME, Field, as_toml, fields_of, find_field

_WIDTH = 120


def explain_field(path: str) -> str:
    """A field's type, default and its source, description and use in the shipped recipes; of a section its fields; of '' the sections. Raises ConfigError."""
    field = find_field(path, all_bounds=True)
    if field.section is None:
        lines = [path, *_said("type", field.kind), *_said("default", _default(field)), *_said("what", field.description)]
    elif path:
        lines = [f"[{path}]", *_said("default", field.default), *_said("what", field.description), "", *_listed(fields_of(field))]
    else:
        return "\n".join(
            ["The fields and sections of a recipe; 'recipe explain SECTION' has those of one.", "", *_listed(fields_of(field))]
        )
    return "\n".join([*lines, "", *_used(path, field)])


def _default(field: Field) -> str:
    return f"{field.default}, from {field.source}" if field.source else field.default


def _said(name: str, text: str) -> list[str]:
    wanted = text not in ("", BELOW)
    return _wrapped(text, f"  {name:<9}", 11) if wanted else []


def _listed(fields: list[Field]) -> Iterator[str]:
    """A line or two for each field."""
    for field in fields:
        kind = "" if field.section is not None else f"{field.kind}; "
        default = {BELOW: "", "required": "required"}.get(field.default, f"default {field.default}")
        yield f"  {f'[{field.name}]' if field.section is not None else field.name:<28} {kind}{default}".rstrip()
        yield from _wrapped(field.description, " " * 6, 6)


def _used(path: str, field: Field) -> list[str]:
    """Which shipped recipes set the field, or plain ones of a section, to what is not the default: a line for each value.

    Of a table of sections: the names, and the recipes that have them.
    """
    found: defaultdict[tuple[str, str], defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for recipe in shipped_recipes():
        for at, value in _values_at(read_tree(recipe), path.split(".")):
            for leaf, text in _leaves(value, field, at):
                name = leaf.removeprefix(f"{at}.") if field.section is not None else ""
                found[name, text][recipe].append(at)
    what = "has one" if field.by_name else "sets it otherwise" if field.section is None else "sets one of these fields otherwise"
    if not found:
        return [f"No shipped recipe {what}."]
    lines = ["In shipped recipes:" if field.by_name else "Shipped recipes that set it otherwise:"]
    for (name, text), recipes in found.items():
        by_places: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for recipe, places in recipes.items():
            by_places[tuple(places)].append(recipe)
        where = [", ".join(names) + ("" if places == (path,) else f" ({', '.join(places)})") for places, names in by_places.items()]
        lines += _wrapped(f"{' = '.join(filter(None, (name, text)))}   {'; '.join(where)}", "  ", 6)
    return lines


def _leaves(value: Any, field: Field, at: str) -> Iterator[tuple[str, str]]:
    """Names and values, as TOML has them, of a field, or of a section's plain fields, but for those that are the defaults."""
    if field.by_name:
        yield from ((f"{at}.{key}", "") for key in value)
    elif field.section is None:
        if (text := as_toml(value)) != field.default:
            yield at, text
    elif isinstance(value, dict):
        plain = {entry.name: entry for entry in fields_of(field) if entry.section is None}
        for key in [key for key in value if key in plain]:
            yield from _leaves(value[key], plain[key], f"{at}.{key}")


def _values_at(tree: Any, pieces: list[str], where: str = "") -> Iterator[tuple[str, Any]]:
    """Values at a dotted name in a recipe's settings, with the name of each: NAME stands for any."""
    if not pieces:
        yield where, tree
    elif isinstance(tree, dict):
        for key in [pieces[0]] if pieces[0] != NAME else list(tree):
            if key in tree:
                yield from _values_at(tree[key], pieces[1:], f"{where}.{key}".lstrip("."))


def _wrapped(text: str, first: str, indent: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False)
