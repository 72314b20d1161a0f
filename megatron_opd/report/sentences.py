"""The verdict in words and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from megatron_opd.evaluate.intervals import Interval
from megatron_opd.evaluate.wording import interval, kl_caveat, shown
from megatron_opd.report.verdict import Difference, Figure, Result, best_first, costs_of, difference

COLUMNS = [
    "group",
    "evaluation",
    "runs",
    "accuracy (95 % interval over prompts)",
    "accuracy of each seed",
    "spread of seeds, points",
    "against the baseline, points (95 % over prompts)",
    "the same (95 % over seeds)",
    "reverse KL, nat/token",
    "time of a run",
    "time with what it shares",
    "GPU hours of a run",
    "GPU hours with what it shares",
    "energy of a run's GPUs, kWh",
]
_MOST_COSTS = 4  # that the sentences name; the table has all


def verdict_table(found: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """COLUMNS and a row a group, or a model that runs began with, and evaluation. Columns that hold nothing are left out."""
    rows = [_cells(result) for results in found.values() for result in results]
    kept = [number for number in range(len(COLUMNS)) if any(row[number] for row in rows)]
    return [[row[number] for number in kept] for row in [COLUMNS, *rows]] if rows else []


def _cells(result: Result) -> list[str]:
    cost = result.cost
    several = len(result.seeds) > 1
    return [
        result.name,
        result.evaluation,
        str(len(result.members)) if result.is_group else "",
        _accuracy(result),
        ", ".join(shown(value, ".1%") for value in result.seeds.values()) if several else "",
        shown(None if result.deviation is None else 100 * result.deviation, ".1f"),
        _points(result.difference) if result.baseline is not None else "",
        ", ".join(filter(None, (_points(result.difference_seeds), result.seeds_how))),
        _reverse_kl(result),
        duration(cost.get("seconds")),
        _with_shared(result, lambda cost: duration(cost["seconds"])),
        shown(cost.get("gpu_hours") or None, ".3g"),
        _with_shared(result, lambda cost: shown(cost["gpu_hours"] or None, ".3g")) if cost.get("gpu_hours") else "",
        _energy(result),
    ]


def _with_shared(result: Result, text: Callable[[Mapping[str, float | None]], str]) -> str:
    """A figure of the whole cost; "" where no run of the result shares anything."""
    if any(member.run.unknown for member in result.members):
        return "not known" if result.is_group else ""
    return text(result.whole_cost) if result.is_group and any(member.run.shared for member in result.members) else ""


def _energy(result: Result) -> str:
    if result.cost.get("energy_kwh") is not None:
        return shown(result.cost["energy_kwh"], ".3g")
    return "not known" if result.is_group and any("energy_joules" in row for member in result.members for row in member.run.stages) else ""


def _accuracy(result: Result) -> str:
    if result.accuracy is None:
        return ""
    if len(result.members) > 1 and result.means is None:
        return f"{shown(result.accuracy['mean'], '.1%')} (no interval: rows are missing)"
    return interval(result.accuracy, ".1%")


def _points(figure: Figure | None) -> str:
    return "" if figure is None else interval(figure, ".1f", factor=100, signed=True)


def _reverse_kl(result: Result) -> str:
    if result.reverse_kl is None:
        return ""
    caveat = kl_caveat(result.members[0].record.get("sampling"))
    if len(result.members) == 1:
        text = interval(result.reverse_kl, ".4f")
    else:
        mean, low, high = (shown(result.reverse_kl[key], ".4f") for key in ("mean", "low", "high"))
        text = f"{mean} (seeds {low} to {high})"
    return f"{text}, {caveat}" if caveat else text


def headline(results: Sequence[Result]) -> list[str]:
    """Sentences on one evaluation: which group is best, how far ahead of the second and of the baseline, how sure that is, at what cost."""
    order = best_first(results)
    if not order:
        return []
    best = order[0]
    lines = [_first(best, order, results)]
    others = [other for other in order[1:2] if other is not best]
    baselines = {result.baseline for result in results if result.baseline is not None}
    others += [result for result in results if result.name in baselines and result is not best and result not in others]
    for other in others:
        if found := difference(best, other):
            lines.append(_ahead(other, found))
    if cost := _costs(order):
        lines.append(cost)
    return lines


def _first(best: Result, order: Sequence[Result], results: Sequence[Result]) -> str:
    what = f"{_accuracy(best)} right" if best.accuracy else f"reverse KL {_reverse_kl(best)} nat/token"
    who = f"{best.name} is the best of {len(order)} groups" if len(order) > 1 else best.name
    references = [f"{result.name} {_plain(result)}" for result in results if not result.is_group and _plain(result)]
    return f"{best.evaluation}: {who}: {what}" + (f" ({', '.join(references)})" if references else "") + "."


def _plain(result: Result) -> str:
    return shown(result.accuracy["mean"], ".1%") if result.accuracy else ""


def _ahead(other: Result, found: Difference) -> str:
    paired = interval(found.over_prompts.record(), ".1f", factor=100, signed=True, unit=" points")
    text = f"Against {other.name}: {paired} over {found.prompts} prompts"
    if found.over_seeds is not None:
        text += f", {_bounds(found.over_seeds)} over seeds ({found.seeds_how})"
    if found.both is not None:
        text += f", {_bounds(found.both)} over both"
    return f"{text}. {_how_sure(found, other)}"


def _bounds(figure: Interval) -> str:
    low, high = (shown(100 * value, ".1f", signed=True) for value in (figure.low, figure.high))
    return f"[{low}, {high}]"


def _how_sure(found: Difference, other: Result) -> str:
    if not _is_apart(found.over_prompts):
        return "Not decided: other prompts could reverse it."
    if not other.is_group:
        return "The choice of prompts does not explain it."
    if found.over_seeds is None or found.both is None:
        return "The choice of prompts does not explain it; what other seeds would give is not known."
    if not _is_apart(found.over_seeds):
        return "The choice of prompts does not explain it, but the spread of seeds might: run more seeds."
    if not _is_apart(found.both):
        return "Neither the choice of prompts nor the spread of seeds explains it alone, but both together might: run more seeds."
    return "The choice of prompts and the spread of seeds, both together, do not explain it."


def _is_apart(figure: Interval) -> bool:
    return math.isfinite(figure.low) and math.isfinite(figure.high) and (figure.low > 0 or figure.high < 0)


def _costs(order: Sequence[Result]) -> str:
    of_what, costs = costs_of(order)
    on_gpus = any(cost.get("gpu_hours") for cost in costs)
    known = [
        f"{result.name} {shown(cost['gpu_hours'], '.3g')} GPU hours" if on_gpus else f"{result.name} {duration(cost['seconds'])}"
        for result, cost in zip(order, costs, strict=True)
        if cost.get("seconds") is not None
    ]
    if not known:
        return ""
    parts = known[:_MOST_COSTS] + [f"{len(known) - _MOST_COSTS} more"] * (len(known) > _MOST_COSTS)
    missing = len(order) - len(known)
    rest = f"; of {missing} {'group' if missing == 1 else 'groups'} not known" if missing else ""
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(known) > _MOST_COSTS else ", ".join(parts)
    return f"Cost of a run{'' if on_gpus else ', without a GPU'}{of_what}: {text}{rest}."


def duration(seconds: float | None) -> str:
    """ "51 s", "14 min", "2.3 h"; "" for none."""
    if not seconds:
        return ""
    unit, size = next(pair for pair in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 2 * pair[1] or pair[1] == 1)
    return f"{shown(seconds / size, '.1f' if seconds < 10 * size else '.0f')} {unit}"


WHAT_INTERVALS_COVER = (
    "Intervals over prompts: prompts are independent units, differences are paired by prompt, and of several seeds the mean of each prompt over seeds counts; they "
    "say how far other prompts of the kind would change the figure for these trained models. Intervals over seeds: how far other seeds would, on these prompts: "
    "Student's t of the differences where both groups have the same seeds (paired by seed), Welch's interval where not; with two or three seeds they are wide, and should be. "
    "The verdict is of both together, whose half-widths add as squares. None is corrected for the number of comparisons. Reverse KL is with its interval over prompts of one run, of several with the lowest and the highest. The cost of a run "
    "is of the stages that ran in its own folder; with what it shares, also of those that made the store and the student that its training took from other folders. A cost of "
    "which a part was not measured is not known."
)
