"""All figures of a report: results as dots with intervals, accuracy against cost, trainings, cost by stage."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_opd.report.curves import curves_by_stage, during_plot, positions_plot, training_plot
from megatron_opd.report.runs import Run
from megatron_opd.report.shared_cost import whole_cost
from megatron_opd.report.style import COLOURS, DASHES, GREY, LONGEST_LABEL, Mark, Panel, Plot, few_ticks, marks_of, short_labels
from megatron_opd.report.verdict import Result, costs_of

_ROW_INCHES = 0.24


def plots(groups: Mapping[str, Sequence[Run]], verdicts: Mapping[str, Sequence[Result]]) -> list[Plot]:
    """What there is data for, in the order of the page."""
    runs = [run for members in groups.values() for run in members]
    marks = marks_of(list(groups))
    found: list[Plot | None] = [results_plot(verdicts, marks), tradeoff_plot(verdicts, marks)]
    for number, (stage, curves) in enumerate(curves_by_stage(runs).items()):
        name = stage if re.fullmatch(r"[\w-]{1,40}", stage, re.ASCII) else f"stage-{number}"  # of a file
        found += [training_plot(stage, curves, marks, f"training-{name}"), during_plot(stage, curves, marks, f"during-{name}")]
        found.append(positions_plot(curves, marks, "positions" if stage == "opd" else f"positions-{name}"))
    return [plot for plot in [*found, cost_plot(runs)] if plot is not None]


def results_plot(verdicts: Mapping[str, Sequence[Result]], marks: Mapping[str, Mark]) -> Plot | None:
    """A row a group (and a model that runs began with): mean with its interval, small dots for the seeds."""
    panels = []
    for evaluation, results in verdicts.items():
        for key, title in (("accuracy", "accuracy"), ("reverse_kl", "reverse KL, nat/token")):
            having = [result for result in results if (getattr(result, key) or {}).get("mean") is not None]
            if having:
                height = 0.75 + _ROW_INCHES * len(having)
                panels.append(
                    Panel(f"{evaluation}: {title}", partial(_draw_dots, key=key, results=having, marks=marks), height=height, width=4.6)
                )
    if not panels:
        return None
    note = (
        "Bars: 95 % intervals over prompts (reverse KL of several seeds: lowest to highest); small dots: seeds. Grey: models that the runs began "
        "with."
    )
    return Plot("results", "Results", panels, [], note, columns=2)


def _draw_dots(axes: Any, *, key: str, results: Sequence[Result], marks: Mapping[str, Mark]) -> None:
    for row, result in enumerate(results):
        mark = marks.get(result.name) if result.is_group else None
        colour, marker = (mark.colour, mark.marker) if mark else (GREY, "o")
        mean, low, high = bounds(getattr(result, key))
        axes.plot([low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([mean], [row], color=colour, marker=marker, markersize=6, linestyle="none")
        seeds = [member.record[key]["mean"] for member in result.members if key in member.record]
        if len(seeds) > 1:
            axes.plot(seeds, [row + 0.28] * len(seeds), color=colour, marker=".", markersize=4, linestyle="none", alpha=0.7)
    axes.set_yticks(range(len(results)), short_labels([result.name for result in results]))
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.grid(False, axis="y")
    if key == "accuracy":
        axes.xaxis.set_major_formatter("{x:.0%}" if np.ptp(axes.get_xlim()) > 0.04 else "{x:.1%}")
    few_ticks(axes.xaxis)


def bounds(figure: Mapping[str, float | None]) -> tuple[float, float, float]:
    """Mean, low and high; the mean itself where there is no bound."""
    mean = figure["mean"]
    assert mean is not None
    low, high = (mean if value is None or not math.isfinite(value) else value for value in (figure["low"], figure["high"]))
    return mean, low, high


def tradeoff_plot(verdicts: Mapping[str, Sequence[Result]], marks: Mapping[str, Mark]) -> Plot | None:
    """Accuracy against what a run cost: large the groups, small their runs."""
    panels = []
    groups: list[str] = []
    noted: list[str] = []
    for evaluation, results in verdicts.items():
        graded = [result for result in results if result.is_group and (result.accuracy or {}).get("mean") is not None]
        of_what, costs = costs_of(graded)
        having = [(result, cost) for result, cost in zip(graded, costs, strict=True) if cost.get("seconds") is not None]
        if len(having) > 1:
            whole = all(cost is result.whole_cost for result, cost in having)
            panels.append(Panel(f"{evaluation}: accuracy against cost", partial(_draw_tradeoff, results=having, whole=whole, marks=marks)))
            groups += [result.name for result, _ in having]
            noted.append(of_what)
    legend = [marks[group] for group in dict.fromkeys(groups)]
    note = (
        "Large: groups, with the 95 % interval over prompts; small: their runs. Cost: of all stages of a run"
        + ", ".join(dict.fromkeys(noted))
        + "."
    )
    return Plot("tradeoff", "Accuracy against cost", panels, legend, note) if panels else None


def _draw_tradeoff(
    axes: Any, *, results: Sequence[tuple[Result, Mapping[str, float | None]]], whole: bool, marks: Mapping[str, Mark]
) -> None:
    on_gpus = any(cost.get("gpu_hours") for _, cost in results)
    key, scale = ("gpu_hours", 1.0) if on_gpus else ("seconds", 60.0)
    for result, mean_cost in results:
        mark = marks[result.name]
        for member in result.members:
            if member.accuracy is not None and len(result.members) > 1:
                cost = (whole_cost(member.run) if whole else member.run.cost())[key]
                axes.plot(
                    [_known(cost) / scale],
                    [member.accuracy],
                    color=mark.colour,
                    marker=mark.marker,
                    markersize=3,
                    linestyle="none",
                    alpha=0.6,
                )
        mean, low, high = bounds(result.accuracy or {})
        x = _known(mean_cost[key]) / scale
        axes.plot([x, x], [low, high], color=mark.colour, linewidth=1.4)
        axes.plot([x], [mean], color=mark.colour, marker=mark.marker, markersize=7, linestyle="none")
    axes.set_xlabel("GPU hours of a run" if on_gpus else "minutes of a run (no GPU)")
    axes.yaxis.set_major_formatter("{x:.0%}" if np.ptp(axes.get_ylim()) > 0.05 else "{x:.1%}")
    axes.margins(x=0.15)
    few_ticks(axes.xaxis)


def _known(value: float | None) -> float:
    assert value is not None  # `tradeoff_plot` leaves out what is not known
    return value


def cost_plot(runs: Sequence[Run]) -> Plot | None:
    """GPU hours of each run by stage (all evaluations are one), or wall time where no GPU was used."""
    if not any(run.stages for run in runs):
        return None
    on_gpus = any(row["gpu_hours"] for run in runs for row in run.stages)
    totals: dict[str, dict[str, float]] = {run.label: defaultdict(float) for run in runs if run.stages}
    for run in runs:
        for row in run.stages:
            name = row["stage"].split()[0].partition(".")[0] if row["stage"].split() else row["stage"]
            totals[run.label][name] += row["gpu_hours"] if on_gpus else row["seconds"] / 60
    names = list(dict.fromkeys(name for found in totals.values() for name in found))
    marks = [Mark(name, COLOURS[number % 6], DASHES[0], "s") for number, name in enumerate(names)]
    title = "GPU hours by stage" if on_gpus else "minutes by stage (no GPU)"
    panel = Panel(title, partial(_draw_cost, totals=totals, marks=marks), width=4.6, height=0.8 + _ROW_INCHES * len(totals))
    return Plot(
        "cost",
        "Cost by stage",
        [panel],
        marks,
        "Of the stages that ran in the run's own folder; what runs share is in the verdict's table.",
        columns=2,
    )


def _draw_cost(axes: Any, *, totals: Mapping[str, Mapping[str, float]], marks: Sequence[Mark]) -> None:
    left = np.zeros(len(totals))
    for number, mark in enumerate(marks):
        widths = np.array([found.get(mark.label, 0.0) for found in totals.values()])
        hatch = {"hatch": "///", "edgecolor": "white", "linewidth": 0} if number >= len(COLOURS) else {}
        axes.barh(range(len(totals)), widths, left=left, color=mark.colour, height=0.65, **hatch)
        left += widths
    axes.set_yticks(range(len(totals)), short_labels(list(totals), LONGEST_LABEL))
    axes.set_ylim(len(totals) - 0.4, -0.6)
    axes.grid(False, axis="y")
