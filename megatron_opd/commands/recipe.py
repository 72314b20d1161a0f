"""recipe new: a recipe of one's own that extends another; recipe explain and reference: what its fields are."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import tomli_w

from megatron_opd.commands.options import OVERRIDES, Stages, a_path
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.files import RECIPE_FILE, Source, apply_overrides, build_recipe, make_way, read_source, read_tree, shipped_recipes
from megatron_opd.safety.durable import write_file

_EVAL_TEACHER = re.compile(r"eval\.[^.]+\.teacher")


def add_to(stages: Stages) -> None:
    recipe = stages.add_parser("recipe", help="write a recipe of your own, or look up what its fields are", description="Recipes as files.")
    actions = recipe.add_subparsers(metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="NAME.toml, which extends another recipe",
        description="Write NAME.toml: what another recipe says, but for its name and the given fields. Nothing is overwritten.",
    )
    new.add_argument("name", help="name of the recipe, and of its run folder runs/NAME")
    new.add_argument("--like", required=True, type=a_path, metavar="RECIPE", help="a TOML file, the folder of a run, or a shipped recipe")
    new.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=OVERRIDES)
    new.set_defaults(run=_new)
    explain = actions.add_parser(
        "explain",
        help="type, default and meaning of a field or section",
        description="What a field or section of a recipe is, and which shipped recipes set it otherwise; without a name, the sections.",
    )
    explain.add_argument("field", nargs="?", default="", metavar="FIELD", help="a dotted name, as train.loss or eval.aime24.grader")
    explain.set_defaults(run=_explain)
    reference = actions.add_parser(
        "reference", help="all fields as a page", description="Every field of a recipe, as docs/recipe-reference.md."
    )
    reference.set_defaults(run=_reference)


def _new(args: argparse.Namespace, arguments: list[str]) -> None:
    path = write_recipe(args.name.removesuffix(".toml"), args.like, args.overrides)
    print(f"wrote {path}, which extends {args.like}\nnext: megatron-opd check {path} --stage inputs")


def _explain(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.recipe.reference.explain import explain_field

    print(explain_field(args.field))


def _reference(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.recipe.reference.page import reference_page

    print(reference_page(), end="")


def write_recipe(name: str, like: str, overrides: list[str]) -> Path:
    """Write NAME.toml into the working folder. Raises ConfigError if there is one, or if it would not be a whole recipe."""
    path = Path(f"{name}.toml")
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already; take another name, or change that file")
    base, extends = _base(like)
    given = apply_overrides({}, overrides)
    if odd := given.keys() & {"name", "extends", "unset"}:
        raise ConfigError(f"{min(odd)} is not given as FIELD=VALUE: the name is NAME, and --like says what it extends")
    wanted = {**apply_overrides(make_way(base, given)[0], overrides), "name": name}
    settings, unset = _without_nulls(given, base)
    head: dict[str, Any] = {"name": name, "extends": extends} | ({"unset": unset} if unset else {})
    text = tomli_w.dumps(head | settings)
    made = build_recipe(read_source(Source(str(path), os.path.realpath(path), Path(), text)), str(path))
    if made != build_recipe(wanted, like):
        raise ConfigError(f"{like} with these fields can't be written as a recipe that extends it; copy it, and change the copy")
    if not write_file(path, text, exclusive=True):
        raise ConfigError(f"{path} is there already; take another name, or change that file")
    return path


def _base(like: str) -> tuple[dict[str, Any], str]:
    """The settings of the recipe to extend, and what a recipe in the working folder calls it. Raises ConfigError."""
    if not os.path.isfile(like) and like.removesuffix(".toml") in shipped_recipes():
        return read_tree(like), like.removesuffix(".toml")
    if os.path.isdir(like):
        read_tree(like)  # says what is missing
        like = os.path.join(like, RECIPE_FILE)
    return read_tree(like), os.path.relpath(like)


def _without_nulls(given: dict[str, Any], base: dict[str, Any], where: str = "") -> tuple[dict[str, Any], list[str]]:
    """`given` without fields that are switched off, for which TOML has no word, and those of them that `base` sets."""
    kept: dict[str, Any] = {}
    unset: list[str] = []
    for key, value in given.items():
        field = f"{where}{key}"
        if _EVAL_TEACHER.fullmatch(field) and value is None:
            kept[key] = "none"  # its default is a teacher
        elif value is None:
            unset += [field] if key in base else []
        elif isinstance(value, dict):
            below = base.get(key)
            inner, more = _without_nulls(value, below if isinstance(below, dict) else {}, f"{field}.")
            unset += more
            if inner or not value:
                kept[key] = inner
        else:
            kept[key] = value
    return kept, unset
