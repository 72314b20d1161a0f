"""The fields of a recipe as data: type, bounds, default and description, read from the classes that check it."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.paths import PATH

NAME = "NAME"  # stands for the name of a section such as [eval.aime24]
BELOW = "as below"  # the default of a section is that of each of its fields
LARGE = 100_000  # bounds from here on are there for slips of the finger
_SIGNS = {Gt: ("gt", ">"), Ge: ("ge", "at least"), Lt: ("lt", "<"), Le: ("le", "at most")}
_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}


@dataclass(frozen=True)
class Field:
    """A field of a recipe. `path`: its dotted name, NAME for the name of a section; `kind`: its type, and bounds, in words; `default`: as TOML
    has it, 'required', or 'off' where null; `source`: whose value that is, '' where ours; `section`: the class of a section, or of those of a
    table by name; None of a plain field."""

    path: str
    kind: str
    default: str
    description: str
    source: str = ""
    section: type[BaseModel] | None = None
    by_name: bool = False
    values: BaseModel | None = None  # defaults of the section's fields, where it has some

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


ROOT = Field("", "the recipe", "required", "", section=Recipe)


def fields_of(section: Field, *, all_bounds: bool = False) -> list[Field]:
    """Fields of a section, in their order; `all_bounds`: also those that no setting comes near to."""
    if section.section is None:
        return []
    if section.by_name:
        return [Field(f"{section.path}.{NAME}", "section", "none", summary(section.section), section=section.section)]
    return [_field(section, name, info, all_bounds) for name, info in section.section.model_fields.items()]


def all_fields(section: Field = ROOT) -> Iterator[Field]:
    """Every field below a section, sections included."""
    for field in fields_of(section):
        yield field
        yield from all_fields(field)


def find_field(path: str, *, all_bounds: bool = False) -> Field:
    """The field or section of a dotted name, as train.loss or eval.aime24.grader. Raises ConfigError that names similar ones."""
    found = ROOT
    for piece in filter(None, path.split(".")):
        below = fields_of(found, all_bounds=all_bounds)
        match = below[0] if found.by_name else next((field for field in below if field.name == piece), None)
        if match is None:
            raise ConfigError(f"no field {path!r} in a recipe; {_similar(path)}")
        found = match
    return found


def _similar(path: str) -> str:
    known = [field.path for field in all_fields()]
    last = path.rpartition(".")[2]
    close = [name for name in known if name.rpartition(".")[2] == last] or difflib.get_close_matches(path, known, n=3)
    return f"did you mean {', '.join(close[:5])}?" if close else "'megatron-opd recipe explain' lists the sections"


def _field(parent: Field, name: str, info: FieldInfo, all_bounds: bool) -> Field:
    path = f"{parent.path}.{name}".lstrip(".")
    values = getattr(parent.values, name) if parent.values is not None else _default_of(info)
    section, by_name = _section_of(info.annotation)
    if by_name:
        return Field(path, "sections by name", "none", _description(parent, name, info), section=section, by_name=True)
    required = info.is_required() and parent.values is None
    default = "required" if required else _default_text(values, section)
    return Field(
        path,
        _kind(info.annotation, info.metadata, all_bounds),
        default,
        _description(parent, name, info),
        _source(info),
        section,
        values=values if isinstance(values, BaseModel) else None,
    )


def _default_of(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def _description(parent: Field, name: str, info: FieldInfo) -> str:
    """The field's own, or that of the class that it inherits from; of a section without one the first line of its docstring."""
    assert parent.section is not None
    for base in parent.section.__mro__:
        found = getattr(base, "model_fields", {}).get(name) if issubclass(base, BaseModel) else None
        if found is not None and found.description:
            return found.description
    section, _ = _section_of(info.annotation)
    return "" if section is None else summary(section)


def _source(info: FieldInfo) -> str:
    """Whose value the default is, as `layout.source` has it. A class that gives a field another default names its own."""
    return str(info.json_schema_extra.get("source", "")) if isinstance(info.json_schema_extra, dict) else ""


def summary(section: type[BaseModel]) -> str:
    """The first paragraph of a section's docstring."""
    return " ".join((section.__doc__ or "").strip().partition("\n\n")[0].split())


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The class of a section that an annotation allows, and whether there is a table of them by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = get_origin(annotation)
    if origin is dict:
        section, _ = _section_of(get_args(annotation)[1])
        return section, section is not None
    if origin in (Union, types.UnionType, Annotated):
        pieces = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
        for piece in pieces:
            found = _section_of(piece)
            if found[0] is not None:
                return found
    return None, False


def _kind(annotation: Any, marks: list[Any], all_bounds: bool) -> str:
    """A type in words, with what bounds it."""
    origin, pieces = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(pieces[0], [*pieces[1:], *marks], all_bounds)
    marks = [inner for mark in marks for inner in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
    if origin is Literal:
        return _alternatives([json.dumps(piece) for piece in pieces])
    if origin in (Union, types.UnionType):
        return _alternatives([_kind(piece, marks, all_bounds) for piece in pieces if piece is not types.NoneType])
    if origin is list:
        filled = ", not empty," if any(isinstance(mark, MinLen) for mark in marks) else ""
        return f"list{filled} of {_kind(pieces[0], [], all_bounds)}"
    if origin is tuple:
        return f"[{', '.join(_kind(piece, [], all_bounds) for piece in pieces)}]"
    if origin is dict:
        return f"table of {_kind(pieces[1], [], all_bounds)} by name"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    word = "path" if PATH in marks else _PLAIN[annotation]
    return word + (_bounds(marks, all_bounds) if annotation in (int, float, str) else "")


def _alternatives(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _bounds(marks: list[Any], all_bounds: bool) -> str:
    """' > 0, at most 1', in the order of the marks; of texts their pattern."""
    found = []
    for mark in marks:
        for kind, (name, sign) in _SIGNS.items():
            if isinstance(mark, kind) and (all_bounds or abs(getattr(mark, name)) < LARGE):
                found.append(f"{sign} {getattr(mark, name)}")
        pattern = getattr(mark, "pattern", None)
        if pattern is not None and all_bounds:
            found.append(f"of the form {pattern}")
    return f" {', '.join(found)}" if found else ""


def _default_text(value: Any, section: type[BaseModel] | None) -> str:
    if value is None:
        return "off"
    return BELOW if section is not None and isinstance(value, BaseModel) else as_toml(value)


def as_toml(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {as_toml(entry)}" for key, entry in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
