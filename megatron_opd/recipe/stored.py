"""RUN_DIR/recipe.toml: the settings of a run, kept by the commands that make something, so that the folder can stand for its recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_opd.errors import ConfigError, QuarantineError, UserError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.evaluation import named
from megatron_opd.recipe.files import RECIPE_FILE, explain, read_tree
from megatron_opd.safety.durable import make_folder, write_file
from megatron_opd.safety.untrusted import LARGEST_TOML, load_toml, one_line, read_bytes

OF_ONE_COMMAND = ("engine", "eval", "slurm")  # addresses, evaluations, a site: a stage that comes later does not change what is kept


@contextlib.contextmanager
def storing(recipe: Recipe) -> Iterator[None]:
    """Around a stage that makes something: its settings are kept. Where it ends with an error, what was kept before stays."""
    take_back = store_recipe(recipe, whole=False)
    try:
        yield
    except QuarantineError:  # it is done
        raise
    except UserError:
        take_back()
        raise


def store_recipe(recipe: Recipe, *, whole: bool) -> Callable[[], None]:
    """Keep the recipe in its run folder, as it was written, without secrets, and print what of it is another now; returns what takes that back.

    Without `whole`, sections that are of one command stay as they were kept. Only the first rank does anything. A file that can't be written
    is a warning: whether the stage can write is for the stage to say. Raises ConfigError for a file that is there and is no recipe.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return _nothing
    path = Path(recipe.run_dir) / RECIPE_FILE
    before = _read(path)
    now = load_toml(recipe.to_toml(), str(path))
    if before is not None:
        now["run_dir"] = before.get("run_dir", now["run_dir"])  # of that folder, whatever it says
        if not whole:
            now |= {
                section: before[section] for section in OF_ONE_COMMAND if section in before and not _is_former(section, before[section])
            }
    text = _checked(now, path)
    if before is None:
        found: dict[str, Any] = {}
    elif (found := _as_kept(before, path)) == load_toml(text, str(path)):
        return _nothing
    had_folder, old = path.parent.is_dir(), None if before is None else read_bytes(path, LARGEST_TOML)
    try:
        make_folder(path.parent)
        write_file(path, text)
    except OSError as error:
        state = "is not kept" if before is None else "has earlier settings"
        print(f"WARNING: {path} {state} ({error.strerror or error}); give later commands the recipe instead of the folder", flush=True)
        return _nothing
    if old is None:
        print(f"{path}: the settings are kept; later commands take {path.parent} for the recipe", flush=True)
    else:
        _say(differences(found, load_toml(text, str(path))))
    return lambda: _take_back(path, text, old, had_folder=had_folder)


def differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """'train.lr 1e-06 -> 2e-06' for each field of two trees that is not the same."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old or new, dict) and isinstance(old or {}, dict) and isinstance(new or {}, dict):
            found += differences(old or {}, new or {}, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key} {_shown(old)} -> {_shown(new)}")
    return found


def _is_former(section: str, kept: Any) -> bool:
    """Whether it is an [eval] of a version that this one refuses: who uses the folder nevertheless gave another, or eval=null."""
    try:
        return section == "eval" and named(kept) is None
    except ValueError:
        return True


def _shown(value: Any) -> str:
    return "(not given)" if value is None else one_line(value)


def _say(lines: list[str]) -> None:
    for line in lines:
        print(f"{RECIPE_FILE}: {line}", flush=True)


def _nothing() -> None:
    pass


def _read(path: Path) -> dict[str, Any] | None:
    """What is kept, None where nothing is. Raises ConfigError."""
    try:
        return read_tree(str(path)) if os.path.lexists(path) else None
    except ConfigError as error:
        raise ConfigError(f"{error}; fix it, or move it away") from None


def _checked(tree: dict[str, Any], path: Path) -> str:
    try:
        return Recipe.model_validate(tree).to_toml()
    except ValidationError as error:  # what was kept of other commands
        raise ConfigError(f"{path}: {explain(error)}\nfix it, or move it away") from None


def _as_kept(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """`tree` as this version would write it; as it is where it is of another."""
    try:
        return load_toml(_checked(tree, path), str(path))
    except ConfigError:
        return tree


def _take_back(path: Path, text: str, old: bytes | None, *, had_folder: bool) -> None:
    """Put back what was kept before `text`, unless another command has kept its own since, or works in the folder."""
    with contextlib.suppress(OSError, UserError):
        if read_bytes(path, LARGEST_TOML) != text.encode():
            return
        if old is not None:
            write_file(path, old)
            print(f"{RECIPE_FILE}: as it was before this command", flush=True)
        elif [entry.name for entry in path.parent.iterdir()] == [path.name]:
            path.unlink()
            if not had_folder:
                path.parent.rmdir()
