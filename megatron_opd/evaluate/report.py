"""report: figures and tables of one or several runs: PNG, Markdown, and one HTML page with the figures inside."""

from __future__ import annotations

import base64
import html
import os
import re
from pathlib import Path
from typing import Any

from megatron_opd.durable import make_folder, write_file
from megatron_opd.evaluate.figures import distils, draw, kl_by_position, window
from megatron_opd.evaluate.rounds_table import ROUND_COLUMNS, round_rows
from megatron_opd.evaluate.run_files import read_run
from megatron_opd.evaluate.wording import interval, kl_caveat, shown


def write_report(runs: list[str], output: str | None = None) -> Path:
    """Write report.html, report.md and PNG figures; returns the page. Raises UserError for a folder that holds no run."""
    different: dict[Path, Path] = {}
    for run in runs:
        different.setdefault(Path(os.path.realpath(run)), Path(run))
    folders = list(different.values())
    if len(folders) < len(runs):
        print(f"report: {len(runs)} folders were given, but only {len(folders)} different ones; each is shown once")
    names = [folder.name for folder in different]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    data = {label: read_run(folder) for label, folder in zip(labels, folders, strict=True)}
    target = Path(output) if output else folders[0] / "report"
    make_folder(target)
    figures = draw(data, target)
    tables = _tables(data)
    write_file(target / "report.md", "\n\n".join(f"## {title}\n\n{_markdown(rows)}" for title, rows in tables) + "\n")
    page = target / "report.html"
    write_file(page, _page(data, tables, figures))
    print(f"report: {page}")
    return page


