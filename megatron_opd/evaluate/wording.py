"""How figures of evaluations are written: with their intervals, without a minus before zero, and with what must be known to read them."""

from __future__ import annotations

import math
from typing import Any

_SAME = 1e-12  # an interval that is narrower has no spread but rounding's


def shown(value: float | None, form: str, *, signed: bool = False) -> str:
    """`value` in a format such as ".4f" or ",.0f", never as "-0.0000"; "" for what is no finite number."""
    if value is None or not math.isfinite(value):
        return ""
    return format(float(value), f"{'+' if signed else ''}z{form}")


def interval(figure: dict[str, Any], form: str, *, factor: float = 1.0, signed: bool = False, unit: str | None = None) -> str:
    """ "mean (low to high)"; with a `unit` "mean unit [low, high]", as in a line of text. Says why where there is no interval, or one of no width."""
    mean, low, high = (shown(None if figure[key] is None else factor * figure[key], form, signed=signed) for key in ("mean", "low", "high"))
    if unit is not None:
        mean += unit
    if not low or not high:
        return f"{mean} (no interval: one prompt alone)"
    if abs(figure["high"] - figure["low"]) < _SAME:
        return f"{mean} (no interval: the same for every prompt)"
    return f"{mean} ({low} to {high})" if unit is None else f"{mean} [{low}, {high}]"


def kl_caveat(sampling: dict[str, Any] | None) -> str | None:
    """Why the mean log-ratio of the samples is no unbiased estimate of the reverse KL; None if it is one, or nothing is known."""
    if not sampling:
        return None
    temperature, top_p, top_k = (sampling.get(key, neutral) for key, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)))
    if temperature == 0:
        return "sampled greedily"
    found = [f"temperature {temperature:g}"] * (temperature != 1) + [f"top-p {top_p:g}"] * (top_p != 1) + [f"top-k {top_k}"] * (top_k != 0)
    return f"sampled at {', '.join(found)}" if found else None


def describe_grading(grading: dict[str, Any]) -> str:
    """One line on the responses that scored 0 without being compared, "" if there are none."""
    parts = [
        f"{grading[key]} {text}"
        for key, text in (
            ("cut", "cut by length"),
            ("unclosed", "that never end their <think>"),
            ("timeouts", "over the grader's limit of time or memory"),
            ("errors", "that the grader fails at"),
        )
        if grading.get(key)
    ]
    first = f"; first: {grading['first_fault']}" if grading.get("first_fault") else ""
    return f"graded 0 without a comparison, of {grading['responses']} responses: {', '.join(parts)}{first}" if parts else ""
