"""What two figures of one evaluation differ in that they should have in common: prompts, sampling, grading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Fields of MODEL.json, by what they are called in a message.
SAMPLED = {"prompts_sha256": "prompts", "sampling": "sampling", "encoding": "encoding of prompts"}
GRADED = {
    "answers_sha256": "answers or tests",
    "grader": "grader",
    "grading_version": "version of the graders",
    "grading_seconds": "grading_seconds",
    "limits": "limits of programs",
}
ALL = SAMPLED | GRADED
_HASHES = ("prompts_sha256", "answers_sha256")


def differences(here: Mapping[str, Any], there: Mapping[str, Any], fields: Iterable[str] = ALL) -> dict[str, str]:
    """The fields that differ between two records, each with its name and both values; hashes without. Records of older versions lack some."""
    programs = here.get("grader") == there.get("grader") == "code"  # which grading_seconds says nothing about
    return {
        field: ALL[field] + ("" if field in _HASHES else f" ({_values(here.get(field), there.get(field))})")
        for field in fields
        if here.get(field) != there.get(field) and not (programs and field == "grading_seconds")
    }


def _values(here: Any, there: Any) -> str:
    if not isinstance(here, dict) or not isinstance(there, dict):
        return f"{_shown(here)} and {_shown(there)}"
    keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    return ", ".join(f"{key} {_shown(here.get(key))} and {_shown(there.get(key))}" for key in keys)


def _shown(value: Any) -> str:
    return "none" if value is None else "some" if isinstance(value, dict) else f"{value!s:.60}"
