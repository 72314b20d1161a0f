"""Who the inputs of a recipe are now: models and prompts, known again by the sizes and times of their files, so that asking costs nothing.

Kept in RUN_DIR/identities.json. What changed is read anew, but for the weights of a large model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_opd.data.prompt_files import find_files
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import fingerprint_model, known_weights
from megatron_opd.recipe.config import EvalStage, SampleStage
from megatron_opd.records import ModelFingerprint, PromptFile
from megatron_opd.safety.durable import write_json
from megatron_opd.safety.untrusted import read_object

IDENTITIES_FILE = "identities.json"
# Weights of more bytes are not hashed just to tell how far a run is: reading 64 GB takes a minute.
_MOST_BYTES = 1 << 28


class Unread(Exception):
    """A model's files changed since they were read, and reading them takes long; its text says so."""


class Identities:
    """Fingerprints by path. `save` keeps those that were made anew. Not for several threads."""

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / IDENTITIES_FILE
        self._changed = False
        try:
            self._known: dict[str, Any] = read_object(self.path)
        except (OSError, UserError):  # none yet, or one that a person edited: it is only a cache
            self._known = {}

    def model(self, directory: str) -> ModelFingerprint | None:
        """None where no model is. Raises UserError for what is none, Unread for one that would have to be read at length."""
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            return None
        place, stamp = f"model {os.path.realpath(folder)}", _stamp(path for path in folder.iterdir() if not path.name.startswith("."))
        known = self._recall(place, stamp, ModelFingerprint)
        if isinstance(known, ModelFingerprint):
            return known
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if weights > _MOST_BYTES and known_weights(folder) is None:
            raise Unread(f"the files of {directory} are not as they were when they were last read")
        return self._remember(place, stamp, fingerprint_model(folder))

    def prompts(self, path: str, **selection: Any) -> PromptFile | None:
        """Identity of prompts, with `selection` as `read_prompts` takes it; None where no file is. Raises UserError."""
        if not Path(path).exists():
            return None
        place = f"prompts {os.path.realpath(path)} {sorted(selection.items())}"
        stamp = _stamp(find_files(path, selection.get("split", "train")).files)
        known = self._recall(place, stamp, PromptFile)
        if isinstance(known, PromptFile):
            return known
        return self._remember(place, stamp, read_prompts(path, answers=False, **selection)[0])

    def hash_of(self, key: str, make: Any) -> str:
        """A hash that depends on `key` alone, made by `make` where it is not known."""
        key = hashlib.sha256(key.encode()).hexdigest()
        known = self._known.get(key)
        if not isinstance(known, str):
            known = self._known[key] = str(make())
            self._changed = True
        return known

    def save(self) -> None:
        """Keep what was found, where that can be written."""
        if self._changed and self.path.parent.is_dir():
            with contextlib.suppress(OSError):
                write_json(self.path, self._known)
        self._changed = False

    def _recall(self, place: str, stamp: list[Any], kind: type[ModelFingerprint] | type[PromptFile]) -> Any:
        entry = self._known.get(place)
        if isinstance(entry, dict) and entry.get("files") == stamp:
            with contextlib.suppress(ValidationError):
                return kind.model_validate(entry.get("identity"))
        return None

    def _remember(self, place: str, stamp: list[Any], found: Any) -> Any:
        self._known[place] = {"files": stamp, "identity": found.model_dump(mode="json")}
        self._changed = True
        return found


def _stamp(paths: Any) -> list[Any]:
    """What changes when files do; the time of the last change of the inode can't be set back, that of the content can."""
    facts = [(path.name, path.stat()) for path in sorted(paths) if path.is_file()]
    return [[name, fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns] for name, fact in facts]


def selection_of(config: SampleStage | EvalStage) -> dict[str, Any]:
    """Which prompts of its file a stage takes, as `read_prompts` is told."""
    selection: dict[str, Any] = {"limit": config.num_prompts, "subset_seed": config.subset_seed, "dates": config.dates}
    if isinstance(config, SampleStage):
        return selection | {"unique": config.unique_prompts, "share": config.share}
    return selection | {"split": "test"}
