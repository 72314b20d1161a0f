"""When runs have the same setting. A path is no hyperparameter: a teacher counts by its weights, other paths by where they lie from the run.

The recipes of two seeds name two prompt files, two initial students and two stores, each in its own folder, and are one experiment all the
same. What a model's weights say is better than either path: one teacher may lie in two places, and two may have lain in one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megatron_opd.report.runs import Run

ABSENT, NO_RECIPE = "(not given)", "?"
_OF_THE_PLACE = ("slurm", "engine")  # where and how it ran, not what was asked for
_STAGES = {
    "score.model": "opd_teacher",
    "generate.model": "sft_teacher",
    "rollout.sft_teacher": "sft_teacher",
}  # with their models in the lineage
Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Value:
    """Of a setting in one run. Two are the same that share a key; `beside` counts too, unless that would hide other data (`texts_of`)."""

    written: str
    keys: frozenset[Key]
    beside: tuple[str, Key] | None = None  # as it is shown then, and its key
    model: str | None = None  # the path, of a model that is known by its weights


def is_seed(name: str) -> bool:
    """Whether a setting is one: "train.seed", "eval.sums.subset_seed"."""
    last = name.rpartition(".")[2]
    return last == "seed" or last.endswith("_seed")


def shown_value(value: Any) -> str:
    return ABSENT if value is None else str(value)


def texts_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By setting, a text for each run: the same text where they have the same setting, NO_RECIPE for a run that keeps none.

    Paths in the folder that a run's folder lies in are the same if they are from there; but not where runs with the same seeds, which differ in
    nothing else, name different ones: then the data differ, and all such paths of that setting count as they are written.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings if name.partition(".")[0] not in _OF_THE_PLACE)
    teachers = [_teachers(run) for run in runs]
    values = {name: _told_by_others([_value(name, run, known) for run, known in zip(runs, teachers, strict=True)]) for name in names}
    found = {name: _texts(of_runs, beside=True) for name, of_runs in values.items()}
    found |= {name: _texts(values[name], beside=False) for name in _hiding(runs, values, found)}
    for at, run in enumerate(runs):
        for texts in found.values():
            texts[at] = texts[at] if run.settings else NO_RECIPE
    return found


def _hiding(runs: Sequence[Run], values: dict[str, list[_Value]], found: dict[str, list[str]]) -> set[str]:
    """Settings in which runs differ that would be the same in all, seeds included."""
    alike = defaultdict(list)
    for at, run in enumerate(runs):
        if run.settings:
            alike[tuple(texts[at] for texts in found.values())].append(at)
    return {
        name
        for members in alike.values()
        for name, of_runs in values.items()
        if any(not of_runs[here].keys & of_runs[there].keys for here, there in combinations(members, 2))
    }


def _texts(values: Sequence[_Value], *, beside: bool) -> list[str]:
    keys = [value.keys | {value.beside[1]} if beside and value.beside else value.keys for value in values]
    shown = [value.beside[0] if beside and value.beside else value.written for value in values]
    classes = _classes(keys)
    first = {number: classes.index(number) for number in classes}
    texts: dict[int, str] = {}
    for number, at in first.items():  # two that are shown alike are numbered
        others = sum(shown[at] == shown[other] for other in first.values() if other < at)
        texts[number] = f"{shown[at]} ({others + 1})" if others else shown[at]
    return [texts[number] for number in classes]


def _classes(keys: Sequence[frozenset[Key]]) -> list[int]:
    """A number for each, the same for those that share a key, be it over others."""
    found = list(range(len(keys)))
    holders: dict[Key, int] = {}
    for at, of_value in enumerate(keys):
        for key in of_value:
            here, there = found[holders.setdefault(key, at)], found[at]
            if here != there:
                found = [here if number == there else number for number in found]
    return found


def _value(name: str, run: Run, teachers: dict[str, dict[str, str]]) -> _Value:
    value = _resolved(run, name)
    model = _fingerprint(run, _STAGES[name]) if name in _STAGES and value is not None else None
    if model is None and isinstance(value, str):
        model = teachers.get(value)
    if model is not None:
        return _Value(f"{model['name']} ({model['weights_sha256'][:12]})", _weights(model), model=value)
    keys: frozenset[Key] = frozenset([("written", repr(value))])
    place, config = _from_parent(value, run.run_dir), ""
    if value is not None and value == run.settings.get("models.student") and (base := _fingerprint(run, "base")):
        keys, config = keys | _weights(base), base["config_sha256"]  # initial students that a seed each made have the latter in common
    return _Value(shown_value(value), keys, None if place is None else (shown_value(place), ("beside", repr(place), config)))


def _told_by_others(values: list[_Value]) -> list[_Value]:
    """A run that does not know its teacher's weights yet has those that the others know of a model at this path, if they know of one alone."""
    known = {(value.model, value) for value in values if value.model is not None}
    places = Counter(model for model, _ in known)
    told = {repr(model): value for model, value in known if places[model] == 1}
    return [next((told[key[1]] for key in value.keys if key[0] == "written" and key[1] in told), value) for value in values]


def _teachers(run: Run) -> dict[str, dict[str, str]]:
    """Fingerprints of the run's teachers by the path that its recipe has for them."""
    evaluated = [record.get("model") for record in run.evaluations if record["name"] == "teacher"]
    found: dict[str, dict[str, str]] = {}
    for path, model in (
        *((run.settings.get("models.teacher"), _checked(model)) for model in evaluated),
        *((_resolved(run, name), _fingerprint(run, role)) for name, role in reversed(_STAGES.items())),
    ):
        if isinstance(path, str) and model is not None:
            found[path] = model
    return found


def _resolved(run: Run, name: str) -> Any:
    """A setting's value; of a placeholder, and where a recipe leaves out who scores, the path of the model that it stands for."""
    value = run.settings.get(name, "{teacher}" if name in ("score.model", "generate.model") else None)
    return run.settings.get(f"models.{value[1:-1]}") if value in ("{teacher}", "{student}") else value


def _fingerprint(run: Run, role: str) -> dict[str, str] | None:
    lineage = run.facts.get("lineage")
    return _checked(lineage.get(role)) if isinstance(lineage, dict) else None


def _checked(model: Any) -> dict[str, str] | None:
    """A model's fingerprint, as far as it is needed here; None for what is none."""
    if not isinstance(model, dict):
        return None
    kept = {key: text for key in ("name", "config_sha256", "weights_sha256") if isinstance(text := model.get(key), str)}
    return kept if len(kept) == 3 else None


def _weights(model: dict[str, str]) -> frozenset[Key]:
    return frozenset([("weights", model["weights_sha256"])])


def _from_parent(value: Any, run_dir: str) -> Any:
    """A path, or a list of them, in the folder that the run's folder lies in: from there. None for any other value."""
    parent = run_dir.rstrip("/").rpartition("/")[0]
    if isinstance(value, list):
        places = [_from_parent(entry, run_dir) for entry in value]
        return None if all(place is None for place in places) else [place or entry for place, entry in zip(places, value, strict=True)]
    if isinstance(value, str) and parent and value.startswith(f"{parent}/"):
        return f"../{value.removeprefix(f'{parent}/')}"
    return None
