"""The record as Markdown, and what fell short as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .bars import BARS, Bar, Verdict, judge
from .record import Record

FILE = "report.md"


def verdicts(record: Record, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    return [judge(bar, record) for bar in bars]


def amount(value: float | None, unit: str) -> str:
    """A number as people read it: bytes in GB from a million on, everything else with four digits."""
    if value is None:
        return ""
    if unit == "B" and value >= 1e6:
        return f"{value / 1e9:.3g} GB"
    return f"{value:.4g} {unit}".rstrip()


def shortfalls(found: Sequence[Verdict], root: Path) -> list[str]:
    """One line for each bar that was not met."""
    return [
        f"short: {v.bar.name}: {amount(v.value, v.bar.unit)}, {v.bar.direction} {amount(v.bar.threshold, v.bar.unit)} ({v.bar.doc}:{v.bar.line(root)})"
        for v in found
        if v.state == "short"
    ]


def open_bars(found: Sequence[Verdict]) -> list[str]:
    return [f"open: {v.bar.name}: {v.reason}" for v in found if v.state == "open"]


def exit_code(record: Record, found: Sequence[Verdict]) -> int:
    """0 if no bar was missed, at least one was met, and every part is done or can't be run here; else 1."""
    unfinished = any(part.status not in ("done", "not run") for part in record.parts.values())
    states = {verdict.state for verdict in found}
    return int(unfinished or "short" in states or "met" not in states)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def row(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [row(head), "|" + "---|" * len(head), *map(row, rows), ""]


def write(record: Record, root: Path, *, bars: Sequence[Bar] = BARS) -> Path:
    """`report.md` beside the record."""
    path = record.folder / FILE
    path.write_text(markdown(record, root, bars), encoding="utf-8")
    return path


def markdown(record: Record, root: Path, bars: Sequence[Bar] = BARS) -> str:
    found, machine = verdicts(record, bars), record.machine
    driver = machine.get("driver", {})
    lines = [f"# {machine.get('gpu', 'no GPU seen by PyTorch')}", ""]
    lines += [
        "Written by `make gpu-check` (docs/gpu.md). Every number was measured on this machine, unless it says that it was simulated.",
        "",
    ]
    lines += ["## Short of a bar", ""]
    lines += [f"- {line.removeprefix('short: ')}" for line in shortfalls(found, root)] or ["Nothing that was measured."]
    lines += ["", "## Bars", ""]
    lines += table(
        ("bar", "wanted", "found", "", "from"),
        (
            (v.bar.name, f"{v.bar.direction} {amount(v.bar.threshold, v.bar.unit)}", amount(v.value, v.bar.unit) or v.reason, v.state,
             f"{v.bar.doc}:{v.bar.line(root)}")
            for v in found
        ),
    )  # fmt: skip
    lines += ["## Parts", ""]
    lines += table(
        ("part", "", "seconds", "SM clock before, after", "code", "command"),
        (
            (name, f"{part.status}{': ' + part.reason if part.reason else ''}", f"{part.seconds:.0f}",
             ", ".join(part.clocks.get(when, "") for when in ("before", "after")).strip(", "), part.commit, f"`{' '.join(part.command)}`")
            for name, part in record.parts.items()
        ),
    )  # fmt: skip
    lines += ["## Machine", ""]
    versions = machine.get("versions", {})
    facts = {
        "driver": driver.get("driver_version"),
        "CUDA of PyTorch": machine.get("cuda"),
        "compute capability": machine.get("capability"),
    }
    facts |= {
        "memory, GiB": amount(machine.get("memory_gib"), ""),
        "clocks.max.sm": driver.get("clocks.max.sm"),
        "power limit": driver.get("power.limit"),
    }
    facts |= {"Python": machine.get("python"), "CPU cores": machine.get("cores"), "kernel": machine.get("kernel")} | versions
    lines += table(("", ""), ((name, value) for name, value in facts.items() if value))
    if machine.get("lacking"):
        lines += ["Not there:", "", *(f"- {name}: {reason}" for name, reason in machine["lacking"].items()), ""]
    for name, show in _SHOWN.items():
        if (result := record.result(name)) is not None:
            lines += [f"## {name}", "", *show(result)]
    for name, part in record.parts.items():
        if part.tail:
            lines += [f"## {name}: end of its output", "", "```", *part.tail.replace("```", "'''").splitlines(), "```", ""]
    return "\n".join(lines)


def _loss(result: dict[str, Any]) -> list[str]:
    lines = [f"Copy: {result['copy_bytes_a_second'] / 1e12:.2f} TB/s, read and written. H = {result['hidden']}.", ""]

    def cells(row: dict[str, Any]) -> tuple[Any, ...]:
        size = row["level"], row["tokens"], row["vocab"], row["k"], "yes" if row["entropy"] else "no", row["contestant"]
        if "absent" in row:
            return *size, row["absent"], "", "", ""
        peak, each = row["peak_bytes"], row["bytes_a_logit"]
        gradient = row["gradient_error"]
        return (
            *size, f"{row['milliseconds']:.2f}", "" if peak is None else f"{peak / 1e9:.2f}", "" if each is None else f"{each:.1f}",
            "" if gradient is None else f"{gradient:.1e}",
        )  # fmt: skip

    return lines + table(
        ("from", "N", "V", "K", "entropy", "", "ms", "GB above inputs", "bytes a logit", "gradient's error"), map(cells, result["rows"])
    )


def _train(result: dict[str, Any]) -> list[str]:
    sides = [name for name in ("ours", "reference") if name in result]
    rows: list[tuple[Any, ...]] = []
    forms: dict[str, Callable[[Any], str]] = {
        "tokens_per_second": lambda v: f"{v:,.0f}", "tflops": lambda v: f"{v:.1f}", "mfu": lambda v: "" if v is None else f"{v:.1%}",
        "memory_gib": lambda v: f"{v:.1f}",
    }  # fmt: skip
    for field, form in forms.items():
        rows.append((field, *(form(result[side][field]) for side in sides)))
    for part in result[sides[0]]["split"]:
        rows.append((f"of the time: {part}", *(f"{result[side]['split'][part]:.1%}" for side in sides)))
    return table(("", *sides), rows)


def _kernels(result: dict[str, Any]) -> list[str]:
    rows = (
        (row["dtype"], row["rows"], row["vocab"], row["k"], row["padding"], row["masked"], row["scale"], f"{row['ratio']:.2f}")
        for row in result["rows"]
    )
    return table(("logits", "N", "V", "K", "padding", "masked", "scale", "error over tolerance"), rows)


def _tests(result: dict[str, Any]) -> list[str]:
    lines = [", ".join(f"{count} {name}" for name, count in result["counts"].items()), ""]
    return lines + [f"- skipped {count} x: {reason}" for reason, count in result["skipped"].items()] + [""]


def _demo(result: dict[str, Any]) -> list[str]:
    stages = table(
        ("stage", "seconds", "tokens"), ((row["stage"], f"{row['seconds']:.1f}", f"{row['tokens'] or 0:,.0f}") for row in result["stages"])
    )
    figures = ("accuracy", "reverse_kl")
    return stages + table(
        ("model", *figures),
        ((row["name"], *(f"{row[name]['mean']:.4g}" if row.get(name) else "" for name in figures)) for row in result["evaluations"]),
    )


def _plain(result: dict[str, Any]) -> list[str]:
    def show(value: Any) -> str:
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    return table(("", ""), ((name, show(value)) for name, value in result.items()))


_SHOWN: dict[str, Callable[[Any], list[str]]] = {
    "kernels": _kernels,
    "loss": _loss,
    "loss-sizes": _loss,
    "kernel-tests": _tests,
    "gpu-tests": _tests,
    "train": _train,
    "train-fp8": _train,
    "step": _plain,
    "simulated": _plain,
    "demo": _demo,
    "sglang": _plain,
}
