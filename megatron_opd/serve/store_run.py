"""What lies around a store: the recipe of the run in whose folder it is, and the tokenizer of the model that sampled it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import LineageError, UserError
from megatron_opd.hf.tokenizer import fingerprint_loaded_tokenizer, fingerprint_tokenizer, load_tokenizer
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import RECIPE_FILE, load_recipe
from megatron_opd.recipe.rounds import round_recipe

_LEVELS = 4  # folders above a store that may be its run's, or the one of its models: RUN/STORE, RUN/eval/NAME/STORE, RUN/rounds/001/STORE


def find_run(reader: StoreReader) -> Recipe | None:
    """The recipe of the run in whose folder the store lies, as the store's round sees it; None where there is none that can be read."""
    for folder in _folders(reader):
        if (folder / RECIPE_FILE).is_file():
            try:
                return round_recipe(load_recipe(str(folder)), reader.manifest.round)
            except UserError:
                return None
    return None


def find_tokenizer(reader: StoreReader, given: str | Path | Any | None = None) -> tuple[Any, str]:
    """The tokenizer of the model that sampled and where it is from, or None and why there is none.

    A store knows its sampler's name and table, and not its directory: folders of that name around the store, and models of its run, are
    looked at. `given`: a model's directory, or a tokenizer of transformers. Raises LineageError if its table is another.
    """
    sampler = reader.manifest.sampler
    wanted = sampler.tokenizer.vocab_sha256
    if given is not None:
        where = str(given) if isinstance(given, str | Path) else "the given tokenizer"
        tokenizer = load_tokenizer(given) if isinstance(given, str | Path) else given
        if (found := fingerprint_loaded_tokenizer(tokenizer).vocab_sha256) != wanted:
            raise LineageError(
                f"{where}: its table ({found[:12]}) is not that of {sampler.short()} ({wanted[:12]}), which sampled {reader.location.url}; "
                "give that model's directory"
            )
        return tokenizer, where
    for place in dict.fromkeys(_places(reader)):
        try:
            if os.path.isdir(place) and fingerprint_tokenizer(place).vocab_sha256 == wanted:
                return load_tokenizer(place), place
        except (UserError, OSError):
            continue
    return None, f"no directory of {sampler.short()} was found"


def _folders(reader: StoreReader) -> list[Path]:
    """Those above a local store, from the nearest."""
    return list(Path(os.path.abspath(reader.location.root)).parents)[:_LEVELS] if reader.location.is_local else []


def _places(reader: StoreReader) -> Iterator[str]:
    """Directories that may hold the sampler's tokenizer."""
    name = reader.manifest.sampler.name
    if name not in ("", ".", "..") and os.sep not in name:
        yield from (str(folder / name) for folder in _folders(reader))
    if (run := find_run(reader)) is not None:
        yield from (stage.model for stage in (run.rollout, run.generate) if stage is not None)
        yield from (run.models.student, run.models.teacher, run.train.init, f"{run.run_dir}/opd-hf", run.score.model)
