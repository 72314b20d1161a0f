"""Times the log-softmax-KL kernel and the LM-head loss beside what others have, in one run.

    python tools/bench_loss.py --output docs/results/bench-loss          # on a GPU: the sizes of real models
    python tools/bench_loss.py --output /tmp/bench                       # on a CPU: a small size, to see that it works

Prints a table and writes OUTPUT.json (hardware, versions, command, every number) and OUTPUT.png. Times are medians of forward and
backward together, on a GPU by its own events; memory is the peak above the inputs (a main_grad is one). Bytes a logit element are the
time multiplied by the bandwidth of a large copy that is measured in the same run: an upper bound of what was moved. Errors are the
largest of a few rows against float64, relative to the largest value there. Contestants that can't take part are named with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_opd.model import parallel  # isort: skip  (prepares megatron.core, so it comes first)

import matplotlib as mpl
import torch
from loss_contestants import Absent, Problem, Run, contestants

from megatron_opd.cost.meter import git_commit
from megatron_opd.recipe.layout import ParallelConfig

mpl.use("Agg")
from matplotlib import pyplot as plt

PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "cut-cross-entropy", "verl", "transformer-engine")
CHECKED_ROWS = 8


@dataclass(frozen=True)
class Size:
    """One problem: a whole vocabulary, or the share of one tensor-parallel rank."""

    level: str
    tokens: int
    vocab: int
    k: int
    entropy: bool


def sizes(arguments: argparse.Namespace) -> Iterator[Size]:
    for level in ("logits", "head"):
        for tokens, parts, k, entropy in itertools.product(arguments.tokens, arguments.shards, arguments.ids, (True, False)):
            yield Size(level, tokens, arguments.vocab // parts, k, bool(entropy))


def make_problem(size: Size, hidden_size: int, device: torch.device) -> Problem:
    """Random inputs: logits of a head with weights of standard deviation 1 / sqrt(H), times 3."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    ids = torch.randint(size.vocab, (size.tokens, size.k), generator=generator, device=device)
    g_logp = torch.full(ids.shape, -1.0, device=device) if size.k == 1 else torch.randn(ids.shape, generator=generator, device=device)
    logits = hidden = weight = None
    if size.level == "logits":
        logits = normal(size.tokens, size.vocab).mul_(3)
    else:
        hidden, weight = normal(size.tokens, hidden_size), normal(size.vocab, hidden_size).mul_(3 / hidden_size**0.5)
        weight.main_grad = torch.zeros(weight.shape, device=device)  # pyright: ignore[reportAttributeAccessIssue]
    g_entropy = torch.randn(size.tokens, generator=generator, device=device) if size.entropy else None
    return Problem(logits, hidden, weight, ids, g_logp, g_entropy)


def truth(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """logp and gradient of the first rows in float64."""
    rows = slice(0, CHECKED_ROWS)
    if problem.logits is not None:
        leaf = problem.logits[rows].double().requires_grad_()
        logits = leaf
    else:
        assert problem.hidden is not None
        assert problem.weight is not None
        leaf = problem.hidden[rows].double().requires_grad_()
        logits = leaf @ problem.weight.detach().double().t()
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1) if problem.g_entropy is not None else None
    chosen = logp.gather(1, problem.ids[rows])
    return chosen.detach(), torch.autograd.grad(problem.loss(chosen, entropy, rows), leaf)[0]


def relative_error(found: torch.Tensor | None, exact: torch.Tensor) -> float | None:
    if found is None:
        return None
    return ((found[:CHECKED_ROWS].double() - exact).abs().max() / exact.abs().max()).item()


