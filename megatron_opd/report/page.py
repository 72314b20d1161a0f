"""The page: verdict first, then what differs, figures, prompts on which groups disagree, the runs, and all tables. One file, no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from megatron_opd.evaluate.wording import shown
from megatron_opd.report.disagreements import LONGEST_TEXT, MOST_PAIRS, MOST_PROMPTS, Case, Disagreement
from megatron_opd.report.lineage_rows import mixed_groups, run_facts, settings_table
from megatron_opd.report.markup import html_table, markdown, markdown_text
from megatron_opd.report.runs import Run
from megatron_opd.report.sentences import WHAT_INTERVALS_COVER, headline, verdict_table
from megatron_opd.report.settings import shown_value
from megatron_opd.report.style import Mark, Plot, inline, single
from megatron_opd.report.tables import Table
from megatron_opd.report.verdict import Result
from megatron_opd.safety.page_policy import page_policy

_FIRST = ("results", "tradeoff")  # figures that stand beside the verdict
_MANY = 4  # runs from which a page is titled by their number
_LONGEST_TITLE = 120  # characters


@dataclass
class Contents:
    """All that a page shows. files: what was written beside it, with what it is. made: when and by what. notes: what is missing."""

    groups: Mapping[str, Sequence[Run]]
    verdicts: Mapping[str, Sequence[Result]]
    plots: Sequence[Plot]
    disagreements: Sequence[Disagreement]
    tables: Sequence[tuple[str, Table]]
    files: Mapping[str, str]
    made: str
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for members in self.groups.values() for run in members]

    @property
    def title(self) -> str:
        names = [run.label for run in self.runs]
        groups = ", ".join(self.groups)
        if len(names) < _MANY:
            return ", ".join(names)
        return f"{len(names)} runs: {groups}" if len(groups) <= _LONGEST_TITLE else f"{len(names)} runs in {len(self.groups)} groups"


def html_page(contents: Contents) -> str:
    text = html.escape
    title = text(contents.title)
    style = (resources.files("megatron_opd.report") / "page.css").read_text(encoding="utf-8")
    policy = page_policy(styles=[style], style_attributes=True)
    links = " · ".join(f'<a href="{text(name)}">{text(name)}</a> ({text(what)})' for name, what in contents.files.items())
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content={_quoted(policy)}>",
        f"<meta name=viewport content='width=device-width,initial-scale=1'><title>{title}</title>",
        f"<style>{style}</style><h1>{title}</h1>",
        f"<p class=note>{text(contents.made)}. Beside this page: {links}.</p>",
        *(f"<p class=note>{text(note)}</p>" for note in contents.notes),
        _verdict(contents),
        _settings(contents),
        *(_figures(plot) for plot in contents.plots if plot.name not in _FIRST),
        _disagreements(contents.disagreements),
        _runs(contents.runs),
        *(f"<h2>{text(name)}</h2>{html_table(rows)}" for name, rows in contents.tables),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def markdown_page(contents: Contents) -> str:
    """Verdict, settings and tables, for places that show no page."""
    sections = [(title, rows) for title, rows in contents.tables]
    if len(settings := settings_table(contents.groups)) > 1:
        sections.insert(0, ("Settings that differ", settings))
    if rows := verdict_table(contents.verdicts):
        sections.insert(0, ("Verdict", rows))
    sentences = [markdown_text(line) for results in contents.verdicts.values() for line in headline(results)]
    head = "".join(f"{line}\n\n" for line in sentences)
    return head + "\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in sections) + "\n"


def _verdict(contents: Contents) -> str:
    found = [headline(results) for results in contents.verdicts.values()]
    boxes = ["<div class=verdict>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines) + "</div>" for lines in found if lines]
    rows = verdict_table(contents.verdicts)
    if not rows:
        return ""
    notes = list(dict.fromkeys(note for results in contents.verdicts.values() for result in results for note in result.notes))
    notes = [f"Baseline: {', '.join(names)}." for names in [_baselines(contents.verdicts)] if names] + mixed_groups(contents.groups) + notes
    figures = [_figures(plot) for plot in contents.plots if plot.name in _FIRST]
    explained = f"<p class=note>{html.escape(WHAT_INTERVALS_COVER)}</p>"
    return "".join(
        ["<h2>Verdict</h2>", *boxes, html_table(rows), *(f"<p class=note>{html.escape(note)}</p>" for note in notes), explained, *figures]
    )


def _baselines(verdicts: Mapping[str, Sequence[Result]]) -> list[str]:
    return list(dict.fromkeys(result.baseline for results in verdicts.values() for result in results if result.baseline is not None))


def _settings(contents: Contents) -> str:
    rows = settings_table(contents.groups)
    without = [run.label for run in contents.runs if not run.settings]
    note = f"<p class=note>No recipe is kept of {html.escape(', '.join(without))}.</p>" if without else ""
    if len(rows) > 1:
        return f"<h2>Settings that differ</h2>{html_table(rows)}<p class=note>All others of the recipes are the same.</p>{note}"
    return note if len(contents.runs) > 1 else ""


def _figures(plot: Plot) -> str:
    panels = [f"<figure>{inline(single(panel), f'{plot.name}-{number}-')}</figure>" for number, panel in enumerate(plot.panels)]
    names = ", ".join(panel.title for panel in plot.panels)
    legend = f"<ul class=legend>{''.join(map(_legend, plot.legend))}</ul>" if plot.legend else ""
    note = f"<p class=note>{html.escape(plot.note)}</p>" if plot.note else ""
    arrangement = "panels" if plot.columns > 2 else "panels wide"
    return f"<h2>{html.escape(plot.title)}</h2>{legend}<div class={_quoted(arrangement)} role=img aria-label={_quoted(names)}>{''.join(panels)}</div>{note}"


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'


def _legend(mark: Mark) -> str:
    dash = "" if isinstance(mark.dash, str) else f' stroke-dasharray="{" ".join(str(2 * length) for length in mark.dash[1])}"'
    line = f'<svg viewBox="0 0 30 12" aria-hidden=true><path d="M0 6H30" stroke="{mark.colour}" stroke-width="3"{dash}/></svg>'
    return f"<li>{line}{html.escape(mark.label)}</li>"


def _disagreements(found: Sequence[Disagreement]) -> str:
    if not found:
        return ""
    note = (
        f"Solved: by more than half of a group's samples, all runs together. Of each pair at most {MOST_PROMPTS} prompts, the clearest first, of at most {MOST_PAIRS} pairs; "
        f"texts longer than {LONGEST_TEXT:,} characters are shown by their two ends. The commands list all of them, and show the rollouts token by token."
    )
    return f"<h2>Where groups disagree</h2><p class=note>{html.escape(note)}</p>" + "".join(map(_disagreement, found))


def _disagreement(entry: Disagreement) -> str:
    text = html.escape
    head = f"{entry.evaluation}: {entry.total} prompt{'s' * (entry.total > 1)} that {entry.solver} solves and {entry.other} does not"
    commands = f"<pre class=command tabindex=0>{text(chr(10).join(entry.commands))}</pre>"
    return f"<details><summary>{text(head)}</summary>{commands}{''.join(_case(entry, case) for case in entry.cases)}</details>"


def _case(entry: Disagreement, case: Case) -> str:
    text = html.escape
    name = f"prompt {case.prompt}" + (f" ({case.id})" if case.id else "")
    asked = f"<pre tabindex=0>{text(case.asked)}</pre>" if case.asked is not None else ""
    gold = f"<p>Right: <b>{text(case.gold)}</b></p>" if case.gold is not None else ""
    sides = [
        f"<div><p>{text(group)} ({shown(share, '.0%')} right), {text(sample.run)}: <span class={'right' if sample.outcome == 'right' else 'wrong'}>"
        f"{text(sample.outcome)}</span>{'' if sample.answer is None else f', answer {text(sample.answer)}'}</p>"
        f"<pre tabindex=0>{text(sample.response)}</pre></div>"
        for group, share, sample in zip((entry.solver, entry.other), case.shares, case.samples, strict=False)
    ]
    return f"<h3>{text(name)}</h3>{asked}{gold}<div class=sides>{''.join(sides)}</div>"


def _runs(runs: Sequence[Run]) -> str:
    return "<h2>Runs</h2>" + "".join(map(_run, runs))


def _run(run: Run) -> str:
    rows = [["", ""], *run_facts(run)]
    settings = "\n".join(f"{name} = {shown_value(value)}" for name, value in run.settings.items())
    kept = f"<details><summary>all settings</summary><pre tabindex=0>{html.escape(settings)}</pre></details>" if settings else ""
    return f"<details><summary>{html.escape(run.label)}</summary>{html_table(rows)}{kept}</details>"
