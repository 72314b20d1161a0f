"""Recipes as files: read, overridden field by field, filled in and checked; every fault is named by its field."""

from __future__ import annotations

import copy
import difflib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from megatron_opd.errors import ConfigError, UserError
from megatron_opd.recipe.config import FREE_TEXT, Recipe
from megatron_opd.recipe.inference import LaunchSizes
from megatron_opd.recipe.paths import expand_path, expand_paths
from megatron_opd.safety.redact import is_redacted, redact_override
from megatron_opd.safety.untrusted import LARGEST_TOML, NotToml, leaves, load_toml, read_bytes

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
RECIPE_FILE = "recipe.toml"  # in the folder of a run: its settings
_NO_OPTIONS = {"constant": ("advantage_clip",)}  # by loss: what it has nothing to do with
_NO_OPTIONS |= dict.fromkeys(("reverse_kl", "forward_kl", "jsd"), ("advantage_clip", "importance_clip"))
_LONGEST_CHAIN = 10  # recipes that extend each other
_DEEPEST_KEY = 10  # sections within sections that an override may name


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("megatron_opd") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@dataclass(frozen=True)
class Source:
    """A recipe's text: `label` names it for people, `place` whatever its name; `folder` is what it names others from, None in the package."""

    label: str
    place: str
    folder: Path | None
    text: str


def find_recipe(name: str, folder: Path | None = None) -> Source | None:
    """A recipe by its name: a file (from `folder`), or else a shipped recipe (with or without .toml). Raises ConfigError for what is no text."""
    path = str(Path(folder or "", name))
    if os.path.isfile(path):
        try:
            text = read_bytes(path, LARGEST_TOML).decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        return Source(path, os.path.realpath(path), Path(path).parent, text)
    return _find_shipped(name)


def _find_shipped(name: str) -> Source | None:
    """A recipe of the package, whatever files there are."""
    bare = name.removesuffix(".toml")
    if bare not in shipped_recipes():
        return None
    text = (resources.files("megatron_opd") / "recipes" / f"{bare}.toml").read_text(encoding="utf-8")
    return Source(name, f"the shipped {bare}", None, text)


def read_tree(name: str) -> dict[str, Any]:
    """The settings of a recipe, those that it extends included: a file, a shipped recipe, or the folder of a run, which is then run_dir.

    Nothing is checked but how recipes extend each other. Raises ConfigError.
    """
    try:
        source = find_recipe(name)
        if source is None and os.path.isdir(name):
            source = find_recipe(RECIPE_FILE, Path(name)) if os.path.isfile(Path(name, RECIPE_FILE)) else None
            if source is None:
                raise ConfigError(
                    f"{name}: no {RECIPE_FILE} in this folder; if a run of an older version made it, give the recipe that it was made with "
                    f"(and run_dir={name}, if that differs)"
                )
            return read_source(source) | {"run_dir": str(Path(name))}
        if source is None:
            raise ConfigError(
                f"no recipe {name!r}: neither a file nor the folder of a run nor one of the shipped recipes {', '.join(shipped_recipes())}"
            )
        return read_source(source)
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError(str(error)) from None


def read_source(source: Source) -> dict[str, Any]:
    """The settings of a recipe's text with those that it extends. Raises UserError naming the files."""
    tree, bases = _extended(source, [])
    if not bases:
        return tree
    name, where = tree.get("name"), f"{source.label} extends {bases[0].label!r}"
    if name is None:
        raise ConfigError(f"{where}, and needs a name of its own (its run folder is runs/NAME): name = '...'")
    for base in bases:
        if load_toml(base.text, base.label).get("name") == name:
            raise ConfigError(
                f"{where}, but has the name of {base.label}, {name!r}, and would write into its run folder; give it another name"
            )
    return tree


def _extended(source: Source, chain: list[Source]) -> tuple[dict[str, Any], list[Source]]:
    """The settings of `source`, which those of `chain` extend, and what it extends itself, the nearest first."""
    tree = load_toml(source.text, source.label)
    extends, unset = tree.pop("extends", None), tree.pop("unset", [])
    if not isinstance(unset, list) or not all(isinstance(field, str) for field in unset):
        raise ConfigError(f"{source.label}: unset must be a list of fields, as ['eval.aime24', 'rollout'] (got {unset!r:.200})")
    if extends is None:
        if unset:
            raise ConfigError(f"{source.label}: unset takes fields from the recipe that this one extends, and it extends none")
        return tree, []
    if not isinstance(extends, str) or not extends:
        raise ConfigError(f"{source.label}: extends must be the path of a recipe, or the name of a shipped one (got {extends!r:.200})")
    chain = [*chain, source]
    where = f"{source.label} extends {extends!r}"
    try:
        base = _find_shipped(extends) if source.folder is None else find_recipe(expand_path(extends), source.folder)
        if base is None:
            looked = "no file beside a shipped recipe counts" if source.folder is None else f"no file {Path(source.folder, extends)}"
            raise ConfigError(f"{looked}, and no shipped recipe of that name; there are {', '.join(shipped_recipes())}")
        if any(base.place == other.place for other in chain):
            raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(entry.label for entry in [*chain, base])}")
        if len(chain) >= _LONGEST_CHAIN:
            raise ConfigError(f"more than {_LONGEST_CHAIN} recipes extend each other; put some of them together")
        found, bases = _extended(base, chain)
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None
    found.pop("name", None)  # never inherited
    for field in unset:
        _unset(found, field, f"{source.label}: unset names {field!r}, which {extends!r}")
    run_dir = found.get("run_dir")
    if len(chain) == 1 and "run_dir" not in tree and isinstance(run_dir, str) and "{name}" not in run_dir:
        raise ConfigError(
            f"{where}, whose run_dir = {run_dir!r} is without {{name}}, so that both would write into one folder; give run_dir here, "
            "or unset = ['run_dir'] for runs/NAME"
        )
    return merge(make_way(found, tree)[0], tree), [base, *bases]