def timed(run: Callable[[], object], before: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median milliseconds of `run`; `before` is not counted."""
    found = []
    for _ in range(repeats):
        before()
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second read and written by a large copy."""
    source = torch.empty((1 << 31) if device.type == "cuda" else (1 << 25), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = timed(lambda: target.copy_(source), lambda: None, repeats, device)
    return 2 * source.numel() / milliseconds * 1e3


def measure(
    size: Size, problem: Problem, run: Run, exact: tuple[torch.Tensor, torch.Tensor], bandwidth: float, repeats: int
) -> dict[str, Any]:
    """The numbers of one contestant at one size."""
    device = problem.ids.device
    # Some write over the logits: they are restored outside of what is timed.
    original = None if problem.logits is None else problem.logits.clone()

    def restore() -> None:
        if original is not None:
            assert problem.logits is not None
            problem.logits.detach().copy_(original)

    logp, grad = run()
    errors = {"logp_error": relative_error(logp, exact[0]), "gradient_error": relative_error(grad, exact[1])}
    del logp, grad
    restore()
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
    milliseconds = timed(run, restore, repeats, device)
    restore()
    per_element = milliseconds / 1e3 * bandwidth / (size.tokens * size.vocab) if size.level == "logits" else None
    return {"milliseconds": milliseconds, "peak_bytes": peak, "bytes_a_logit": per_element, **errors}


def run_all(arguments: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> None:
    """Into `record`, and after each size into its file: a row for each contestant, with its numbers or why it is absent."""
    bandwidth = record["copy_bytes_a_second"] = copy_bandwidth(device, arguments.repeats)
    rows = record["rows"] = []
    for size in sizes(arguments):
        problem = make_problem(size, arguments.hidden, device)
        exact = truth(problem)
        for name, make in contestants(arguments.chunk)[size.level].items():
            if arguments.contestants and not any(part in name for part in arguments.contestants):
                continue
            row: dict[str, Any] = {"contestant": name, **asdict(size)}
            try:
                row |= measure(size, problem, make(problem), exact, bandwidth, arguments.repeats)
            except Absent as absent:
                row["absent"] = str(absent)
            except torch.cuda.OutOfMemoryError:
                row["absent"] = "out of memory"
            rows.append(row)
            print(table_line(row), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        write(record, arguments.output.with_suffix(".json"))


def write(record: dict[str, Any], path: Path) -> None:
    """The file appears whole, so that a run that is cut leaves the sizes that it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def table_line(row: dict[str, Any]) -> str:
    size = (
        f"{row['level']:6s} N={row['tokens']:<6d} V={row['vocab']:<7d} K={row['k']:<3d} entropy={row['entropy']:d}  {row['contestant']:26s}"
    )
    if "absent" in row:
        return f"{size} absent: {row['absent']}"
    figures = [f"{row['milliseconds']:9.3f} ms"]
    if row["peak_bytes"] is not None:
        figures.append(f"{row['peak_bytes'] / 1e9:7.3f} GB above inputs")
    if row["bytes_a_logit"] is not None:
        figures.append(f"{row['bytes_a_logit']:6.1f} B a logit")
    figures += [
        f"{label} {row[key]:.1e}" for label, key in (("logp", "logp_error"), ("gradient", "gradient_error")) if row[key] is not None
    ]
    return f"{size} {'  '.join(figures)}"


def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Times at the largest vocabulary, K = 1 without entropy, which everybody can do: one panel a level."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5))
    for panel, level in zip(panels, ("logits", "head"), strict=True):
        of_level = [row for row in rows if row["level"] == level and row["k"] == min(r["k"] for r in rows) and not row["entropy"]]
        of_level = [row for row in of_level if row["vocab"] == max(r["vocab"] for r in of_level)]
        names = list(dict.fromkeys(row["contestant"] for row in of_level))
        tokens = sorted({row["tokens"] for row in of_level})
        for number, n in enumerate(tokens):
            times = {row["contestant"]: row.get("milliseconds", 0.0) for row in of_level if row["tokens"] == n}
            panel.barh(
                [index + number * 0.8 / len(tokens) for index in range(len(names))], list(times.values()), 0.8 / len(tokens), label=f"N={n}"
            )
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_xlabel("milliseconds, forward and backward (no bar: absent)")
        panel.set_title(f"{'from logits' if level == 'logits' else 'from hidden states'}, V={of_level[0]['vocab']}, {device}")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Time the log-softmax-KL kernel and the LM-head loss beside others.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768] if on_gpu else [64])
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 32)
    parser.add_argument("--vocab", type=int, default=151936 if on_gpu else 1000)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4], help="vocabulary divided by these, as tensor parallel does")
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 64] if on_gpu else [1, 8], help="ids a token")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="those whose names contain one of these alone")
    parser.add_argument("--chunk", type=int, default=4096 if on_gpu else 16, help="tokens a chunk of linear_loss")
    parser.add_argument("--repeats", type=int, default=15 if on_gpu else 3)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix; .json and .png are written")
    arguments = parser.parse_args()
    device = parallel.start(ParallelConfig(), seed=0)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    record = {
        "device": name,
        "cuda": torch.version.cuda,
        "versions": versions,
        "git_commit": git_commit(),
        "command": " ".join(["python", *sys.argv]),
        "hidden": arguments.hidden,
    }
    run_all(arguments, device, record)
    rows = record["rows"]
    draw(rows, name, arguments.output.with_suffix(".png"))
    absent = {row["contestant"]: row["absent"] for row in rows if "absent" in row and "alone" not in row["absent"]}
    for contestant, reason in absent.items():
        print(f"absent: {contestant}: {reason}")
    print(f"{arguments.output.with_suffix('.json')} and .png; copy bandwidth {record['copy_bytes_a_second'] / 1e12:.2f} TB/s on {name}")
    parallel.stop()


if __name__ == "__main__":
    main()
