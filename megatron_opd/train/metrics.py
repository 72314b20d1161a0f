"""What a step reports: one console line with units, one JSONL row; loggers on request. docs/training.md says what each is."""

from __future__ import annotations

import math
import re
import resource
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.checkpoints.saved import step_name
from megatron_opd.cost.gpus import find_gpu
from megatron_opd.cost.meter import GpuMeter, append_jsonl, clock, read_jsonl, write_jsonl
from megatron_opd.errors import UserError
from megatron_opd.evaluate.rows import read_rows
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.safety.durable import sync
from megatron_opd.train.loggers import Row, about, close_loggers, open_loggers
from megatron_opd.train.step import StepResult

_SAMPLES = 16  # rollouts of an evaluation under way that a logger shows
_LONGEST_RESPONSE = 4000  # characters


@dataclass(frozen=True)
class StepFacts:
    """What is known of a step beside its sums. Lengths are of the global batch after the cut, flops are the model's arithmetic."""

    step: int  # from 1
    epoch: float
    lengths: np.ndarray
    response_lengths: np.ndarray
    flops: float
    micro_batches: int  # of the first rank
    seconds: float
    data_seconds: float  # of them, on the first rank: reading and packing
    num_ranks: int
    horizon: int | None = None  # response tokens that count, where the loss has a limit


def step_row(result: StepResult, facts: StepFacts, resources: dict[str, float]) -> dict[str, Any]:
    """Means of a step; `resources` come from `ResourceMeter`."""
    sums, watched = result.sums, result.watched
    n, seconds, tokens = sums.tokens, facts.seconds, int(facts.lengths.sum())
    row: dict[str, Any] = {
        "step": facts.step,
        "epoch": facts.epoch,
        "loss": sums.loss / sums.denominator,
        "nll": sums.nll / n,
        "entropy": sums.entropy / n,
        "reverse_kl": sums.reverse_kl / n,
        "abs_advantage": sums.abs_advantage / n,
        "clipped_share": sums.clipped / n,
        "ratio": sums.ratio / n,
        "effective_sample_share": sums.ratio**2 / (n * sums.ratio_squared) if sums.ratio_squared else math.nan,
        "off_share": watched.off / n,
        "response_length": n / sums.sequences,
        "response_length_max": int(facts.response_lengths.max()),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "skipped": result.skipped,
        "response_tokens": int(n),
        "batch_tokens": tokens,
        "micro_batches": facts.micro_batches,
        "seconds": seconds,
        "data_seconds": facts.data_seconds,
        "tokens_per_second": tokens / seconds,
        "model_tflops_per_rank": facts.flops / seconds / facts.num_ranks / 1e12,
        **resources,
    }
    if facts.horizon is not None:
        row["horizon"] = facts.horizon
    if sums.reverse_kl:
        row["reverse_kl_by_position"] = watched.means_by_position()
        row["tokens_by_position"] = [int(n) for n in watched.tokens_by_position[: len(row["reverse_kl_by_position"])]]
    if watched.overlap_tokens:
        row["topk_overlap"] = watched.overlap / watched.overlap_tokens
    if (peak := peak_flops()) is not None:
        row["model_flops_utilisation"] = facts.flops / seconds / facts.num_ranks / peak
    return {key: _finite_or_none(value) for key, value in row.items()}


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN: a value that is none is null."""
    if isinstance(value, list):
        return [_finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_line(row: dict[str, Any], *, total: int, distils: bool, left: float | None = None) -> str:
    """One line a step; `left`: seconds until the last one."""
    head = f"step {row['step']:>5}/{total}" + (f"  {clock(left)} left" if left else "")
    if row["skipped"]:
        return f"{head}  SKIPPED: loss {row['loss']}, gradient norm {row['grad_norm']}; weights and optimizer are as they were"
    losses = (
        f"reverse KL {row['reverse_kl']:.4f} nat/token  |A| {row['abs_advantage']:.4f}" if distils else f"nll {row['nll']:.4f} nat/token"
    )
    drift = f"  ESS {row['effective_sample_share'] or 0:.0%}  off {row['off_share']:.1%}" if distils else ""
    overlap = f"  overlap {row['topk_overlap']:.0%}" if "topk_overlap" in row else ""
    power = f"  {row['power_watts']:.0f} W/GPU" if "power_watts" in row else ""
    mfu = f"  MFU {row['model_flops_utilisation']:.1%}" if "model_flops_utilisation" in row else ""
    return (
        f"{head}  loss {row['loss']:+.4f}  {losses}  entropy {row['entropy']:.3f}{overlap}{drift}  grad {row['grad_norm']:.3f}  "
        f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s{mfu}  {row['memory_gib']:.1f} GiB{power}"
    )


class Pace:
    """How long a step takes, saves and all that comes with it included: the mean of the last ones that this process made."""

    def __init__(self, *, over: int = 20):
        self._steps: deque[tuple[int, float]] = deque(maxlen=over + 1)
        self._seconds = math.nan

    def made(self, step: int, seconds: float, now: float) -> None:
        """Step number `step` ended at `now` on a clock of seconds, and took `seconds` by itself."""
        self._steps.append((step, now))
        first, since = self._steps[0]
        self._seconds = (now - since) / (step - first) if step > first else seconds

    def left(self, total: int) -> float:
        """Seconds until step `total` has ended, from the last one that was made."""
        return self._seconds * (total - self._steps[-1][0])


class ResourceMeter:
    """Memory and energy of all ranks between two calls of `read`, which every rank makes."""

    def __init__(self, meter: GpuMeter | None):
        self.meter = meter
        self._energy = self.start_energy = meter.energy_joules() if meter else None

    def read(self, seconds: float) -> dict[str, float]:
        """memory_gib: the largest peak of a rank (PyTorch's, or the process's on a CPU); with NVML: energy of the step and so on."""
        energy = self.meter.energy_joules() if self.meter else None
        used = None if energy is None or self._energy is None else energy - self._energy
        self._energy = energy
        largest = _over_ranks([memory_gib(), self.meter.memory_gib() if self.meter else 0.0], dist.ReduceOp.MAX)
        total, counted = _over_ranks([used or 0.0, float(used is not None)], dist.ReduceOp.SUM)
        found = {"memory_gib": largest[0]}
        if largest[1]:
            found["gpu_memory_gib"] = largest[1]
        if counted:
            found |= {"energy_joules": total, "power_watts": total / counted / seconds}
        return found

    def total_energy(self) -> float | None:
        """Joules of all ranks' GPUs since this object was made; every rank calls it."""
        now = self.meter.energy_joules() if self.meter else None
        used = None if now is None or self.start_energy is None else now - self.start_energy
        total, counted = _over_ranks([used or 0.0, float(used is not None)], dist.ReduceOp.SUM)
        return total if counted else None


