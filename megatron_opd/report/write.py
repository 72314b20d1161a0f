"""`megatron-opd report`: the page of one or several runs, its figures as files, and its numbers for other programs."""

from __future__ import annotations

from pathlib import Path

from megatron_opd import __version__
from megatron_opd.cost.meter import provenance
from megatron_opd.report.disagreements import disagreements
from megatron_opd.report.exports import report_record, write_prompts, write_training
from megatron_opd.report.figures import plots
from megatron_opd.report.grouping import group_runs
from megatron_opd.report.interactive import NOT_INSTALLED, curves_page
from megatron_opd.report.page import Contents, html_page, markdown_page
from megatron_opd.report.runs import read_runs
from megatron_opd.report.shared_cost import find_shared
from megatron_opd.report.style import image, sheet
from megatron_opd.report.tables import tables
from megatron_opd.report.verdict import verdicts
from megatron_opd.safety.durable import make_folder, write_file, write_json


def write_report(folders: list[str], output: str | None = None, *, group: str | None = None, baseline: str | None = None) -> Path:
    """Write report.html and what lies beside it; returns the page.

    group: fields of the recipe, with commas between, whose values make groups. baseline: a group, a run or a model. Raises UserError for a folder that holds no run,
    and for a field or baseline that is not there.
    """
    runs = read_runs(folders)
    find_shared(runs)
    groups = group_runs(runs, group)
    found = verdicts(groups, baseline)
    drawn = plots(groups, found)
    apart = [entry for results in found.values() for entry in disagreements(results)]
    target = Path(output) if output else runs[0].folder / "report"
    make_folder(target)
    for plot in drawn:
        figure = sheet(plot)
        for kind in ("png", "svg"):
            write_file(target / f"{plot.name}.{kind}", image(figure, kind))
    files = {
        "report.json": "all figures with units",
        "training.csv": "a row a step",
        "prompts.csv": "a row a graded sample",
        "report.md": "tables",
    }
    write_json(target / "report.json", report_record(groups, found, apart))
    write_training(target / "training.csv", runs)
    write_prompts(target / "prompts.csv", runs)
    notes = []
    if any(run.training for run in runs):
        interactive = curves_page(groups)
        if interactive is None:
            notes.append(NOT_INSTALLED)
        else:
            write_file(target / "curves.html", interactive)
            files = {"curves.html": "training curves to zoom into", **files}
    facts = provenance()
    made = f"Made {facts['created']} by megatron-opd {__version__}" + (
        f", commit {facts['git_commit'][:12]}" if "git_commit" in facts else ""
    )
    contents = Contents(groups, found, drawn, apart, tables(runs), files, made, notes)
    write_file(target / "report.md", markdown_page(contents))
    page = target / "report.html"
    write_file(page, html_page(contents))
    print(f"report: {page}")
    return page
