"""Figures of trainings: curves over the steps, evaluations on the way, reverse KL by position. A colour a group, fine-tuning apart from distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megatron_opd.evaluate import over_training
from megatron_opd.evaluate.wording import shown
from megatron_opd.report.runs import Run
from megatron_opd.report.smoothing import Rows, band, smooth, thin, values_of, width_of
from megatron_opd.report.style import Mark, Panel, Plot, plain_ticks

CURVES = (
    ("loss", "loss"),
    ("reverse_kl", "reverse KL to the teacher, nat/token"),
    ("nll", "negative log-likelihood, nat/token"),
    ("entropy", "entropy, nat"),
    ("topk_overlap", "teacher's top-k among the student's"),
    ("effective_sample_share", "effective sample share against pi_ref"),
    ("off_share", "share of tokens far from pi_ref"),
    ("grad_norm", "gradient norm (logarithmic)"),
    ("response_length", "tokens a response"),
    ("tokens_per_second", "tokens/s"),
)
_DISTILLATION = ("reverse_kl", "effective_sample_share", "off_share")  # nothing to see in fine-tuning
_CONSTANT = 1e-6  # of its size: a range that is no change
FEW_TOKENS = 200  # of a class of positions in the steps that are averaged: its mean is noise


@dataclass(frozen=True)
class Curve:
    """A training: of which run and group, and its rows."""

    run: str
    group: str
    rows: Rows


def curves_by_stage(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """Trainings of each kind ("opd", "sft", ...), distillation first; several runs that hold copies of one training are told apart by nothing."""
    names = dict.fromkeys(name for run in runs for name in run.training)
    found = {name: [Curve(run.label, run.group, run.training[name]) for run in runs if name in run.training] for name in names}
    return dict(sorted(found.items(), key=lambda item: not any(distils(curve.rows) for curve in item[1])))


def distils(rows: Rows) -> bool:
    return any(row.get("abs_advantage") for row in rows)


def window(rows: Rows, *, end: bool) -> Rows:
    """The first, or last, tenth of the steps, at least one: what is averaged where one number stands for a part of a run."""
    count = max(1, len(rows) // 10)
    return rows[-count:] if end else rows[:count]


def kl_by_position(rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    """Reverse KL of each position class over `rows`, float64 [P], and its tokens, float64 [P]; None where an older version did not count them.

    Each row counts by its tokens, without these alike. NaN where no row has the class.
    """
    having = [row for row in rows if row.get("reverse_kl_by_position")]
    P = max((len(row["reverse_kl_by_position"]) for row in having), default=0)
    means, tokens = np.full((len(having), P), np.nan), np.zeros((len(having), P))
    counted = bool(having)
    for number, row in enumerate(having):
        values, counts = row["reverse_kl_by_position"], row.get("tokens_by_position")
        means[number, : len(values)] = [np.nan if value is None else value for value in values]
        counted = counted and counts is not None and len(counts) == len(values)
        tokens[number, : len(values)] = counts if counts is not None and len(counts) == len(values) else 1.0
    there = ~np.isnan(means)
    total = np.where(there, tokens, 0.0).sum(0)
    return np.where(total > 0, np.nansum(means * tokens, 0) / np.maximum(total, 1e-300), np.nan), total if counted else None


def training_plot(stage: str, curves: Sequence[Curve], marks: Mapping[str, Mark], name: str) -> Plot | None:
    """Every quantity that a row has; bold the mean of a group's runs, each smoothed, faint each run as it was."""
    distilled = any(distils(curve.rows) for curve in curves)
    panels = [
        Panel(title, partial(_draw_curve, key=key, curves=curves, marks=marks))
        for key, title in CURVES
        if (distilled or key not in _DISTILLATION) and any(row.get(key) is not None for curve in curves for row in curve.rows)
    ]
    if not panels:
        return None
    widths = sorted({width_of(curve.rows) for curve in curves})
    over = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
    note = f"Bold: the running mean over {over} steps, of a group's runs the mean; band: its lowest and highest run; faint: every step of every run."
    legend = [marks[group] for group in dict.fromkeys(curve.group for curve in curves)]
    return Plot(name, f"Training: {stage}", panels, legend, note)


def _draw_curve(axes: Any, *, key: str, curves: Sequence[Curve], marks: Mapping[str, Mark]) -> None:
    logarithmic = key == "grad_norm"
    for group in dict.fromkeys(curve.group for curve in curves):
        mark, smoothed = marks[group], []
        for curve in curves:
            step, values = values_of(curve.rows, key) if curve.group == group else (np.array([]), np.array([]))
            if logarithmic:
                step, values = step[values > 0], values[values > 0]
            if len(step):
                axes.plot(*thin(step, values), color=mark.colour, linewidth=0.6, alpha=0.3)
                smoothed.append((step, smooth(values, width_of(curve.rows))))
        if not smoothed:
            continue
        step, mean, low, high = thin(*band(smoothed))
        if len(smoothed) > 1:
            axes.fill_between(step, low, high, color=mark.colour, alpha=0.18, linewidth=0)
        single_point = {"marker": mark.marker, "markersize": 4} if len(step) == 1 else {}
        axes.plot(step, mean, color=mark.colour, linestyle=mark.dash, linewidth=1.7, **single_point)
    if logarithmic and axes.has_data():
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, 10)
    elif axes.has_data():
        low, high = axes.get_ylim()
        if high - low < _CONSTANT * max(abs(low), abs(high)):  # rounding's, which no axis can name
            axes.set_ylim(low - 0.05 * abs(low), high + 0.05 * abs(high))
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("step")


