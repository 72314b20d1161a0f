"""What the simulations need that a machine may not have, and where it is."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path

from cases import OLDEST
from megatron_opd.simulate.needs import find_compiler, find_transformer_engine

from megatron_opd.errors import UserError

ROOT = Path(__file__).parents[2]


@cache
def missing(version: str, *, with_te: bool) -> str | None:
    """Why nothing can be simulated here on this version of Megatron-Core, with the remedy; None if it can."""
    try:
        find_compiler()
    except UserError as error:
        return str(error)
    if with_te and find_transformer_engine() is None:
        return "Transformer Engine's Python half is not here: make te"
    if version != importlib.metadata.version("megatron-core") and not mcore_paths(version):
        return f"Megatron-Core {version} is not here: " + (
            "it is what `make test` installs" if version == OLDEST else f"make mcore MCORE={version}"
        )
    return None


def mcore_paths(version: str) -> list[Path]:
    """The folder of this version of Megatron-Core; none where it is not there, or the environment's own is of this version."""
    folder = ROOT / f".mcore-{version}"
    return [folder] if version != importlib.metadata.version("megatron-core") and folder.is_dir() else []


def te_paths() -> list[Path]:
    found = find_transformer_engine()
    return [Path(found)] if found else []
