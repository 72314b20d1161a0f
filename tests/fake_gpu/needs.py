"""What the simulations need that a machine may not have, and where it is."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path

from cases import OLDEST

from megatron_opd.errors import UserError
from megatron_opd.simulate.needs import TABLE_VERSION, check_torch, find_compiler

ROOT = Path(__file__).parents[2]


@cache
def missing(version: str, *, with_te: bool) -> str | None:
    """Why nothing can be simulated here on this version of Megatron-Core, with the remedy; None if it can."""
    try:
        check_torch()
        find_compiler()
    except UserError as error:
        return str(error)
    if with_te and not te_paths() and not _is_installed("transformer-engine", TABLE_VERSION):
        return f"the Python half of Transformer Engine {TABLE_VERSION} is not here: make te"
    if not mcore_paths(version) and not _is_installed("megatron-core", version):
        return f"Megatron-Core {version} is not here: " + ("make test installs it" if version == OLDEST else f"make mcore MCORE={version}")
    return None


def mcore_paths(version: str) -> list[Path]:
    """The folder of this version of Megatron-Core; none where the environment's own is of it, or it is not there."""
    return [] if _is_installed("megatron-core", version) else _folder(f".mcore-{version}")


def te_paths() -> list[Path]:
    """The folder of Transformer Engine, which `make te` makes."""
    return _folder(f".te-{TABLE_VERSION}")


def _folder(name: str) -> list[Path]:
    return [ROOT / name] if (ROOT / name).is_dir() else []


def _is_installed(package: str, version: str) -> bool:
    try:
        return importlib.metadata.version(package) == version
    except importlib.metadata.PackageNotFoundError:
        return False