def _unset(tree: dict[str, Any], field: str, where: str) -> None:
    """Take a field or section out of `tree`. Raises ConfigError if it is not there."""
    *sections, last = field.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise ConfigError(f"{where} does not set")
    del node[last]


def merge(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `base`, field by field; lists are replaced."""
    result = dict(base)
    for key, value in given.items():
        before = base.get(key)
        result[key] = merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def make_way(base: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`base` without the settings that `given`, which is laid over it, stands against, and a line on each that is left out.

    A batch is of rollouts or of tokens. A loss may have no advantage to clip.
    Servers at addresses, servers to start and an engine without servers exclude each other. How many servers and copies there are, and on
    how many GPUs, is given as a whole: `tp` for all models takes the place of servers, tp and dp that `base` gives for one of them, and so do
    servers or dp of servers and dp (tp says how much room a model needs).
    """
    base, said = _without_void(base, given)
    theirs, ours = base.get("engine"), given.get("engine")
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return base, said
    kept = dict(theirs)
    against: dict[str, str] = {}
    if ours.get("kind") == "transformers":
        against = dict.fromkeys(("urls", "launch"), "kind = 'transformers'")
    elif ours.get("urls"):
        against["launch"] = "urls"
    elif isinstance(ours.get("launch"), dict):
        against["urls"] = "launch"
    for field, why in against.items():
        if field not in ours and kept.pop(field, None):
            said.append(f"engine.{field} is not used, as engine.{why} is given over it")
    launch, sizes = kept.get("launch"), ours.get("launch")
    if isinstance(launch, dict) and isinstance(sizes, dict):
        kept["launch"] = dict(launch)
        for model in ("teacher", "student"):
            section = launch.get(model)
            if isinstance(section, dict) and (out := _replaced(sizes) & section.keys()):
                kept["launch"][model] = {field: value for field, value in section.items() if field not in out}
                fields = ", ".join(f"engine.launch.{field}" for field in LaunchSizes.model_fields if field in sizes)
                said.append(f"engine.launch.{model}: {', '.join(sorted(out))} not used, as {fields} is given over it")
    return {**base, "engine": kept}, said


def _without_void(base: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`make_way` of the trainings."""
    base, said = copy.deepcopy(base), list[str]()
    void: list[tuple[str, str, tuple[str, ...]]] = [
        (stage, field, (other,))
        for stage in ("sft", "train")
        for field, other in itertools.permutations(("global_batch", "global_batch_tokens"))
    ]
    void.append(("train.loss", "name", _NO_OPTIONS.get(str(_at(given, "train.loss").get("name")), ())))
    for section, field, others in void:
        theirs, ours = _at(base, section), _at(given, section)
        for other in others:
            if ours.get(field) is not None and ours.get(other) is None and theirs.pop(other, None) is not None:
                said.append(f"{section}.{other} is not used, as {section}.{field} = {ours[field]!r} is given over it")
    return base, said


def _at(tree: dict[str, Any], section: str) -> dict[str, Any]:
    """A section of a raw tree; an empty one where there is none."""
    node: Any = tree
    for name in section.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _replaced(sizes: dict[str, Any]) -> set[str]:
    """Fields of a model's section that those of engine.launch take the place of."""
    copies = {"servers", "dp"} if sizes.keys() & {"servers", "tp", "dp"} else set()
    return copies | (sizes.keys() & {"tp", "options"})


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


def load_recipe(name: str, overrides: list[str] | None = None, *, say: Callable[[str], object] | None = None) -> Recipe:
    """Read, override, resolve and check a recipe (see `read_tree`). Raises ConfigError with every fault and its field path.

    `say` gets a line on each setting of the recipe that an override makes void.
    """
    tree = read_tree(name)
    tree, said = make_way(tree, apply_overrides({}, overrides or []))
    for line in said:
        (say or _say_nothing)(f"{name}: {line}")
    return build_recipe(apply_overrides(tree, overrides or []), name)


def _say_nothing(line: str) -> None:
    pass


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
        return Recipe.model_validate(_fill(filled, names)).remember(recipe)
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error)}") from None


def _fill(node: Any, names: dict[str, str], where: str = "") -> Any:
    """A copy of `node` with {placeholders} replaced. Raises ConfigError naming the field `where` for one that is not in `names`."""
    if isinstance(node, dict):
        kept = {key for key, value in node.items() if key in FREE_TEXT and not isinstance(value, dict)}
        return {key: value if key in kept else _fill(value, names, f"{where}.{key}".lstrip(".")) for key, value in node.items()}
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


def _known_fields(location: tuple[int | str, ...], model: Any) -> list[str]:
    """Field names of the section of `model` that `location` (a path whose last piece is unknown) lies in."""
    pieces = iter(location[:-1])
    for piece in pieces:
        annotation = model.model_fields[str(piece)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel))
        if get_origin(annotation) is dict:  # sections by name
            next(pieces)
    return list(model.model_fields)


def explain(error: ValidationError, section: type[BaseModel] = Recipe) -> str:
    """Every fault with its field of `section`, what was given and what would be right."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(piece) for piece in fault["loc"])
        text = fault["msg"]
        if fault["type"] == "extra_forbidden":
            known = _known_fields(fault["loc"], section)
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
