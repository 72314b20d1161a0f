"""What the runs came to: of each group accuracy, difference from the baseline, reverse KL and cost, and what may be said of the best."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.evaluate.compare import read_graded
from megatron_opd.evaluate.intervals import Interval
from megatron_opd.evaluate.passk import prompt_means
from megatron_opd.evaluate.settings import differences
from megatron_opd.recipe.evaluation import model_order
from megatron_opd.report.estimates import PromptKey, PromptMeans, mean_interval, over_seeds, paired_difference, seed_interval
from megatron_opd.report.runs import Run
from megatron_opd.report.settings import is_seed
from megatron_opd.report.shared_cost import whole_cost

_ASKED = ("prompts_sha256", "answers_sha256")  # without which samples of two models can't be paired
Figure = dict[str, float | None]


@dataclass
class Member:
    """One run's model in one evaluation. means: mean score by prompt (`asked`, index), None where its rows can't be read."""

    run: Run
    model: str
    record: dict[str, Any]
    means: PromptMeans | None = None

    @property
    def asked(self) -> str:
        """Tells sets of prompts, with their answers, apart."""
        return " ".join(str(self.record.get(key)) for key in _ASKED)

    @property
    def accuracy(self) -> float | None:
        return self.record["accuracy"]["mean"] if "accuracy" in self.record else None


@dataclass
class Result:
    """A line of the verdict: a group's models (or a model that runs began with) in one evaluation. Figures have mean, low, high.

    accuracy: over prompts. seeds: the accuracy of each run, by label. deviation: between seeds. difference, difference_seeds: from `baseline`, over prompts and
    over seeds, both as shares; seeds_how: "paired by seed" or "Welch". reverse_kl: nat/token; of one run with its interval, of several with the lowest and the highest. cost: means of a run;
    whole_cost: with what it shares with others.
    """

    evaluation: str
    name: str
    is_group: bool
    members: list[Member]
    accuracy: Figure | None = None
    seeds: dict[str, float] = field(default_factory=dict)
    deviation: float | None = None
    difference: Figure | None = None
    difference_seeds: Figure | None = None
    seeds_how: str | None = None
    num_prompts: int | None = None
    baseline: str | None = None
    reverse_kl: Figure | None = None
    cost: dict[str, float | None] = field(default_factory=dict)
    whole_cost: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def means(self) -> list[PromptMeans] | None:
        """Of each run; None where not all of them have rows."""
        found = [member.means for member in self.members if member.means is not None]
        return found if found and len(found) == len(self.members) else None


def verdicts(groups: Mapping[str, Sequence[Run]], baseline: str | None) -> dict[str, list[Result]]:
    """By evaluation: models that runs began with first, then the groups. `baseline`: a group, a run, or such a model ("sft"); by default the first group.

    Raises UserError for a baseline that is none of these.
    """
    names = dict.fromkeys(record["evaluation"] for runs in groups.values() for run in runs for record in run.evaluations)
    found = {name: _results(name, groups) for name in names}
    found = {name: results for name, results in found.items() if results}
    if baseline is not None:
        _check_baseline(baseline, groups, found)
    for results in found.values():
        against = _baseline_of(results, baseline)
        for result in results:
            _estimate(result)
        if against is not None:
            _estimate(against)
            for result in results:
                _compare(result, against)
    return found


def _results(evaluation: str, groups: Mapping[str, Sequence[Run]]) -> list[Result]:
    runs = [run for members in groups.values() for run in members]
    results = [
        Result(evaluation, group, True, _members(evaluation, [(run, run.student) for run in members])) for group, members in groups.items()
    ]
    results = [*_references(evaluation, runs), *(result for result in results if result.members)]
    graded = [member for result in results for member in result.members if "grader" in member.record]
    if graded:
        like = max(graded, key=lambda member: sum(member.record["grader"] == other.record["grader"] for other in graded))
        for result in results:
            for member in result.members:
                _read_rows(member, like, result)
    sets = {member.asked for result in results for member in result.members if result.is_group and member.means is not None}
    if len(sets) > 1:
        results[0].notes.append(
            f"{evaluation}: the runs were asked {len(sets)} different sets of prompts. A group's accuracy is over the prompts of all its runs, a difference over "
            "the sets that both were asked; the interval over seeds is over their prompts as well."
        )
    return results


def _members(evaluation: str, models: Sequence[tuple[Run, str | None]]) -> list[Member]:
    found = [(run, model, run.record(evaluation, model)) for run, model in models if model is not None]
    return [Member(run, model, record) for run, model, record in found if record is not None]


def _references(evaluation: str, runs: Sequence[Run]) -> list[Result]:
    """Models beside the students of the runs, each once: several runs may have begun with one, and each have asked it its own prompts."""
    found: dict[Any, Result] = {}
    for run in runs:
        names = dict.fromkeys(record["name"] for record in run.evaluations if record["name"] != run.student)
        for member in _members(evaluation, [(run, name) for name in names]):
            model = member.record.get("model")
            weights = model.get("weights_sha256") if isinstance(model, dict) else None
            result = found.setdefault((member.model, weights or run.label), Result(evaluation, member.model, False, []))
            if member.asked not in {other.asked for other in result.members}:
                result.members.append(member)
    names = [result.name for result in found.values()]
    for result in found.values():
        if names.count(result.name) > 1:
            result.name = f"{result.members[0].run.label}: {result.name}"
    return sorted(found.values(), key=lambda result: model_order(result.members[0].model))


def _read_rows(member: Member, like: Member, result: Result) -> None:
    if found := differences(like.record, member.record, ["grader"]):
        result.notes.append(f"{member.run.label} {member.model}: other {', '.join(found.values())} than {like.run.label}; not compared")
        return
    try:
        samples = read_graded(member.run.rows(result.evaluation, member.model))[1]
        member.means = {(member.asked, prompt): total for prompt, (total, _) in prompt_means(samples).items()} or None
    except (OSError, UserError) as error:
        if "grader" in member.record:
            result.notes.append(f"{member.run.label} {member.model}: not paired by prompt: {error}")


def _check_baseline(name: str, groups: Mapping[str, Sequence[Run]], found: Mapping[str, list[Result]]) -> None:
    known = [*groups, *(run.label for runs in groups.values() for run in runs)]
    known += [result.name for results in found.values() for result in results if not result.is_group]
    if name not in known:
        raise UserError(
            f"--baseline: {name!r} is neither a group nor a run nor a model that was evaluated; there are {', '.join(dict.fromkeys(known))}"
        )


def _baseline_of(results: Sequence[Result], name: str | None) -> Result | None:
    groups = [result for result in results if result.is_group]
    if name is None:
        references = [result for result in results if result.members[0].model == "sft" and not result.is_group]
        return groups[0] if len(groups) > 1 else references[0] if references else None
    for result in results:
        if result.name == name:
            return result
    for result in groups:  # a run of a group of several
        for member in result.members:
            if member.run.label == name:
                return Result(result.evaluation, name, True, [member])
    return None


def _estimate(result: Result) -> None:
    graded = {member.run.label: member.accuracy for member in result.members if member.accuracy is not None}
    result.seeds = {label: value for label, value in graded.items() if value is not None}
    values = list(result.seeds.values())
    if len(result.members) == 1:
        result.accuracy = result.members[0].record.get("accuracy")
    elif result.means is not None:
        result.accuracy = mean_interval(result.means).record()
    elif values:
        result.accuracy = {"mean": sum(values) / len(values), "low": None, "high": None}
    if len(values) > 1:
        result.deviation = stdev(values)
    result.reverse_kl = _reverse_kl(result)
    if result.is_group:
        result.cost = _mean_cost([member.run.cost() for member in result.members])
        result.whole_cost = _mean_cost([whole_cost(member.run) for member in result.members])


def _reverse_kl(result: Result) -> Figure | None:
    figures = [member.record["reverse_kl"] for member in result.members if "reverse_kl" in member.record]
    if not figures:
        return None
    if len(figures) == 1:
        return {key: figures[0].get(key) for key in ("mean", "low", "high")}
    means = [figure["mean"] for figure in figures]
    return {"mean": sum(means) / len(means), "low": min(means), "high": max(means)}


def _mean_cost(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {key: _mean([cost[key] for cost in costs]) for key in costs[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _compare(result: Result, against: Result) -> None:
    if result is against or result.name == against.name:
        return
    known = [member.asked for member in against.members]
    for member in result.members if result.means and against.means else []:
        if member.asked not in known:
            first = against.members[0]
            other = ", ".join(differences(first.record, member.record, _ASKED).values())
            result.notes.append(f"{member.run.label} {member.model}: other {other} than {first.run.label}; not compared")
    if found := difference(result, against):
        result.baseline = against.name
        result.difference, result.num_prompts = found.over_prompts.record(), found.prompts
        if found.over_seeds is not None:
            result.difference_seeds, result.seeds_how = found.over_seeds.record(), found.seeds_how


@dataclass(frozen=True)
class Difference:
    """Of the accuracies of two results, over prompts and, between groups that have several seeds each, over seeds."""

    over_prompts: Interval
    prompts: int
    over_seeds: Interval | None = None
    seeds_how: str | None = None

    @property
    def both(self) -> Interval | None:
        """Over prompts and seeds: the two are independent, so their half-widths add as squares."""
        if self.over_seeds is None:
            return None
        mean, half = self.over_prompts.mean, math.hypot(*((found.high - found.low) / 2 for found in (self.over_prompts, self.over_seeds)))
        return Interval(mean, mean - half, mean + half)


def difference(result: Result, against: Result) -> Difference | None:
    """Accuracy of `result` minus that of `against`, on the prompts that both were asked. None where there are none, or rows are missing."""
    later, earlier = result.means, against.means
    if later is None or earlier is None or not (common := over_seeds(later).keys() & over_seeds(earlier).keys()):
        return None
    paired, prompts = paired_difference(later, earlier)
    if not (result.is_group and against.is_group):
        return Difference(paired, prompts)
    seeds = _seeds([*result.members, *against.members])
    figures = [_mean_over(means, common & means.keys()) for means in (*later, *earlier)]
    by_seed = list(zip(seeds, figures, strict=True))
    found = seed_interval(
        *({seed: figure for seed, figure in side if figure is not None} for side in (by_seed[: len(later)], by_seed[len(later) :]))
    )
    return Difference(paired, prompts, *(found or (None, None)))


def _mean_over(means: PromptMeans, prompts: Iterable[PromptKey]) -> float | None:
    """None where there are no prompts."""
    values = [means[prompt] for prompt in prompts]
    return math.fsum(values) / len(values) if values else None


def _seeds(members: Sequence[Member]) -> list[Hashable]:
    """What tells the seeds of these runs apart: the values of the seeds that all their recipes have; where they don't, each run is its own."""
    shared = set.intersection(*({name for name in member.run.settings if is_seed(name)} for member in members))
    return [tuple((name, member.run.settings[name]) for name in sorted(shared)) for member in members]


def costs_of(results: Sequence[Result]) -> tuple[str, list[dict[str, float | None]]]:
    """Costs by which groups can be compared, and what they are of: with what the runs share where that is known of all, else without."""
    if all(result.whole_cost.get("seconds") is not None for result in results):
        shares = any(member.run.shared for result in results for member in result.members)
        return ", with what it shares with others" if shares else "", [result.whole_cost for result in results]
    unknown = any(member.run.unknown for result in results for member in result.members)
    return ", without what it shares with others" if unknown else "", [result.cost for result in results]


def best_first(results: Sequence[Result]) -> list[Result]:
    """The groups of an evaluation, by accuracy, or by reverse KL where nothing was graded."""
    groups = [result for result in results if result.is_group]
    graded = [(-mean, result) for result in groups if (mean := _mean_of(result.accuracy)) is not None]
    scored = [(mean, result) for result in groups if (mean := _mean_of(result.reverse_kl)) is not None]
    return [result for _, result in sorted(graded or scored, key=lambda entry: entry[0])]


def _mean_of(figure: Figure | None) -> float | None:
    return None if figure is None else figure["mean"]
