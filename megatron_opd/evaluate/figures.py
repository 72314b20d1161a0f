"""The report's figures, as PNG files: evaluations, training curves, reverse KL by position, cost."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.durable import write_file
from megatron_opd.evaluate.wording import kl_caveat, shown

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
_CURVES = (
    ("loss", "loss"),
    ("reverse_kl", "reverse KL to the teacher on the rollouts, nat/token"),
    ("nll", "negative log-likelihood, nat/token"),
    ("entropy", "entropy, nat"),
    ("topk_overlap", "share of the teacher's top-k among the student's"),
    ("effective_sample_share", "effective sample share against pi_ref"),
    ("off_share", "share of tokens far from pi_ref"),
    ("grad_norm", "gradient norm"),
    ("response_length", "tokens a response"),
    ("tokens_per_second", "tokens/s"),
)
_DISTILLATION = ("reverse_kl", "effective_sample_share", "off_share")  # nothing to see in fine-tuning


def draw(data: dict[str, dict[str, Any]], target: Path) -> list[Path]:
    """Draw what there is data for; returns the files. `data` by run: evaluations, training (rows by stage), stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9})
    plt.rcParams["text.parse_math"] = False  # labels are people's names of things: "$\\frac$" is no formula
    evaluations = [
        (f"{run}: {e['name']}" if len(data) > 1 else e["name"], e) for run, content in data.items() for e in content["evaluations"]
    ]
    curves = [
        (f"{run} {stage}" if len(data) > 1 else stage, rows) for run, content in data.items() for stage, rows in content["training"].items()
    ]
    figures = {
        "results": _results(evaluations, plt),
        "training": _training(curves, plt),
        "positions": _positions(curves, plt),
        "cost": _cost({run: content["stages"] for run, content in data.items()}, plt),
    }
    return [_save(figure, target / f"{name}.png", plt) for name, figure in figures.items() if figure is not None]


def distils(rows: list[dict[str, Any]]) -> bool:
    return any(row.get("abs_advantage") for row in rows)


def window(rows: list[dict[str, Any]], *, end: bool) -> list[dict[str, Any]]:
    """The first, or last, tenth of the steps, at least one: what is averaged where one number stands for a part of a run."""
    count = max(1, len(rows) // 10)
    return rows[-count:] if end else rows[:count]


def kl_by_position(rows: list[dict[str, Any]]) -> np.ndarray:
    """Reverse KL of each position class, the mean over those of `rows` that have it, float64 [P]."""
    lists = [row["reverse_kl_by_position"] for row in rows if row.get("reverse_kl_by_position")]
    table = np.full((len(lists), max(map(len, lists), default=0)), np.nan)
    for number, values in enumerate(lists):
        table[number, : len(values)] = [np.nan if value is None else value for value in values]
    counts = (~np.isnan(table)).sum(0)
    return np.where(counts > 0, np.nansum(table, 0) / np.maximum(counts, 1), np.nan)


def _results(evaluations: list[tuple[str, dict[str, Any]]], plt: Any) -> Any:
    panels = [
        (key, title)
        for key, title in (("accuracy", "accuracy"), ("reverse_kl", "reverse KL to the teacher, nat/token"))
        if any(key in e for _, e in evaluations)
    ]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        bars = [(name if key == "accuracy" else _with_caveat(name, e), e[key]) for name, e in evaluations if key in e]
        for x, (_, value) in enumerate(bars):
            mean, low, high = (value["mean"], *_bounds(value))
            axis.bar(
                x, mean, yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], color=_COLOURS[x % len(_COLOURS)], capsize=4, width=0.6
            )
            label = shown(mean, ".1%" if key == "accuracy" else ".3f")
            axis.annotate(label, (x, high), ha="center", va="bottom", xytext=(0, 3), textcoords="offset points")
        axis.set_xticks(range(len(bars)), [name for name, _ in bars])
        axis.set_title(title)
        axis.margins(y=0.15)
    return figure


def _with_caveat(name: str, evaluation: dict[str, Any]) -> str:
    caveat = kl_caveat(evaluation.get("sampling"))
    return f"{name}\n({caveat})" if caveat else name


def _bounds(figure: dict[str, Any]) -> tuple[float, float]:
    """Those of the interval; the mean itself where there is none."""
    low, high = (figure["mean"] if figure[key] is None or not math.isfinite(figure[key]) else figure[key] for key in ("low", "high"))
    return low, high


def _training(curves: list[tuple[str, list[dict[str, Any]]]], plt: Any) -> Any:
    panels = [(key, title) for key, title in _CURVES if any(row.get(key) is not None for _, rows in curves for row in rows)]
    if not panels:
        return None
    height = -(-len(panels) // 3)
    figure, axes = plt.subplots(height, 3, figsize=(12, 3 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, title) in zip(axes.flat, panels, strict=False):
        for number, (label, rows) in enumerate(curves):
            if key in _DISTILLATION and not distils(rows):
                continue
            values = [np.nan if row.get(key) is None else row[key] for row in rows]
            axis.plot([row["step"] for row in rows], values, color=_COLOURS[number % len(_COLOURS)], label=label, linewidth=1.3)
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.has_data():
            axis.legend(frameon=False)
    return figure


def _positions(curves: list[tuple[str, list[dict[str, Any]]]], plt: Any) -> Any:
    """Reverse KL against the position in the response, at the start and at the end of each distillation."""
    with_positions = [(label, rows) for label, rows in curves if any(row.get("reverse_kl_by_position") for row in rows)]
    if not with_positions:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for number, (label, rows) in enumerate(with_positions):
        for end in (False, True):
            means = kl_by_position(window(rows, end=end))
            centres = [1.5 * 2**p - 1 for p in range(len(means))]  # of 2^p - 1 ... 2^(p+1) - 2
            axis.plot(
                centres, means, color=_COLOURS[number % len(_COLOURS)], linestyle="-" if end else ":", marker=".",
                label=f"{label}, {'last' if end else 'first'} tenth of the steps",
            )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("position in the response, tokens")
    axis.set_title("reverse KL to the teacher by position, nat/token")
    axis.legend(frameon=False)
    return figure


def _cost(stages: dict[str, list[dict[str, Any]]], plt: Any) -> Any:
    """GPU hours of each run by stage (all evaluations are one), or wall time where no GPU was used."""
    if not any(stages.values()):
        return None
    on_gpus = any(row["gpu_hours"] for rows in stages.values() for row in rows)
    totals: dict[str, dict[str, float]] = {run: defaultdict(float) for run in stages}
    for run, rows in stages.items():
        for row in rows:
            totals[run][row["stage"].split()[0]] += row["gpu_hours"] if on_gpus else row["seconds"] / 60
    names = list(dict.fromkeys(name for found in totals.values() for name in found))
    figure, axis = plt.subplots(figsize=(6.5, 1.2 + 0.5 * len(stages)))
    left = np.zeros(len(stages))
    for number, name in enumerate(names):
        widths = np.array([found[name] for found in totals.values()])
        axis.barh(list(totals), widths, left=left, color=_COLOURS[number % len(_COLOURS)], label=name, height=0.6)
        left += widths
    axis.set_title("GPU hours by stage" if on_gpus else "minutes by stage (no GPU)")
    axis.legend(frameon=False, ncol=3)
    axis.margins(y=0.25)
    return figure


def _save(figure: Any, path: Path, plt: Any) -> Path:
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    plt.close(figure)
    write_file(path, image.getvalue())
    return path
