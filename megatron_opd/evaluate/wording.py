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
    """One line on the responses that scored 0 without being compared, with their shares; "" if there are none."""
    parts = [
        f"{grading[key]} ({shown(grading[key] / grading['responses'], '.1%')}) {text}"
        for key, text in (
            ("cut", "cut by length"),
            ("unclosed", "that never end their <think>"),
            ("no_answer", "without an answer"),
            ("timeouts", "over the grader's limit of time or memory"),
            ("errors", "that the grader fails at"),
        )
        if grading.get(key)
    ]
    first = f"; first: {grading['first_fault']}" if grading.get("first_fault") else ""
    return f"graded 0 without a comparison, of {grading['responses']} responses: {', '.join(parts)}{first}" if parts else ""


def describe(result: dict[str, Any]) -> str:
    """A line with accuracy and reverse KL, each with its 95 % interval; further ones on what was graded 0 unseen, and on the baseline."""
    parts = [f"{heading(result)}:"]
    if "accuracy" in result:
        parts.append(f"accuracy {interval(result['accuracy'], '.1%', unit='')}")
    if "reverse_kl" in result:
        parts.append(f"reverse KL {interval(result['reverse_kl'], '.4f', unit='')} nat/token{_caveat(result)}")
    length, stopped = shown(result["response_length"], ".0f"), shown(result["stopped_share"], ".1%")
    parts.append(f"{length} tokens a response, {stopped} ended by themselves")
    lines = ["  ".join(parts), describe_grading(result.get("grading", {"responses": 0}))]
    lines.append(describe_difference(result) if "against" in result else "")
    return "\n".join(line for line in lines if line)


def describe_difference(result: dict[str, Any]) -> str:
    """One line: change of accuracy and reverse KL against the baseline, paired by prompt, each with its 95 % interval; or why there is none."""
    against = result["against"]
    parts = [f"{heading(result)} against {against['name']}"]
    if "accuracy" in against or "reverse_kl" in against:
        parts[0] += f", paired over {against['num_prompts']} prompts"
    parts[0] += ":"
    if "accuracy" in against:
        parts.append(f"accuracy {interval(against['accuracy'], '.1f', factor=100, signed=True, unit=' points')}")
    if "reverse_kl" in against:
        parts.append(f"reverse KL {interval(against['reverse_kl'], '.4f', signed=True, unit='')} nat/token{_caveat(result)}")
    if "note" in against:
        parts.append(str(against["note"]))
    return "  ".join(parts)


def heading(result: dict[str, Any]) -> str:
    """Evaluation and model."""
    return f"{result['evaluation']} {result['name']}"


def _caveat(result: dict[str, Any]) -> str:
    caveat = kl_caveat(result["sampling"])
    return f" ({caveat}: not an unbiased estimate)" if caveat else ""
