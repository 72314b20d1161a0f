"""The study's figures, as PNG files: all arms, accuracy against cost, against steps, and against the number of candidates."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opd.safety.durable import write_file

from .arms import TOP_K, Arm, in_order
from .estimates import Estimate
from .results import Found, start_name

_PLAIN, _REVERSE_KL, _OTHER, _GREY = "#ff725c", "#4269d0", "#3ca951", "#777777"
_SECONDS = (10, 20, 50, 100, 200, 500)  # ticks
_MARKERS = {None: ("*", "rollouts once"), 50: ("s", "every 50 steps"), 20: ("D", "every 20"), 5: ("^", "every 5"), 1: ("o", "every step")}
_OUTSIDE = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}  # a legend that hides nothing
_SHOWN = ("consistent", "rounds", "inconsistent", "controls")  # groups; the others have a figure or a table of their own
_OF_LOSS = {"opd": ("plain", _PLAIN), "reverse_kl": (f"reverse KL, K = {TOP_K}", _REVERSE_KL)}


def draw(found: Found, folder: Path) -> list[Path]:
    """Draw what there is data for; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9})
    drawn = {"arms": _arms(found, plt), "cost": _cost(found, plt), "steps": _steps(found, plt), "candidates": _candidates(found, plt)}
    return [_save(figure, folder / f"{name}.png", plt) for name, figure in drawn.items() if figure is not None]


def _colour(arm: Arm) -> str:
    if arm.group == "controls" or arm.scores == "residualize":
        return _OTHER
    return _OF_LOSS[arm.loss["name"]][1]


def _whiskers(estimates: Sequence[Estimate]) -> list[list[float]]:
    return [[max(0.0, e.mean - e.low) for e in estimates], [max(0.0, e.high - e.mean) for e in estimates]]


def _arms(found: Found, plt: Any) -> Any:
    """A line an arm: accuracy, and reverse KL to the teacher that distilled it; the mean with its interval, and each seed."""
    shown = [arm for arm in in_order(found.arms) if arm.group in _SHOWN]
    rows = [(start_name(student), f"SFT({student.upper()}), before distillation", _GREY) for student in ("a", "b")]
    rows = [*rows, *((arm.name, arm.title, _colour(arm)) for arm in shown)][::-1]
    rows = [row for row in rows if found.of(row[0])]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.24 * len(rows)), sharey=True)
    panels = (("accuracy", "accuracy, %", 100), ("reverse_kl", "reverse KL to the teacher, nat/token", 1))
    for axis, (name, title, scale) in zip(axes, panels, strict=True):
        for place, (arm, _, colour) in enumerate(rows):
            estimate = found.estimate(arm, name)
            assert estimate is not None
            axis.errorbar(
                scale * estimate.mean, place, xerr=[[scale * side[0]] for side in _whiskers([estimate])], fmt="o", color=colour,
                markersize=4, capsize=2, linewidth=1.2,
            )  # fmt: skip
            if len(runs := found.of(arm)) > 1:
                seeds = [scale * getattr(run, name)[0] for run in runs]
                axis.plot(seeds, [place] * len(seeds), "o", color=colour, markerfacecolor="white", markersize=3.5, markeredgewidth=0.9)
        axis.set_title(title)
    if len(found.of(rows[0][0])) > 1:
        axes[0].set_xlabel("filled: mean and 95 % interval; open: each seed")
    axes[0].set_xlim(-2, 102)
    axes[1].set_xscale("symlog", linthresh=0.01)
    axes[1].set_xlim(left=0)
    axes[0].set_yticks(range(len(rows)), [title for _, title, _ in rows])
    axes[0].set_ylim(-0.8, len(rows) - 0.2)
    return figure


