"""Paths of a recipe and of the command line: ~ and environment variables, filled in once."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import BaseModel

from megatron_opd.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
PATH = "path"  # marks the fields that `expand_paths` expands
PathText = Annotated[str, PATH]


def expand_path(text: str) -> str:
    """`text` with ~ and environment variables ($HOME, ${SCRATCH}) filled in; addresses such as s3://... stay as they are.

    Raises ConfigError for a variable that is not set, a user that is not known, and what is no name.
    """
    if "\0" in text:
        raise ConfigError(f"a path can't hold a NUL character (got {text!r:.200})")
    if "://" in text:
        return text
    for match in _VARIABLE.finditer(text):
        if (match[1] or match[2]) not in os.environ:
            raise ConfigError(f"the environment variable {match[0]} is not set (got {text!r})")
    filled = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    expanded = os.path.expanduser(filled)
    if text.startswith("~") and expanded == filled:
        raise ConfigError(f"no home directory is known for {text.split('/')[0]} (got {text!r}); a folder of that name is ./{text}")
    return expanded if text.startswith("~") else filled


def expand_paths(section: BaseModel, tree: dict[str, Any], where: str = "") -> None:
    """Expand the path fields of `tree`, a dump of `section`, in place. Raises ConfigError naming the field."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            expand_paths(value, tree[name], f"{where}{name}.")
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, BaseModel):
                    expand_paths(inner, tree[name][key], f"{where}{name}.{key}.")
        elif isinstance(value, str | list) and any(PATH in marks for marks in _marks(field)):
            try:
                tree[name] = expand_path(value) if isinstance(value, str) else [expand_path(text) for text in value]
            except ConfigError as error:
                raise ConfigError(f"{where}{name}: {error}") from None


def _marks(field: Any) -> list[Any]:
    """What the field's annotation, or one of its alternatives, is marked with."""
    return [field.metadata, *(getattr(kind, "__metadata__", ()) for kind in getattr(field.annotation, "__args__", ()))]
