"""Offline on-policy distillation of large language models on Megatron-Core.

The names below are the Python API (docs/python.md). What they need is imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_opd.api.store import Store, StoredRollout, open_store
    from megatron_opd.api.writing import ScoreWriter, StoreWriter, add_scores, create_store
    from megatron_opd.errors import UserError
    from megatron_opd.records import Finish

__version__ = "0.1.0"
__all__ = ["Finish", "ScoreWriter", "Store", "StoreWriter", "StoredRollout", "UserError", "add_scores", "create_store", "open_store"]
_MODULES = {
    **dict.fromkeys(("Store", "StoredRollout", "open_store"), "megatron_opd.api.store"),
    **dict.fromkeys(("ScoreWriter", "StoreWriter", "add_scores", "create_store"), "megatron_opd.api.writing"),
    "UserError": "megatron_opd.errors",
    "Finish": "megatron_opd.records",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