def _cost(found: Found, plt: Any) -> Any:
    """Accuracy against what distillation costs, and against how long a teacher is held; a line a loss, over the rollouts' age."""
    lines: dict[tuple[str, str], list[Arm]] = {}
    for arm in found.arms:
        label, colour = _OF_LOSS.get(arm.loss["name"], ("", ""))
        usual = arm.group in ("rounds", "consistent") and arm.student == "a" and not arm.own_answers and arm.scores != "residualize"
        if found.of(arm.name) and label and usual and arm.loss.get("advantage_clip") != 0.5:
            lines.setdefault((label, colour), []).append(arm)
    if not lines:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, (name, title) in zip(
        axes, (("distilling", "distillation, CPU s"), ("teacher_seconds", "with a teacher held, CPU s")), strict=True
    ):
        for (label, colour), arms in lines.items():
            points = [(found.mean(arm.name, name), found.estimate(arm.name, "accuracy"), arm) for arm in arms]
            points.sort(key=lambda point: point[2].every or 10**9)
            estimates = [estimate for _, estimate, _ in points if estimate is not None]
            means = [100 * estimate.mean for estimate in estimates]
            bars = [[100 * value for value in side] for side in _whiskers(estimates)]
            axis.errorbar([x for x, _, _ in points], means, yerr=bars, color=colour, label=label, capsize=3, linewidth=1.0)
            for (x, _, arm), y in zip(points, means, strict=True):
                marker = _MARKERS[arm.every][0]
                axis.plot([x], [y], marker, color=colour, markersize=9 if marker == "*" else 5)
        axis.set_xscale("log")
        axis.set_xticks(_SECONDS, [str(seconds) for seconds in _SECONDS])
        axis.minorticks_off()
        seconds = [found.mean(arm.name, name) for arms in lines.values() for arm in arms]
        axis.set_xlim(
            max([tick for tick in _SECONDS if tick < min(seconds)], default=min(seconds) / 2),
            min([tick for tick in _SECONDS if tick > max(seconds)], default=2 * max(seconds)),
        )
        axis.set_xlabel(title)
    axes[0].set_ylabel("accuracy, %")
    axes[0].set_ylim(-3, 105)
    losses, labels = axes[0].get_legend_handles_labels()
    ages = {arm.every for arms in lines.values() for arm in arms}
    handles = [
        plt.Line2D([], [], color=_GREY, linestyle="", marker=marker, markersize=9 if marker == "*" else 5, label=words)
        for every, (marker, words) in _MARKERS.items() if every in ages
    ]  # fmt: skip
    axes[1].legend([*losses, *handles], [*labels, *(handle.get_label() for handle in handles)], frameon=False, **_OUTSIDE)
    return figure


def _steps(found: Found, plt: Any) -> Any:
    """Accuracy and drift against the number of steps: the same rollouts, the teacher of SFT and the other one."""
    lines: list[tuple[str, str, str, list[Arm]]] = []
    for student, teacher in (("a", "a"), ("a", "b")):
        for loss, (label, colour) in _OF_LOSS.items():
            same = [
                arm for arm in found.arms
                if arm.student == student and arm.teacher == teacher and arm.loss["name"] == loss and arm.loss.get("advantage_clip") != 0.5
                and arm.every is None and arm.scores in ("sampled", "top_k") and arm.top_k == TOP_K and not arm.own_answers and arm.lr is None
                and found.of(arm.name)
            ]  # fmt: skip
            if any(arm.times > 1 for arm in same):
                lines.append((f"{label}, teacher {teacher.upper()}", colour, "-" if student == teacher else ":", same))
    if not lines:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for axis, (name, title, scale) in zip(
        axes, (("accuracy", "accuracy, %", 100), ("kl_to_ref", "KL to pi_ref, nat/token", 1)), strict=True
    ):
        for label, colour, style, arms in lines:
            arms = sorted(arms, key=lambda arm: arm.times)
            names = [start_name(arms[0].student), *(arm.name for arm in arms)]
            estimates = [estimate for arm in names if (estimate := found.estimate(arm, name)) is not None]
            bars = [[scale * value for value in side] for side in _whiskers(estimates)]
            axis.errorbar(
                [found.mean(arm, "steps") for arm in names], [scale * e.mean for e in estimates], yerr=bars, fmt="o", linestyle=style,
                color=colour, label=label, capsize=3, linewidth=1.2, markersize=4,
            )  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("steps")
    axes[0].set_ylim(-3, 103)
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False, **_OUTSIDE)
    return figure


def _candidates(found: Found, plt: Any) -> Any:
    """Accuracy against K."""
    arms = [arm for arm in found.arms if (arm.group == "candidates" or arm.name == "offline-reverse-kl") and found.of(arm.name)]
    if len(arms) < 2:
        return None
    arms.sort(key=lambda arm: arm.top_k)
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    estimates = [estimate for arm in arms if (estimate := found.estimate(arm.name, "accuracy")) is not None]
    bars = [[100 * value for value in side] for side in _whiskers(estimates)]
    axis.errorbar(
        [arm.top_k for arm in arms],
        [100 * e.mean for e in estimates],
        yerr=bars,
        fmt="o-",
        color=_REVERSE_KL,
        capsize=3,
        label="reverse KL",
    )
    for name, label, colour in (("offline-plain", "plain, no candidates", _PLAIN), (start_name("a"), "before distillation", _GREY)):
        if (estimate := found.estimate(name, "accuracy")) is not None:
            axis.axhline(100 * estimate.mean, color=colour, linestyle="--", linewidth=1.2, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks([arm.top_k for arm in arms], [str(arm.top_k) for arm in arms])
    axis.set_xlabel("candidates K in the store (of 64 tokens in all)")
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 103)
    axis.legend(frameon=False, **_OUTSIDE)
    return figure


def _save(figure: Any, path: Path, plt: Any) -> Path:
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    write_file(path, image.getvalue())
    return path