def during_plot(stage: str, curves: Sequence[Curve], marks: Mapping[str, Mark], name: str) -> Plot | None:
    """Accuracy of the evaluations on the way over the steps; a panel an evaluation."""
    points = [(curve, over_training.points(curve.rows)) for curve in curves]
    names = dict.fromkeys(name for _, found in points for name, of in found.items() if any(point.accuracy for point in of))
    panels = [Panel(f"{evaluation}: accuracy", partial(_draw_during, name=evaluation, points=points, marks=marks)) for evaluation in names]
    if not panels:
        return None
    note = "Lines: the mean of a group's runs; band: the lowest and the highest. A group of one run has the 95 % interval over prompts."
    return Plot(
        name, f"Evaluations during {stage}", panels, [marks[group] for group in dict.fromkeys(curve.group for curve in curves)], note
    )


def _draw_during(
    axes: Any, *, name: str, points: Sequence[tuple[Curve, dict[str, list[over_training.Point]]]], marks: Mapping[str, Mark]
) -> None:
    for group in dict.fromkeys(curve.group for curve, _ in points):
        mark = marks[group]
        found = [[(p.step, p.accuracy) for p in of.get(name, []) if p.accuracy] for curve, of in points if curve.group == group]
        found = [of for of in found if of]
        if not found:
            continue
        step, mean, low, high = band([(np.array([s for s, _ in of]), np.array([a["mean"] for _, a in of])) for of in found])
        if len(found) == 1:
            low, high = (np.array([a["mean"] if a[key] is None else a[key] for _, a in found[0]]) for key in ("low", "high"))
            axes.vlines(step, low, high, color=mark.colour, linewidth=0.8, alpha=0.6)
        else:
            axes.fill_between(step, low, high, color=mark.colour, alpha=0.18, linewidth=0)
        axes.plot(step, mean, color=mark.colour, linestyle=mark.dash, marker=mark.marker, markersize=3.5, linewidth=1.5)
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter("{x:.0%}" if np.ptp(axes.get_ylim()) > 0.05 else "{x:.1%}")


def positions_plot(curves: Sequence[Curve], marks: Mapping[str, Mark], name: str) -> Plot | None:
    """Reverse KL against the position in the response, at the start and at the end of each distillation."""
    having = [curve for curve in curves if any(row.get("reverse_kl_by_position") for row in curve.rows)]
    if not having:
        return None
    dropped: dict[str, set[int]] = {}
    uncounted = [curve.run for curve in having if kl_by_position(curve.rows)[1] is None]
    panels = []
    for end, when in ((False, "first"), (True, "last")):
        lines = [(curve.group, _line(curve, end, dropped)) for curve in having]
        if any(np.isfinite(means).any() for _, means in lines):
            panels.append(Panel(f"{when} tenth of the steps", partial(_draw_positions, lines=lines, marks=marks)))
    if not panels:
        return None
    note = f"Nat/token; the mean of a group's runs, thin each run. Classes of positions with fewer than {FEW_TOKENS} tokens in those steps are left out"
    classes = sorted(set().union(*dropped.values())) if dropped else []
    note += f": {', '.join(_positions(p) for p in classes)} (of {len(dropped)} of {len(having)} runs)." if classes else "; there were none."
    if uncounted:
        note += f" Of {len(uncounted)} runs, whose version did not count tokens, nothing is left out."
    return Plot(
        name,
        "Reverse KL by position in the response",
        panels,
        [marks[g] for g in dict.fromkeys(c.group for c in having)],
        note,
        columns=2,
    )


def _line(curve: Curve, end: bool, dropped: dict[str, set[int]]) -> np.ndarray:
    means, tokens = kl_by_position(window(curve.rows, end=end))
    if tokens is None:
        return means
    few = (tokens < FEW_TOKENS) & np.isfinite(means)
    if few.any():
        dropped.setdefault(curve.run, set()).update(np.flatnonzero(few).tolist())
    return np.where(few, np.nan, means)


def _positions(p: int) -> str:
    """Of class p, from 1: 2^p to 2^(p+1) - 1."""
    first, last = 2**p, 2 ** (p + 1) - 1
    return shown(first, ",.0f") if first == last else f"{first:,} to {last:,}"


def _draw_positions(axes: Any, *, lines: Sequence[tuple[str, np.ndarray]], marks: Mapping[str, Mark]) -> None:
    for group in dict.fromkeys(group for group, _ in lines):
        mark, found = marks[group], [means for of, means in lines if of == group]
        P = max(map(len, found))
        table = np.full((len(found), P), np.nan)
        for row, means in zip(table, found, strict=True):
            row[: len(means)] = means
        centres = 1.5 * 2.0 ** np.arange(P) - 0.5  # from 1: of 2^p to 2^(p+1) - 1
        if len(found) > 1:
            for means in table:
                axes.plot(centres, means, color=mark.colour, linewidth=0.6, alpha=0.4)
        there = np.isfinite(table).sum(0)
        mean = np.where(there > 0, np.nansum(table, 0) / np.maximum(there, 1), np.nan)
        axes.plot(centres, mean, color=mark.colour, linestyle=mark.dash, marker=mark.marker, markersize=3.5, linewidth=1.5)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, 2)
    axes.set_xlabel("position in the response, tokens")
