"""Prompts that most samples of one group solve and most of another do not, with a response of each, and the commands that show the rest."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.evaluate.rows import Row, read_rows
from megatron_opd.records import Prompt
from megatron_opd.report.estimates import PromptKey, over_seeds
from megatron_opd.report.verdict import Member, Result

MOST_PROMPTS = 4  # of an ordered pair of groups
MOST_PAIRS = 12
LONGEST_TEXT = 1500  # characters of a prompt or response


@dataclass(frozen=True)
class Sample:
    """A group's answer: of which run, its verdict and its response (shortened)."""

    run: str
    outcome: str
    answer: str | None
    response: str


@dataclass
class Case:
    """A prompt: share of the samples that each group got right (solver's first), what was asked and what is right, an answer of each."""

    prompt: int
    id: str | None
    shares: tuple[float, float]
    gold: str | None = None
    asked: str | None = None
    samples: list[Sample] = field(default_factory=list)


@dataclass
class Disagreement:
    """Of an evaluation: prompts that `solver` solves and `other` does not, `cases` the clearest of `total`."""

    evaluation: str
    solver: str
    other: str
    total: int
    cases: list[Case]
    commands: list[str]


def disagreements(results: Sequence[Result]) -> list[Disagreement]:
    """Of the groups of one evaluation, most prompts first. A group's majority: more than half of the mean score, over runs and samples."""
    groups = [result for result in results if result.is_group and result.means is not None]
    shares = {result.name: _shares(result) for result in groups}
    found = []
    for solver, other in permutations(groups, 2):
        here, there = shares[solver.name], shares[other.name]
        prompts = [prompt for prompt in here if prompt in there and here[prompt] > 0.5 > there[prompt]]
        prompts.sort(key=lambda prompt: (there[prompt] - here[prompt], prompt))
        if prompts:
            shown = {prompt: Case(prompt[1], None, (here[prompt], there[prompt])) for prompt in prompts[:MOST_PROMPTS]}
            entry = Disagreement(solver.evaluation, solver.name, other.name, len(prompts), list(shown.values()), [])
            found.append((entry, solver, other, shown))
    found.sort(key=lambda pair: -pair[0].total)
    found = found[:MOST_PAIRS]
    _fill_in(found)
    return [entry for entry, *_ in found]


def _shares(result: Result) -> dict[PromptKey, float]:
    return {prompt: mean for prompt, (mean, _) in over_seeds(result.means or []).items()}


def _fill_in(found: Sequence[tuple[Disagreement, Result, Result, dict[PromptKey, Case]]]) -> None:
    """Responses, out of the rows of each run once; what was asked, out of the prompt file if it is as it was."""
    members = {id(member): member for _, solver, other, _ in found for result in (solver, other) for member in result.members}
    prompts = {prompt for *_, cases in found for prompt in cases}
    rows = {key: _rows_of(member, prompts) for key, member in members.items()}
    asked = _asked(list(members.values()), prompts)
    for entry, solver, other, cases in found:
        for prompt, case in cases.items():
            picked = [_pick(result, rows, prompt, right) for result, right in ((solver, True), (other, False))]
            case.samples = [_sample(label, row) for label, row in picked if row is not None]
            case.asked = asked.get(prompt)
            for _, row in picked:
                if row is not None:
                    case.id, case.gold = row.id, None if row.gold is None else shorten(row.gold, 200)
        entry.commands = _commands(entry, solver, other, next(iter(cases)))


def _rows_of(member: Member, prompts: set[PromptKey]) -> dict[PromptKey, list[Row]]:
    found: dict[PromptKey, list[Row]] = {}
    try:
        for row in read_rows(member.run.rows(member.record["evaluation"], member.model)):
            if (key := (member.asked, row.prompt)) in prompts:
                found.setdefault(key, []).append(row)
    except UserError as error:
        print(f"report: {error}")
    return found


def _pick(result: Result, rows: dict[int, dict[PromptKey, list[Row]]], prompt: PromptKey, right: bool) -> tuple[str, Row | None]:
    """A sample with the majority's verdict, else any: the first run's first."""
    samples = [(member.run.label, row) for member in result.members for row in rows[id(member)].get(prompt, [])]
    fitting = [(label, row) for label, row in samples if (row.outcome == "right") == right]
    return next(iter(fitting or samples), ("", None))


def _sample(label: str, row: Row) -> Sample:
    return Sample(label, row.outcome, None if row.answer is None else shorten(row.answer, 200), shorten(row.response or "", LONGEST_TEXT))


def shorten(text: str, most: int) -> str:
    """The text, or its two ends with the number of characters between them: an answer stands at the end."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def _asked(members: Sequence[Member], prompts: set[PromptKey]) -> dict[PromptKey, str]:
    """Texts of the prompts out of the files that recipes name; of a set that no run's file holds any more, the first one's reason is said."""
    texts: dict[PromptKey, str] = {}
    faults: dict[str, str] = {}
    for member in members:
        wanted = {prompt for name, prompt in prompts if name == member.asked and (name, prompt) not in texts}
        if not wanted:
            continue
        try:
            found = _read_prompts(member)
        except (OSError, UserError) as error:
            what = f"report: {member.record['evaluation']}: what was asked is not shown: {member.run.label}: {error}"
            faults.setdefault(member.asked, what)
            continue
        texts |= {(member.asked, prompt.index): shorten(_text(prompt.content), LONGEST_TEXT) for prompt in found if prompt.index in wanted}
    for name, fault in faults.items():
        if not any(name == of for of, _ in texts):
            print(fault)
    return texts


def _read_prompts(member: Member) -> list[Prompt]:
    """The prompts of an evaluation as they were asked. Raises UserError where its file is not known or holds others by now."""
    settings, name = member.run.settings, f"eval.{member.record['evaluation']}"
    path = str(settings.get(f"{name}.prompts", "")).replace("{run_dir}", str(member.run.folder))
    if not path:
        raise UserError(f"the run keeps no recipe that names {name}.prompts")
    dates, seed, limit = settings.get(f"{name}.dates"), settings.get(f"{name}.subset_seed"), member.record.get("num_prompts")
    file, found = read_prompts(
        path,
        limit=limit if isinstance(limit, int) else None,
        subset_seed=seed if isinstance(seed, int) else None,
        dates=None if dates is None else (str(dates[0]), str(dates[1])),
        split="test",
        answers=False,
    )
    if file.sha256 != member.record.get("prompts_sha256"):
        raise UserError(f"{path} holds other prompts by now")
    return found


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in content)


def _commands(entry: Disagreement, solver: Result, other: Result, prompt: PromptKey) -> list[str]:
    """For a shell: all such prompts as a list, and the rollouts of the clearest one of each side."""
    asked = [next(member for member in result.members if member.asked == prompt[0]) for result in (other, solver)]
    names = " ".join(shlex.quote(f"{member.run.folder}:{member.model}") for member in asked)
    stores = [shlex.quote(str(member.run.store(entry.evaluation, member.model))) for member in asked]
    shows = [f"megatron-opd show {store} --prompt {prompt[1]}" for store in stores]
    return [f"megatron-opd compare {names} --json disagreements.json", *shows]
