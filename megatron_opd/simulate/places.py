"""Where in the code something happens: frames of the project, Megatron-Core and Transformer Engine."""

from __future__ import annotations

import sys

_OURS = ("megatron_opd/", "opd_kernels/", "megatron/core/", "transformer_engine/")
_NOT = "megatron_opd/simulate/"


def place(depth: int = 3) -> str:
    """The innermost `depth` such frames, 'file:line:function' each, the innermost first; '?' where there is none."""
    frames: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(frames) < depth:
        if (name := _shown(frame.f_code.co_filename)) is not None:
            frames.append(f"{name}:{frame.f_lineno}:{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(frames) or "?"


def _shown(path: str) -> str | None:
    """The part of a file's path that is shown, None for a file that is none of ours."""
    for mark in _OURS:
        at = path.rfind(mark)
        if at >= 0 and not path.startswith(_NOT, at):
            return path[at:]
    return None
