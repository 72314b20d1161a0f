"""report.md, results.json, runs.csv and the figures, from what was found."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import provenance
from megatron_opd.safety.durable import write_file

from . import figures
from .arms import GROUPS, in_order
from .estimates import Estimate
from .results import COMPONENTS, Found, Run, start_name
from .subject import ARITHMETIC, Subject


def write(found: Found, folder: Path) -> None:
    """Replace the results in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = facts(found)
    write_file(folder / "results.json", json.dumps(about | results(found), indent=1) + "\n")
    write_file(folder / "runs.csv", runs_csv(found))
    drawn = figures.draw(found, folder)
    write_file(folder / "report.md", report(found, about, drawn))


def facts(found: Found) -> dict[str, Any]:
    """How and where it was made."""
    seeds = sorted({run.seed for run in found.runs})
    return {
        "command": command(found.subject, sys.argv[1:]),
        **provenance(),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "load_average": round(os.getloadavg()[0], 1)},
        "settings": found.settings,
        "seeds": seeds,
        "cpu_seconds": round(found.seconds, 1),
        "resumed_jobs": sum(run.resumed_jobs for run in found.runs),
        "commits_of_jobs": found.commits,
    }


def command(subject: Subject, words: Sequence[str]) -> str:
    """The words of the command line as they are typed; `make` gives the subject itself."""
    target = "study" if subject is ARITHMETIC else f"study-{subject.name}"
    given = shlex.join(words).removeprefix(f"--subject {subject.name}").strip()
    return f"make {target}" + (f" STUDY_ARGS={shlex.quote(given)}" if given else "")


def results(found: Found) -> dict[str, Any]:
    arms = {}
    columns = _column_shares(found)
    for name, title, group in _rows(found):
        estimates = {figure: found.estimate(name, figure) for figure in ("accuracy", "reverse_kl", "kl_to_ref")}
        figures_ = {figure: estimate.record() for figure, estimate in estimates.items() if estimate is not None}
        means = {figure: found.mean(name, figure) for figure in _MEANS}
        seconds = {part: sum(run.cpu_seconds[part] for run in found.of(name)) / len(found.of(name)) for part in COMPONENTS}
        arms[name] = {"title": title, "group": group, **figures_, **means, "cpu_seconds": seconds}
        arms[name] |= {"columns": columns[name]} if name in columns else {}
    differences = [{"arm": arm, "against": against, "accuracy": estimate.record()} for arm, against, estimate in found.differences()]
    teachers = {name: {"accuracy_by_seed": [interval[0] for interval in intervals]} for name, intervals in found.teachers.items()}
    return {"teachers": teachers, "arms": arms, "differences": differences}


_MEANS = ("stopped_share", "steps", "sft_tokens", "scored_tokens", "sampled_tokens", "trained_tokens", "distilling", "teacher_seconds")


