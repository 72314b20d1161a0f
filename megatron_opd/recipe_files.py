"""Recipes as files: read, overridden field by field, filled in and checked; every fault is named by its field."""

from __future__ import annotations

import copy
import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_opd.config import FREE_TEXT, Recipe
from megatron_opd.durable import make_folder, write_file
from megatron_opd.errors import ConfigError, UserError
from megatron_opd.paths import expand_paths
from megatron_opd.redact import is_redacted, redact_override
from megatron_opd.untrusted import LARGEST_TOML, NotToml, leaves, load_toml, read_bytes

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
RECIPE_FILE = "recipe.toml"  # in a run folder
_DEEPEST_KEY = 10  # sections within sections that an override may name


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("megatron_opd") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe_text(name: str) -> str:
    """Text of a recipe: a file, or a shipped recipe by name (with or without .toml). Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        try:
            return read_bytes(path, LARGEST_TOML).decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not TOML: {error}") from None
    shipped = shipped_recipes()
    if path.parent == Path(".") and path.name.removesuffix(".toml") in shipped:
        return (resources.files("megatron_opd") / "recipes" / f"{path.name.removesuffix('.toml')}.toml").read_text(encoding="utf-8")
    raise ConfigError(f"no recipe {name!r}: neither a file nor one of the shipped recipes {', '.join(shipped)}")


def parse_override(override: str) -> tuple[list[str], Any]:
    """'train.lr=1e-6' -> (['train', 'lr'], 1e-06). The value is TOML; what is not TOML is a string. Raises ConfigError."""
    key, sign, text = override.partition("=")
    shown = f"override {redact_override(override)!r:.200}"
    if not sign or not key or any(not piece for piece in key.split(".")) or key.count(".") >= _DEEPEST_KEY:
        raise ConfigError(f"{shown} is not of the form section.field=value")
    try:
        parsed = load_toml(f"value = {text}", shown)
    except NotToml:
        parsed = {"value": None if text == "null" else text}
    except UserError as error:
        raise ConfigError(str(error)) from None
    if len(parsed) > 1:
        raise ConfigError(f"{shown} holds more than one value; give each field an override of its own")
    return key.split("."), parsed["value"]


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `tree` with the dotted overrides set; 'null' unsets an optional field."""
    result = copy.deepcopy(tree)
    for override in overrides:
        keys, value = parse_override(override)
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {redact_override(override)!r:.200}: {key!r} is a value, not a section")
        node[keys[-1]] = value
    return result


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override, resolve and check a recipe. Raises ConfigError with every fault and its field path."""
    try:
        tree = load_toml(read_recipe_text(name), name)
    except UserError as error:
        raise ConfigError(str(error)) from None
    return build_recipe(apply_overrides(tree, overrides or []), name)


def build_recipe(tree: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a raw tree, expand its paths and fill in the {placeholders}. Raises ConfigError."""
    if found := next((leaf for leaf in leaves(tree) if isinstance(leaf, str) and "\0" in leaf), None):
        raise ConfigError(f"{name}: holds a NUL character ({found!r:.100}); remove it")
    try:
        recipe = Recipe.model_validate(tree)
        filled = recipe.model_dump()
        expand_paths(recipe, filled)
        names = {"name": recipe.name}
        names |= {"run_dir": _fill(filled["run_dir"], names, "run_dir")}
        names |= _fill(filled["models"], names, "models")
        return Recipe.model_validate(_fill(filled, names))
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error)}") from None


def _fill(node: Any, names: dict[str, str], where: str = "") -> Any:
    """A copy of `node` with {placeholders} replaced. Raises ConfigError naming the field `where` for one that is not in `names`."""
    if isinstance(node, dict):
        return {key: value if key in FREE_TEXT else _fill(value, names, f"{where}.{key}".lstrip(".")) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, names, f"{where}.{number}") for number, value in enumerate(node)]
    if not isinstance(node, str):
        return node
    unknown = [key for key in _PLACEHOLDER.findall(node) if key not in names]
    if unknown:
        known = ", ".join("{" + key + "}" for key in names)
        got = "" if is_redacted(where, node) else f" (got {node!r})"
        raise ConfigError(f"{where}: no placeholder {{{unknown[0]}}} here{got}; there are {known}")
    return _PLACEHOLDER.sub(lambda match: names[match[1]], node)


def _known_fields(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that `location` (a path whose last piece is unknown) lies in."""
    model: Any = Recipe
    for piece in location[:-1]:
        annotation = model.model_fields[str(piece)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel))
    return list(model.model_fields)


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(piece) for piece in fault["loc"])
        text = fault["msg"]
        if fault["type"] == "extra_forbidden":
            known = _known_fields(fault["loc"])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            text = "no such field; " + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}")
        elif (
            fault["type"] != "missing"
            and not (fault["type"] == "value_error" and isinstance(fault["input"], dict))
            and not is_redacted(where, fault["input"])
        ):
            text = f"{text} (got {fault['input']!r:.200})"
        lines.append(f"  {where}: {text}")
    return f"{len(lines)} field(s) wrong\n" + "\n".join(lines)


def store_recipe(recipe: Recipe, *, whole: bool) -> None:
    """Keep the settings in the run's folder."""
    make_folder(recipe.run_dir)
    write_file(Path(recipe.run_dir) / RECIPE_FILE, recipe.to_toml())
