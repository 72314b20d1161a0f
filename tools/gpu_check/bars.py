"""The bars: what docs/ promise or assume of a GPU, each with the words of the document that it is read from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .record import Record

_SIZE = {"tokens": 16384, "vocab": 151936, "k": 1}  # docs/kernels.md: the size of its floors
_CHUNKS = "opd_kernels chunks of 4096"


class NoNumber(Exception):
    """Why a bar has no number: what was not measured."""


@dataclass(frozen=True)
class Bar:
    """A threshold. `quote`: words of `doc`, which a test looks up; `gpus`: the cards that it holds for, all if empty."""

    name: str
    doc: str
    quote: str
    direction: Literal["at most", "at least"]
    threshold: float
    unit: str
    value: Callable[[Record], float]
    gpus: tuple[str, ...] = ()

    def line(self, root: Path) -> int | None:
        """Number of the line in `doc` on which the quote begins; None if it is not there any more."""
        return line_of((root / self.doc).read_text(encoding="utf-8"), self.quote)


@dataclass(frozen=True)
class Verdict:
    """What became of a bar: `value` None and a reason where it is open."""

    bar: Bar
    state: Literal["met", "short", "open"]
    value: float | None = None
    reason: str = ""


def line_of(text: str, quote: str) -> int | None:
    """The line (from 1) where `quote` begins, whatever white space is between its words."""
    found = re.search(r"\s+".join(map(re.escape, quote.split())), text)
    return None if found is None else text[: found.start()].count("\n") + 1


def judge(bar: Bar, record: Record) -> Verdict:
    words = set(re.findall(r"\w+", record.machine.get("gpu", "").lower()))
    if bar.gpus and not words & {name.lower() for name in bar.gpus}:
        return Verdict(bar, "open", reason=f"is about {' and '.join(bar.gpus)}")
    try:
        value = bar.value(record)
    except NoNumber as reason:
        return Verdict(bar, "open", reason=str(reason))
    met = value <= bar.threshold if bar.direction == "at most" else value >= bar.threshold  # of NaN neither
    return Verdict(bar, "met" if met else "short", value)


def _result(record: Record, part: str) -> Any:
    found = record.result(part)
    if found is None:
        there = record.parts.get(part)
        raise NoNumber(f"{part}: {there.status}{f', {there.reason}' if there.reason else ''}" if there else f"{part}: to do")
    return found


def _number(value: Any, what: str) -> float:
    if value is None:
        raise NoNumber(f"{what}: not measured here")
    return float(value)


def _loss(level: str, contestant: str, field: str, *, entropy: bool) -> Callable[[Record], float]:
    def value(record: Record) -> float:
        wanted = _SIZE | {"level": level, "contestant": contestant, "entropy": entropy}
        for row in _result(record, "loss")["rows"]:
            if all(row[key] == wish for key, wish in wanted.items()):
                if "absent" in row:
                    raise NoNumber(f"{contestant}: {row['absent']}")
                return _number(row[field], f"{contestant}: {field}")
        raise NoNumber(f"{contestant}: no row at {wanted}")

    return value


def _quotient(above: Callable[[Record], float], below: Callable[[Record], float], scale: float = 1.0) -> Callable[[Record], float]:
    return lambda record: above(record) / below(record) * scale


def _field(part: str, *path: str) -> Callable[[Record], float]:
    def value(record: Record) -> float:
        found = _result(record, part)
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return _number(found, f"{part}: {'.'.join(path)}")

    return value


def _worst_kernel(record: Record) -> float:
    rows = _result(record, "kernels")
    if rows["device"] != "cuda":
        raise NoNumber("kernels: ran on a CPU")
    return max(row["ratio"] for row in rows["rows"])


def _same_layers(record: Record, field: str) -> tuple[float, float]:
    """(simulated, measured). Raises NoNumber unless both steps are of the same kind of layers."""
    simulated, measured = _field("simulated", field)(record), _field("step", field)(record)
    if _result(record, "simulated")["layers_by"] != _result(record, "step")["layers_by"]:
        raise NoNumber("simulated: other layers than the measured step's")
    return simulated, measured


def _simulated_peak_off(record: Record) -> float:
    """Percent that the simulated peak is off the measured one."""
    simulated, measured = _same_layers(record, "peak_bytes")
    return abs(simulated / measured - 1) * 100


def _waits_off(record: Record) -> float:
    simulated, measured = _same_layers(record, "waits_total")
    return abs(simulated - measured)


_KERNELS, _TRAINING, _GPU = "docs/kernels.md", "docs/training.md", "docs/gpu.md"
_OURS, _WHOLE, _PRODUCTS = "opd_kernels", "opd_kernels whole", "three matrix products"
BARS: tuple[Bar, ...] = (
    Bar("compiled kernels: error over tolerance", _KERNELS, "with a tolerance of twice eager PyTorch's own error", "at most", 1.0, "", _worst_kernel),
    Bar(
        "logits to gradient: bytes a logit (6 x 1.3)", _KERNELS, "at most 1.3 x the 3.5 ms", "at most", 7.8, "B",
        _loss("logits", _OURS, "bytes_a_logit", entropy=True),
    ),
    Bar(
        "logits to gradient: time", _KERNELS, "at most 1.3 x the 3.5 ms", "at most", 1.3 * 3.5, "ms",
        _loss("logits", _OURS, "milliseconds", entropy=True), ("H200",),
    ),
    Bar(
        "times faster than Liger's vocab-parallel cross-entropy", _KERNELS, "3 x faster than Liger's vocab-parallel cross-entropy", "at least", 3.0, "x",
        _quotient(_loss("logits", "Liger vocab-parallel", "milliseconds", entropy=False), _loss("logits", _OURS, "milliseconds", entropy=False)),
    ),
    Bar(
        "whole head over its three matrix products alone: time", _KERNELS, "at most 1.08 x the three matrix products", "at most", 1.08, "x",
        _quotient(_loss("head", _WHOLE, "milliseconds", entropy=True), _loss("head", _PRODUCTS, "milliseconds", entropy=True)),
    ),
    Bar(
        "head in chunks over whole: time", _KERNELS, "within 5 % of the whole head", "at most", 1.05, "x",
        _quotient(_loss("head", _CHUNKS, "milliseconds", entropy=True), _loss("head", _WHOLE, "milliseconds", entropy=True)),
    ),
    Bar(
        "head in chunks: memory above the inputs", _KERNELS, "under 2.0 GB", "at most", 2.0e9, "B",
        _loss("head", _CHUNKS, "peak_bytes", entropy=True),
    ),
    Bar("our step in bf16: model FLOPs utilisation", _TRAINING, "computation | 55 % of the bf16 peak (mixtures 30 %) | 30 % (10 %)", "at least", 0.30, "", _field("train", "ours", "mfu")),
    Bar(
        "our step over the reference's: tokens/s", _TRAINING, "against the procedure of the reference code", "at least", 1.0, "x",
        _quotient(_field("train", "ours", "tokens_per_second"), _field("train", "reference", "tokens_per_second")),
    ),
    Bar(
        "our step in FP8 over bf16: tokens/s", _TRAINING, "with FP8 1.4 times that at best", "at least", 1.0, "x",
        _quotient(_field("train-fp8", "ours", "tokens_per_second"), _field("train", "ours", "tokens_per_second")),
    ),
    Bar(
        "a step: memory reserved over allocated", _TRAINING, "5 % fragmentation: assumptions", "at most", 1.05, "x",
        _quotient(_field("step", "reserved_bytes"), _field("step", "peak_bytes")),
    ),
    Bar(
        "a step: memory in use beside PyTorch's", _TRAINING, "3 GiB for CUDA, cuBLAS and NCCL", "at most", 3 * 2.0**30, "B",
        _field("step", "other_bytes"),
    ),
    Bar("simulated peak off the measured one", _GPU, "peak memory within 3 %", "at most", 3.0, "%", _simulated_peak_off),
    Bar("simulated host waits off the measured ones", _GPU, "as many host waits", "at most", 0.0, "", _waits_off),
)  # fmt: skip
