"""What the stages share: the division of work, progress, and the account of what an engine could not do."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_opd.cost.meter import GpuMeter, StageCost, append_jsonl, clock, open_meter
from megatron_opd.errors import LineageError, QuarantineError, UserError
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.safety.redact import public_address
from megatron_opd.serve.engine import Engine
from megatron_opd.serve.opening import open_engine
from megatron_opd.store_records import Excluded

QUARANTINE_FILE = "quarantine.jsonl"
LINE_SECONDS = 60.0  # between the lines of a stage that writes to a log


@dataclass(frozen=True)
class Shard:
    """Worker `index` of `count`: it makes the parts p with p % count == index."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"shard {self.index}/{self.count}: i/N with 0 <= i < N is expected")

    @classmethod
    def parse(cls, text: str) -> Shard:
        index, sign, count = text.partition("/")
        if not sign or not index.isdecimal() or not count.isdecimal() or len(text) > 40:
            raise UserError(f"--shard {text!r:.50}: i/N is expected, for example 0/8")
        return cls(int(index), int(count))

    def owns(self, part: int) -> bool:
        return part % self.count == self.index


def engine_meter(config: EngineConfig) -> GpuMeter | None:
    """Meter of the GPUs of this machine that the engine will use; None for servers at addresses, whose GPUs may be anywhere."""
    if config.launch is not None:
        given = config.launch.variables().get("CUDA_VISIBLE_DEVICES")
        return open_meter(
            given.split(",") if given is not None else None, first=config.launch.servers * config.launch.tp * config.launch.dp
        )
    return None if config.urls or config.device == "cpu" else open_meter(first=1)


Lend = Callable[[str], contextlib.AbstractContextManager[Engine]]  # an engine for the model in a directory, for the time of a stage


def lending(config: EngineConfig, run_dir: str) -> Lend:
    """Opens an engine for each stage, and closes it."""
    return lambda model: closing_engine(open_engine(config, model, log_dir=f"{run_dir}/logs"))


@contextlib.contextmanager
def lending_one(config: EngineConfig, run_dir: str) -> Iterator[Lend]:
    """One engine for several stages of the same model, opened when the first asks for it, and closed at the end."""
    with contextlib.ExitStack() as stack:
        opened: list[Engine] = []

        @contextlib.contextmanager
        def lend(model: str) -> Iterator[Engine]:
            if not opened:
                opened.append(stack.enter_context(lending(config, run_dir)(model)))
            yield opened[0]

        yield lend


def round_facts(number: int | None) -> dict[str, int]:
    """For the account of a stage: the round of several that it is of."""
    return {} if number is None else {"round": number}


@contextlib.contextmanager
def closing_engine(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.close()


class Bar:
    """Progress with rate and ETA, tokens/s and GPU hours so far: a bar on a terminal, elsewhere (a Slurm log) a line a minute.

    `unit` is what `total` counts; without a `cost` that is all there is to say. `update` may be called from another thread.
    """

    def __init__(self, name: str, cost: StageCost | None, *, total: int, initial: int, unit: str, every: float = LINE_SECONDS):
        self.name, self.cost, self.total, self.unit, self.every = name, cost, total, unit, every
        self.initial = self.done = initial
        self.tokens = 0
        self._start = time.monotonic()
        self._said: tuple[float, int] = (-math.inf, -1)  # when, and how much was done
        self.bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=initial, desc=name, unit=unit, unit_scale=True, mininterval=0.5, dynamic_ncols=True)

    def update(self, count: int, *, tokens: int) -> None:
        """`count` more units are done, which took `tokens` tokens."""
        self.done += count
        self.tokens += tokens
        if self.bar is not None:
            self.bar.set_postfix(self._facts(), refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self._said[0] >= self.every:
            self._say()

    def _facts(self) -> dict[str, str]:
        if self.cost is None:
            return {}
        seconds = self.cost.seconds()
        facts = {} if self.unit == "token" else {"tokens/s": f"{self.tokens / max(seconds, 1e-9):.0f}"}
        if self.cost.num_gpus:
            facts["GPU hours"] = f"{seconds * self.cost.num_gpus / 3600:.2f}"
        return facts

    def _say(self) -> None:
        """The line of a log."""
        rate = (self.done - self.initial) / max(time.monotonic() - self._start, 1e-9)
        parts = [f"{self.done:,} of {self.total:,} {self.unit}s ({self.done / max(self.total, 1):.1%})", f"{rate:,.3g} {self.unit}s/s"]
        parts += [f"{value} {name}" for name, value in self._facts().items()]
        if rate and self.done < self.total:
            parts.append(f"{clock((self.total - self.done) / rate)} left")
        print(f"{self.name}: {', '.join(parts)}", file=sys.stderr, flush=True)
        self._said = (time.monotonic(), self.done)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self._said[1] != self.done:
            self._say()


def quarantine(run_dir: str, stage: str, store: str, part: int, excluded: Sequence[Excluded]) -> None:
    """Append what the engine failed at to run_dir/quarantine.jsonl. The part's manifest is the truth; this is for people."""
    for record in excluded:
        if record.quarantined:
            row = {"stage": stage, "store": public_address(store), "part": part, **record.model_dump(exclude={"quarantined"})}
            append_jsonl(Path(run_dir) / QUARANTINE_FILE, row)


def check_quarantined(stage: str, excluded: Sequence[Excluded], *, total: int, limit: float, run_dir: str | None, remedy: str) -> None:
    """Raise QuarantineError if more than `limit` of `total` rollouts were quarantined. Without a run only the parts' manifests have the reasons."""
    count = sum(record.quarantined for record in excluded)
    if count:
        place = "'megatron-opd inspect' has" if run_dir is None else f"{Path(run_dir) / QUARANTINE_FILE} has"
        print(f"{stage}: {count} of {total} rollouts were quarantined (excluded): {place} the reasons")
    if count > limit * total:
        raise QuarantineError(
            f"{stage} is done, but {count} of {total} rollouts were quarantined, over max_quarantined = {limit:g}; {remedy}"
        )


class ModelGuard:
    """Sees that the model's files stay those that the stage began with: servers would load others at a restart."""

    def __init__(self, engine: Engine, model: str):
        self.engine, self.folder = engine, Path(model)
        self._stamp: list[tuple[str, int, int]] = []

    def check(self) -> None:
        """Raise LineageError if the model is another one. Reads the files only if their sizes or times changed."""
        facts = [(path.name, path.stat()) for path in sorted(self.folder.glob("[!.]*")) if path.is_file()]
        stamp = [(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts]
        if stamp == self._stamp:
            return
        now, before = fingerprint_model(self.folder), self.engine.fingerprint
        if now != before:
            raise LineageError(
                f"{self.folder} changed during the run: it was {before.short()}, now {now.short()}; the last part was not kept"
            )
        self._stamp = stamp
