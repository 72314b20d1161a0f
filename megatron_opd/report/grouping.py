"""Which runs are seeds of one experiment, and what the experiments differ in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.report.runs import Run
from megatron_opd.report.settings import ABSENT, NO_RECIPE, is_seed, shown_value, texts_of


def group_runs(runs: Sequence[Run], fields: str | None) -> dict[str, list[Run]]:
    """Runs by group, in the order of the first of each; sets `Run.group`.

    `fields`: fields of the recipe, with commas between ("train.loss.name,train.lr"); runs with the same values are one group. Without them, runs
    whose recipes differ in seeds alone (`settings.texts_of`). Raises UserError for a field that no run's recipe has.
    """
    names = [name.strip() for name in (fields or "").split(",") if name.strip()]
    for name in names:
        _check_field(name, runs)
    keys = _values_of(names, runs) if names else _without_seeds(runs)
    members: dict[Any, list[Run]] = {}
    for run, key in zip(runs, keys, strict=True):
        members.setdefault(key, []).append(run)
    titles = list(members) if names else _titles(list(members.values()))
    for title, group in zip(titles, members.values(), strict=True):
        for run in group:
            run.group = title
    return dict(zip(titles, members.values(), strict=True))


def _values_of(names: Sequence[str], runs: Sequence[Run]) -> list[Any]:
    """Of each run its values of these settings."""
    texts = texts_of(runs)
    columns = [texts.get(name) or [shown_value(run.settings.get(name)) for run in runs] for name in names]
    return [", ".join(column[at] if run.settings else ABSENT for column in columns) for at, run in enumerate(runs)]


def _check_field(name: str, runs: Sequence[Run]) -> None:
    known = {key for run in runs for key in run.settings}
    if name in known:
        return
    close = difflib.get_close_matches(name, known, 3) or sorted(key for key in known if key.endswith(f".{name}"))
    have = (
        f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(sorted(known)[:5])}, ..." if known else "no run keeps one"
    )
    raise UserError(f"--group: no recipe of these runs has a field {name!r}; {have}")


def _without_seeds(runs: Sequence[Run]) -> list[Any]:
    """Of each run what is equal for runs that differ in seeds alone; a run without a recipe is like no other."""
    texts = [of_runs for name, of_runs in texts_of(runs).items() if not is_seed(name)]
    return [tuple(column[at] for column in texts) if run.settings else run.label for at, run in enumerate(runs)]


def _titles(groups: list[list[Run]]) -> list[str]:
    """A run alone has its own label; several what their labels begin with, or the values that they differ in from other groups."""
    titles = [_common(group) for group in groups]
    if all(titles) and len(set(titles)) == len(titles):
        return titles
    table = different_settings([group[0] for group in groups])
    values = [", ".join(f"{name}={texts[at]}" for name, texts in table.items()) for at in range(len(groups))]
    return [value if value and values.count(value) == 1 else group[0].label for value, group in zip(values, groups, strict=True)]


def _common(group: list[Run]) -> str:
    if len(group) == 1:
        return group[0].label
    names = {run.folder.name for run in group}
    if len(names) == 1:  # seed-0/ARM, seed-1/ARM
        return names.pop()
    first, last = min(run.label for run in group), max(run.label for run in group)  # what these two share, all do
    prefix = "".join(letter for letter, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d*$", "", prefix)


def different_settings(runs: Sequence[Run], *, seeds: bool = False) -> dict[str, list[str]]:
    """The settings that are not the same in all runs that keep a recipe, with the value of each run, in their order.

    A setting that only follows one of the recipe's models, as `eval.sums.teacher` does `models.teacher`, is left out.
    """
    found = {name: texts for name, texts in texts_of(runs).items() if (seeds or not is_seed(name)) and len(set(texts) - {NO_RECIPE}) > 1}
    models = {name: texts for name, texts in found.items() if name.startswith("models.")}
    return {name: texts for name, texts in found.items() if name in models or texts not in models.values()}
