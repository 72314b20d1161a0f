"""docs/recipe-reference.md, made from the descriptions in the recipe's classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel

from megatron_opd.recipe.layout import Section
from megatron_opd.recipe.reference.fields import BELOW, ROOT, Field, all_fields, fields_of, summary
from megatron_opd.records import Record

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_PAGE = re.compile(r"docs/(\w[\w-]*\.md)")
_HEAD = """# Fields of a recipe

<!-- Made by `megatron-opd recipe reference`; change the descriptions in the code, and make it again. -->

Every field with its type, its bounds, its default and what it is, by section; **source** is whose value the default is, empty where it is ours. How recipes are written, extended and overridden: [recipes.md](recipes.md).
`megatron-opd recipe explain train.loss` says the same of one field or section, and which shipped recipes set it otherwise.

**required**: a recipe that has the section gives it. **off**: not given, or null. {name}, {run_dir}, {teacher} and {student} stand for the recipe's own values.
Numbers have upper bounds, too, which exist to catch typing errors; `recipe explain` names them.
"""


def reference_page() -> str:
    """The page in Markdown."""
    tables = [_HEAD, _part("The recipe itself", [ROOT])]
    sections = [field for field in all_fields() if field.section is not None and not field.by_name]
    for group in _groups(sections):
        tables.append(_part(_heading(group), group))
    return "\n".join(tables)


def _groups(sections: Sequence[Field]) -> list[list[Field]]:
    """Sections of one class, or of classes that share most of their fields, together, in the order of their first."""
    found: dict[type[BaseModel], list[Field]] = {}
    for field in sections:
        assert field.section is not None
        found.setdefault(_family(field.section), []).append(field)
    return list(found.values())


def _family(section: type[BaseModel]) -> type[BaseModel]:
    """The class below `Section` or `Record` that a section's class is derived from."""
    bases = [base for base in section.__mro__ if issubclass(base, BaseModel) and base not in (Section, Record, BaseModel)]
    return bases[-1]


def _heading(group: Sequence[Field]) -> str:
    return ", ".join(f"`[{field.path}]`" for field in group)


def _part(heading: str, group: Sequence[Field]) -> str:
    """A heading and a table of the fields that all sections of the group have, then one of each section's own."""
    rows = {field.path: {entry.name: entry for entry in fields_of(field)} for field in group}
    shared = [name for name in rows[group[0].path] if all(name in entries for entries in rows.values())]
    texts = [summary(field.section) for field in group if field.section is not None]
    lines = [
        f"## {heading}",
        "",
        " ".join(dict.fromkeys(texts)),
        "",
        *_table([[rows[field.path][name] for field in group] for name in shared]),
    ]
    for field in group:
        if own := [entry for name, entry in rows[field.path].items() if name not in shared]:
            lines += ["", f"Of `[{field.path}]` alone:", "", *_table([[entry] for entry in own])]
    return "\n".join([*lines, ""])


def _table(rows: Sequence[Sequence[Field]]) -> list[str]:
    """A row for each field, which may stand in several sections."""
    return ["| field | type | default | source | what it is, with its unit |", "|---|---|---|---|---|", *map(_row, rows)]


def _row(entries: Sequence[Field]) -> str:
    first = entries[0]
    default = _by_section(entries, [_default(entry) for entry in entries])
    source = _by_section(entries, [_linked(_escaped(entry.source)) for entry in entries])
    texts = dict.fromkeys(entry.description for entry in entries)
    return f"| `{first.name}` | {_escaped(first.kind)} | {default} | {source} | {'; '.join(_linked(_escaped(text)) for text in texts)} |"


def _by_section(entries: Sequence[Field], texts: Sequence[str]) -> str:
    """One text for all sections, or that of each with its name."""
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{text} ({entry.path.rpartition('.')[0]})" for entry, text in zip(entries, texts, strict=True) if text)


def _default(field: Field) -> str:
    words = ("required", "off", BELOW, "none")
    return ("**required**" if field.default == "required" else field.default) if field.default in words else f"`{_escaped(field.default)}`"


def _escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _linked(text: str) -> str:
    """Papers and pages as links."""
    text = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return _PAGE.sub(r"[\1](\1)", text)