def runs_csv(found: Found) -> str:
    text = io.StringIO()
    names = ["arm", "seed", *(f"{figure}{end}" for figure in ("accuracy", "reverse_kl", "kl_to_ref") for end in ("", "_low", "_high"))]
    names += [*_MEANS, "resumed_jobs", *(f"cpu_{part}" for part in COMPONENTS), "commits", "folder"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    for run in found.runs:
        intervals = [value for figure in (run.accuracy, run.reverse_kl, run.kl_to_ref) for value in figure]
        costs = [run.resumed_jobs, *(run.cpu_seconds[part] for part in COMPONENTS)]
        numbers = map(_short, [*intervals, *(getattr(run, name) for name in _MEANS), *costs])
        table.writerow([run.arm, run.seed, *numbers, " ".join(run.commits), run.folder])
    return text.getvalue()


def report(found: Found, about: dict[str, Any], drawn: Sequence[Path]) -> str:
    seeds = about["seeds"]
    covers = "seeds and prompts (Student's t over the seeds)" if len(seeds) > 1 else "the prompts of this one seed alone, not seeds"
    machine = about["machine"]
    lines = [
        "# The study's results",
        "",
        f"`{about['command']}`, {about['created'][:10]}, commit {' and '.join(commit[:12] for commit in found.commits)}, {machine['cores']} cores "
        f"({machine['processor']}), torch {about['versions'].get('torch', '?')}. {len(seeds)} seed{'s' if len(seeds) > 1 else ''}. "
        f"{about['cpu_seconds']:,.0f} s of CPU time in all. What the columns are, and what it means: [study.md](../../study.md).",
        "",
        *_mixture(found),
        f"95 % intervals cover {covers}.",
        "",
        *_teachers(found),
    ]
    for group, title in GROUPS.items():
        names = [(name, words) for name, words, of in _rows(found) if of == group]
        if names:
            lines += ["", f"## {title}", "", *table(_QUALITY, found, names), "", *table(_COST, found, names)]
    lines += ["", "## Differences of accuracy, each paired by seed and prompt", "", *_differences(found), ""]
    if _column_shares(found):
        lines += ["## How the columns are written", "", *_columns(found), ""]
    for path in drawn:
        lines += [f"![{path.stem}]({path.name})", ""]
    return "\n".join(lines)


def _mixture(found: Found) -> list[str]:
    if len(found.commits) < 2:
        return []
    jobs = ", ".join(f"{commit[:12]} ({count})" for commit, count in found.commits.items())
    return [f"**The jobs were run by the code of {len(found.commits)} commits**: {jobs}. Those of each arm and seed are in runs.csv.", ""]


def table(columns: dict[str, Callable[[Found, str], str]], found: Found, names: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"| arm | | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for name, words in names:
        lines.append(f"| `{name}` | {words} | {' | '.join(cell(found, name) for cell in columns.values())} |")
    return lines


def _estimate(figure: str, form: str) -> Callable[[Found, str], str]:
    def cell(found: Found, arm: str) -> str:
        estimate = found.estimate(arm, figure)
        assert estimate is not None
        return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"

    return cell


def _mean(figure: str, form: str) -> Callable[[Found, str], str]:
    return lambda found, arm: f"{found.mean(arm, figure):{form}}"


def _seconds(*parts: str) -> Callable[[Found, str], str]:
    def cell(found: Found, arm: str) -> str:
        runs: list[Run] = found.of(arm)
        return ", ".join(f"{sum(run.cpu_seconds[part] for run in runs) / len(runs):.0f}" for part in parts)

    return cell


_QUALITY = {
    "seeds": lambda found, arm: str(len(found.of(arm))),
    "accuracy": _estimate("accuracy", ".1%"),
    "reverse KL to the OPD teacher, nat/token": _estimate("reverse_kl", ".4f"),
    "KL to pi_ref, nat/token": _estimate("kl_to_ref", ".4f"),
    "ended by itself": _mean("stopped_share", ".1%"),
}
_COST = {
    "steps": _mean("steps", ".0f"),
    "tokens: SFT answers, scored, sampled, trained": lambda found, arm: ", ".join(
        f"{found.mean(arm, name):,.0f}" for name in ("sft_tokens", "scored_tokens", "sampled_tokens", "trained_tokens")
    ),
    "CPU s: SFT answers and others of the teacher, SFT": _seconds("generate", "sft"),
    "rollout, score, derive, train, rounds, convert": _seconds("rollout", "score", "derive", "train", "rounds", "convert"),
    "evaluation": _seconds("eval"),
    "distillation, all": _mean("distilling", ".0f"),
    "with a teacher held": _mean("teacher_seconds", ".0f"),
}


def _rows(found: Found) -> list[tuple[str, str, str]]:
    """Name, words and group of what has results, in the order of the report."""
    starts = [(start_name(student), f"SFT({student.upper()})", "start") for student in ("a", "b")]
    rows = [*starts, *((arm.name, arm.title, arm.group) for arm in in_order(found.arms))]
    return [row for row in rows if found.of(row[0])]


def _teachers(found: Found) -> list[str]:
    lines = [
        "| teacher | accuracy | reverse KL to it of the student of the other teacher's answers, before distillation, nat/token |",
        "|---|---|---|",
    ]
    for teacher, intervals in sorted(found.teachers.items()):
        mean = sum(interval.mean for interval in intervals) / len(intervals)
        other = found.other.get("b" if teacher == "a" else "a")
        distance = f"{sum(interval.mean for interval in other) / len(other):.3f}" if other else "-"
        lines.append(f"| {teacher.upper()} | {mean:.1%} | {distance} |")
    return lines


def _differences(found: Found) -> list[str]:
    lines = ["| arm | against | seeds | points (95 % interval) | half a width of the prompts' alone |", "|---|---|---|---|---|"]
    lines += [
        f"| `{arm}` | `{against}` | {estimate.seeds} | {_points(estimate)} | {100 * estimate.prompts:.1f} |"
        for arm, against, estimate in found.differences()
    ]
    return lines


def _columns(found: Found) -> list[str]:
    lines = [
        "Of columns whose two digits differ: the left number's digit first, as A writes; the right one's first; other digits than the prompt's.",
        "",
        "| arm | left first | right first | other digits | sum of the written digits right |",
        "|---|---|---|---|---|",
    ]
    for arm, shares in _column_shares(found).items():
        lines.append(f"| `{arm}` | {' | '.join(f'{share:.1%}' for share in shares.values())} |")
    return lines


def _column_shares(found: Found) -> dict[str, dict[str, float]]:
    """Means over seeds, by arm; of a study of additions."""
    runs = {name: [asdict(run.columns) for run in found.of(name) if run.columns is not None] for name, _, _ in _rows(found)}
    return {name: {key: sum(one[key] for one in of) / len(of) for key in of[0]} for name, of in runs.items() if of}


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _short(value: float) -> str:
    return f"{value:.6g}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