def _tables(data: dict[str, dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    results = [
        [
            "run",
            "model",
            "accuracy (95 % interval)",
            "reverse KL to the teacher, nat/token (95 % interval)",
            "tokens a response",
            "ended by itself",
        ]
    ]
    differences = [["run", "model", "against", "accuracy, points (95 % interval)", "reverse KL, nat/token (95 % interval)", "prompts"]]
    training = [["run", "stage", *TRAINING_COLUMNS]]
    stages = [["run", "stage", "seconds", "tokens", "tokens/s", "GPU hours", "energy, kWh"]]
    for run, content in data.items():
        results += [[run, *evaluation_cells(evaluation)] for evaluation in content["evaluations"]]
        differences += [[run, *difference_cells(evaluation)] for evaluation in content["evaluations"] if "against" in evaluation]
        training += [[run, stage, *training_cells(rows)] for stage, rows in content["training"].items()]
        stages += [[run, *stage_cells(row), shown(_kwh(row), ".2f")] for row in content["stages"]]
        if len(content["stages"]) > 1:
            stages.append([run, *stage_cells(_total(content["stages"])), shown(_kwh(_total(content["stages"])), ".2f")])
    rounds = [["run", *ROUND_COLUMNS]]
    for run, content in data.items():
        rounds += [[run, *row] for row in round_rows(content["stages"], content["training"].get("opd", []))]
    tables = (
        ("Results", results),
        ("Differences, paired by prompt", differences),
        ("Training", training),
        ("Rounds", rounds),
        ("Stages", stages),
    )
    return [(title, rows) for title, rows in tables if len(rows) > 1]


def evaluation_cells(evaluation: dict[str, Any]) -> list[str]:
    """name, accuracy, reverse KL, response length, stopped share."""
    accuracy = interval(evaluation["accuracy"], ".1%") if "accuracy" in evaluation else ""
    grading = evaluation.get("grading")
    if accuracy and isinstance(grading, dict):
        accuracy += "".join(
            f", {grading[key]} {text}" for key, text in (("timeouts", "timed out"), ("errors", "failed")) if grading.get(key)
        )
    return [
        evaluation["name"],
        accuracy,
        _with_caveat(interval(evaluation["reverse_kl"], ".4f"), evaluation) if "reverse_kl" in evaluation else "",
        shown(evaluation["response_length"], ".0f"),
        shown(evaluation["stopped_share"], ".1%"),
    ]


def difference_cells(evaluation: dict[str, Any]) -> list[str]:
    """name, baseline, change of accuracy and of reverse KL, number of prompts."""
    against = evaluation["against"]
    return [
        evaluation["name"],
        against["name"],
        interval(against["accuracy"], ".1f", factor=100, signed=True) if "accuracy" in against else "",
        _with_caveat(interval(against["reverse_kl"], ".4f", signed=True), evaluation) if "reverse_kl" in against else "",
        str(against["num_prompts"]),
    ]


def _with_caveat(cell: str, evaluation: dict[str, Any]) -> str:
    caveat = kl_caveat(evaluation.get("sampling"))
    return f"{cell}, {caveat}" if caveat else cell


TRAINING_COLUMNS = (
    "steps (skipped)", "loss", "reverse KL, nat/token", "KL at 1st, 16th, 256th, 4096th token", "entropy, nat", "tokens a response",
    "effective share", "tokens/s", "MFU", "memory, GiB",
)  # fmt: skip


def training_cells(rows: list[dict[str, Any]]) -> list[str]:
    """The columns above; "a -> b" are means over the first and the last tenth of the steps."""
    start, end = window(rows, end=False), window(rows, end=True)
    distilled = distils(rows)

    def change(key: str, form: str) -> str:
        return f"{shown(_mean(start, key), form)} -> {shown(_mean(end, key), form)}"

    positions = kl_by_position(end)
    return [
        f"{rows[-1]['step']} ({sum(bool(row.get('skipped')) for row in rows)})",
        change("loss", ".4f"),
        change("reverse_kl", ".4f") if distilled else "",
        ", ".join(shown(positions[p], ".3f") if p < len(positions) else "-" for p in (0, 4, 8, 12)) if distilled else "",
        change("entropy", ".3f"),
        shown(_mean(rows, "response_length"), ".0f"),
        change("effective_sample_share", ".0%") if distilled else "",
        shown(_mean(rows, "tokens_per_second"), ",.0f"),
        shown(_mean(rows, "model_flops_utilisation"), ".1%"),
        shown(max((row["memory_gib"] for row in rows if row.get("memory_gib") is not None), default=None), ".1f"),
    ]


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Mean of the rows that have a value (a skipped step has none)."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _kwh(row: dict[str, Any]) -> float | None:
    return row["energy_joules"] / 3.6e6 if "energy_joules" in row else None


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"stage": "all", **{key: sum(row[key] for row in rows) for key in ("seconds", "tokens", "gpu_hours")}}
    if any("energy_joules" in row for row in rows):
        total["energy_joules"] = sum(row.get("energy_joules", 0.0) for row in rows)
    return total


def stage_cells(row: dict[str, Any]) -> list[str]:
    """stage, seconds, tokens, tokens/s, GPU hours."""
    failed = f" (ended by {row['error'].split(':')[0]})" if "error" in row else " (unfinished)" if row.get("unfinished") else ""
    return [
        row["stage"] + failed,
        shown(row["seconds"], ".1f"),
        shown(row["tokens"], ",.0f"),
        shown(row["tokens"] / max(row["seconds"], 1e-9), ",.0f"),
        shown(row["gpu_hours"], ".2f"),
    ]


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _escape(text: str) -> str:
    """A cell whose characters stand for themselves in Markdown: no tags, formulas, links, or further cells."""
    return re.sub(r"[\\`*$\[\]|]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False).replace("-&gt;", "->"))


def _page(data: dict[str, dict[str, Any]], tables: list[tuple[str, list[list[str]]]], figures: list[Path]) -> str:
    images = [f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">' for path in figures]
    sections = [f"<h2>{html.escape(title)}</h2>{_html_table(rows)}" for title, rows in tables]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
        "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}img{max-width:100%}"
    )
    title = html.escape(", ".join(data))
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>{''.join(sections)}{''.join(images)}\n"


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"