def _over_ranks(values: list[float], op: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)  # between hosts: a GPU would first finish what it has to do
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def memory_gib() -> float:
    """Peak memory of this rank: of its GPU, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops() -> float | None:
    """Dense bf16 peak of this GPU in FLOP/s; None for those whose data sheet is not known: utilisation is then not reported."""
    if not torch.cuda.is_available():
        return None
    gpu = find_gpu(torch.cuda.get_device_name())
    return None if gpu is None else gpu.bf16_flops


class MetricsLog:
    """Where rows go, on the first rank: metrics.jsonl always, and the loggers of the recipe (`loggers.py`)."""

    def __init__(self, output: Path, config: TrainerConfig, *, first_step: int, settings: dict[str, Any]):
        """Rows after `first_step` are those of steps that will be made again: the first `write` cuts them. Raises UserError for a missing package."""
        self.path, self._cut_after = output / "metrics.jsonl", first_step
        self._is_cut = False
        self._unwritten: list[dict[str, Any]] = []
        self.pace = Pace()
        name = f"{settings.get('name') or output.parent.name} {output.name}"
        self._loggers = open_loggers(config.loggers, about(output, config, run=name, settings=settings), begun=first_step > 0)

    def write(self, row: dict[str, Any]) -> None:
        """Rows that find no room wait for the next: other ranks can't know of it before they save."""
        self._unwritten.append(row)
        try:
            self._append()
        except OSError as error:
            print(f"WARNING: {error}; rows that are not written are kept until the next checkpoint", flush=True)
        if self._loggers:
            sent = Row(row["step"], scalars_of(row), sample_tables(self.path.parent, row))
            for logger in self._loggers:
                logger.put(sent)

    def _append(self) -> None:
        if not self._is_cut:
            write_jsonl(self.path, [row for row in read_jsonl(self.path, number="step") if row["step"] <= self._cut_after])
            self._is_cut = True
        while self._unwritten:
            append_jsonl(self.path, self._unwritten[0], durable=False)
            del self._unwritten[0]

    def sync(self) -> None:
        """The rows so far are on disk: a checkpoint that is announced has them, also after a power cut. Raises OSError."""
        if self._unwritten:
            self._append()
        if self._is_cut:
            sync(self.path)

    def close(self) -> dict[str, Any]:
        """What the account of the training says of it: how many rows did not reach a logger, where there are any."""
        unsent = close_loggers(self._loggers)
        return {"rows_not_sent": unsent} if unsent else {}


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row for loggers; reverse KL by position under the first position of each class, from 1, as reverse_kl_by_position/00004."""
    found = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    positions = row.get("reverse_kl_by_position") or []
    return found | {f"reverse_kl_by_position/{2**p:05d}": float(value) for p, value in enumerate(positions) if value is not None}


def sample_tables(output: Path, row: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Of each evaluation that the row has, the first samples with their verdicts, by the name of the table, out of the rows that it left."""
    names = [match[1] for key in row if (match := re.fullmatch(r"eval/([^/]+)/seconds", key))]
    return {f"eval/{name}/samples": table for name in names if len(table := _samples(output, name, row["step"])) > 1}


def _samples(output: Path, name: str, step: int) -> list[list[str]]:
    table = [["prompt", "outcome", "answer", "right answer", "response"]]
    path = output / "eval" / name / f"{step_name(step).replace('_', '-')}.prompts.jsonl"
    try:
        for row in islice(read_rows(path), _SAMPLES):
            table.append([str(row.prompt), row.outcome, row.answer or "", row.gold or "", (row.response or "")[:_LONGEST_RESPONSE]])
    except (OSError, UserError):  # not graded
        return table[:1]
    return table
