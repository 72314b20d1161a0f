"""report: figures and tables of one or several runs: PNG, Markdown, and one HTML page with the figures inside."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from megatron_opd.cost import read_jsonl
from megatron_opd.errors import UserError

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
_CURVES = (
    ("reverse_kl", "reverse KL to the teacher on the rollouts, nat/token"),
    ("nll", "negative log-likelihood, nat/token"),
    ("entropy", "entropy, nat"),
    ("effective_sample_share", "effective sample share against pi_ref"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens/s"),
)


def write_report(runs: list[str], output: str | None = None) -> Path:
    """Write report.html, report.md and PNG figures; returns the page. Raises UserError for a folder that holds no run."""
    folders = [Path(run) for run in runs]
    data = {folder.name: _read_run(folder) for folder in folders}
    target = Path(output) if output else folders[0] / "report"
    target.mkdir(parents=True, exist_ok=True)
    figures = _figures(data, target)
    tables = _tables(data)
    (target / "report.md").write_text("\n\n".join(f"## {title}\n\n{_markdown(rows)}" for title, rows in tables) + "\n")
    page = target / "report.html"
    page.write_text(_page(data, tables, figures))
    print(f"report: {page}")
    return page


def _read_run(folder: Path) -> dict[str, Any]:
    evaluations = [json.loads(path.read_text()) for path in sorted((folder / "eval").glob("*.json"))]
    training = {path.parent.name: rows for path in sorted(folder.glob("*/metrics.jsonl")) if (rows := read_jsonl(path))}
    stages = read_jsonl(folder / "stages.jsonl")
    if not evaluations and not training and not stages:
        raise UserError(f"{folder}: no run here (no eval/*.json, */metrics.jsonl or stages.jsonl); give the run_dir of a recipe")
    return {"evaluations": sorted(evaluations, key=lambda e: e["provenance"]["created"]), "training": training, "stages": stages}


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
    stages = [["run", "stage", "seconds", "tokens", "tokens/s", "GPU hours"]]
    for run, content in data.items():
        results += [[run, *evaluation_cells(evaluation)] for evaluation in content["evaluations"]]
        differences += [[run, *difference_cells(evaluation)] for evaluation in content["evaluations"] if "against" in evaluation]
        stages += [[run, *stage_cells(row)] for row in content["stages"]]
    tables = (("Results", results), ("Differences, paired by prompt", differences), ("Stages", stages))
    return [(title, rows) for title, rows in tables if len(rows) > 1]


def evaluation_cells(evaluation: dict[str, Any]) -> list[str]:
    """name, accuracy, reverse KL, response length, stopped share."""
    accuracy, kl = evaluation.get("accuracy"), evaluation.get("reverse_kl")
    return [
        evaluation["name"],
        f"{accuracy['mean']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%})" if accuracy else "",
        f"{kl['mean']:.4f} ({kl['low']:.4f} to {kl['high']:.4f})" if kl else "",
        f"{evaluation['response_length']:.0f}",
        f"{evaluation['stopped_share']:.1%}",
    ]


def difference_cells(evaluation: dict[str, Any]) -> list[str]:
    """name, baseline, change of accuracy and of reverse KL, number of prompts."""
    against = evaluation["against"]
    accuracy, kl = against.get("accuracy"), against.get("reverse_kl")
    return [
        evaluation["name"],
        against["name"],
        f"{100 * accuracy['mean']:+.1f} ({100 * accuracy['low']:+.1f} to {100 * accuracy['high']:+.1f})" if accuracy else "",
        f"{kl['mean']:+.4f} ({kl['low']:+.4f} to {kl['high']:+.4f})" if kl else "",
        str(against["num_prompts"]),
    ]


def stage_cells(row: dict[str, Any]) -> list[str]:
    """stage, seconds, tokens, tokens/s, GPU hours."""
    failed = f" (ended by {row['error'].split(':')[0]})" if "error" in row else ""
    return [
        row["stage"] + failed,
        f"{row['seconds']:.1f}",
        f"{row['tokens']:,}",
        f"{row['tokens'] / max(row['seconds'], 1e-9):,.0f}",
        f"{row['gpu_hours']:.2f}",
    ]


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _figures(data: dict[str, dict[str, Any]], target: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9})
    paths = []
    evaluations = [
        (f"{run}: {e['name']}" if len(data) > 1 else e["name"], e) for run, content in data.items() for e in content["evaluations"]
    ]
    panels = [
        (key, title)
        for key, title in (("accuracy", "accuracy"), ("reverse_kl", "reverse KL to the teacher, nat/token"))
        if any(key in e for _, e in evaluations)
    ]
    if panels:
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
        for axis, (key, title) in zip(axes[0], panels, strict=True):
            shown = [(name, e[key]) for name, e in evaluations if key in e]
            for x, (_, value) in enumerate(shown):
                error = [[max(0.0, value["mean"] - value["low"])], [max(0.0, value["high"] - value["mean"])]]
                axis.bar(x, value["mean"], yerr=error, color=_COLOURS[x % len(_COLOURS)], capsize=4, width=0.6)
                label = f"{value['mean']:.1%}" if key == "accuracy" else f"{value['mean']:.3f}"
                axis.annotate(label, (x, value["high"]), ha="center", va="bottom", xytext=(0, 3), textcoords="offset points")
            axis.set_xticks(range(len(shown)), [name for name, _ in shown])
            axis.set_title(title)
            axis.margins(y=0.15)
        paths.append(_save(figure, target / "results.png"))
    curves = [
        (f"{run} {stage}" if len(data) > 1 else stage, rows) for run, content in data.items() for stage, rows in content["training"].items()
    ]
    if curves:
        figure, axes = plt.subplots(2, 3, figsize=(12, 6))
        for axis, (key, title) in zip(axes.flat, _CURVES, strict=True):
            for number, (label, rows) in enumerate(curves):
                if key in ("reverse_kl", "effective_sample_share") and not any(row["abs_advantage"] for row in rows):
                    continue
                axis.plot(
                    [row["step"] for row in rows],
                    [row[key] for row in rows],
                    color=_COLOURS[number % len(_COLOURS)],
                    label=label,
                    linewidth=1.3,
                )
            axis.set_title(title)
            axis.set_xlabel("step")
            if axis.has_data():
                axis.legend(frameon=False)
        paths.append(_save(figure, target / "training.png"))
    return paths


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


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
