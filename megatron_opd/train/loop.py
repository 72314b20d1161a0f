"""Training: SFT and distillation differ in their loss alone. Killed anywhere, the same command goes on to the same losses."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_opd.config import Recipe, TrainerConfig
from megatron_opd.convert.to_mcore import load_hf_weights
from megatron_opd.cost import StageCost, append_jsonl, provenance, read_jsonl
from megatron_opd.data.order import num_steps
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import CheckpointError, UserError
from megatron_opd.model import parallel
from megatron_opd.model.student import build_student, transformer_config
from megatron_opd.train.batches import BatchSource
from megatron_opd.train.checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from megatron_opd.train.loss import opd_loss, sft_loss
from megatron_opd.train.metrics import console_line, step_row
from megatron_opd.train.optim import Trainee, make_trainee
from megatron_opd.train.readiness import Readiness, check_sft, check_train
from megatron_opd.train.step import LossFunction, train_step

T = TypeVar("T")
# Settings that decide which rollouts are in which step; they can't change between a run and its resume.
_POSITION_FIELDS = ("store", "seed", "global_batch", "max_response_tokens", "teacher")


def run_sft(recipe: Recipe) -> Path:
    """Fine-tune the base student on the teacher's answers. Returns the last checkpoint."""
    return _run(recipe, "sft", recipe.sft, lambda: check_sft(recipe.sft), sft_loss, sequence_mean=False, teacher=None)


def run_train(recipe: Recipe) -> Path:
    """Distil on scored rollouts. Returns the last checkpoint."""
    stage = recipe.train
    loss = partial(opd_loss, advantage_clip=stage.loss.advantage_clip)
    return _run(
        recipe,
        "train",
        stage,
        lambda: check_train(stage),
        loss,
        sequence_mean=stage.loss.normalization == "sequence",
        teacher=stage.teacher,
    )


def _run(
    recipe: Recipe,
    name: str,
    config: TrainerConfig,
    check: Callable[[], Readiness],
    loss: LossFunction,
    *,
    sequence_mean: bool,
    teacher: str | None,
) -> Path:
    device = parallel.start(config.parallel, seed=config.seed)
    ready = on_first_rank(check)
    source = BatchSource(
        reader=StoreReader(config.store),
        config=config,
        teacher=teacher,
        sequence_mean=sequence_mean,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pad_multiple=config.parallel.tp,
    )
    steps = config.steps or num_steps(len(source.reader), global_batch=config.global_batch, epochs=config.epochs)
    job = Job(name, config, Path(config.output), ready, source, steps, device, position=position_of(config, source.reader))
    say(describe(job))
    for note in ready.notes:
        say(note)
    trainee = build_trainee(ready, config, steps=steps, device=device)
    first_step = resume(job, trainee)
    job.start_files(recipe, first_step)
    with (
        StageCost(recipe.run_dir, name, num_gpus=dist.get_world_size() if device.type == "cuda" else 0)
        if dist.get_rank() == 0
        else _NoCost() as cost
    ):
        checkpoint = train(job, trainee, loss, first_step, cost)
    parallel.stop()
    return checkpoint


@dataclass(frozen=True)
class Job:
    """What a run is, the same on every rank."""

    name: str
    config: TrainerConfig
    output: Path
    ready: Readiness
    source: BatchSource
    steps: int
    device: torch.device
    position: dict[str, Any]

    def start_files(self, recipe: Recipe, first_step: int) -> None:
        """Write the resolved recipe, and cut metrics of steps that will be made again."""
        if dist.get_rank() == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "recipe.toml").write_text(recipe.to_toml())
            rows = [row for row in read_jsonl(self.output / "metrics.jsonl") if row["step"] <= first_step]
            (self.output / "metrics.jsonl").unlink(missing_ok=True)
            for row in rows:
                append_jsonl(self.output / "metrics.jsonl", row)

    def save(self, trainee: Trainee, step: int) -> Path:
        state = {"step": step, "consumed_rollouts": step * self.config.global_batch, "position": self.position, **provenance()}
        return save_checkpoint(
            self.output, trainee, state, init=self.config.init, lineage=self.ready.lineage, keep_last=self.config.keep_last
        )


def train(job: Job, trainee: Trainee, loss: LossFunction, first_step: int, cost: Any) -> Path:
    """The loop: batch, step, report, save."""
    stop = StopRequest()
    checkpoint = latest_checkpoint(job.output)
    for step in range(first_step, job.steps):
        start = time.perf_counter()
        micro_batches = [batch.to(job.device) for batch in job.source.micro_batches(step)]
        result = train_step(trainee, job.ready.arch, loss, micro_batches, seed=job.config.seed + step)
        check_finite(job, step, result.grad_norm)
        row = report(job, step, result, seconds=time.perf_counter() - start)
        cost.tokens += row["batch_tokens"]
        done, stopping = step + 1, stop.requested()
        if done % job.config.save_every == 0 or done == job.steps or stopping:
            checkpoint = job.save(trainee, done)
        if stopping and done < job.steps:
            say(f"{job.name}: stopped after step {done} as asked; the same command goes on from {checkpoint}")
            break
    stop.close()
    assert checkpoint is not None
    say(f"{job.name}: {checkpoint}")
    return checkpoint


def build_trainee(ready: Readiness, config: TrainerConfig, *, steps: int, device: torch.device) -> Trainee:
    """The student with the initial Hugging Face weights, wrapped for training."""
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    student = build_student(
        ready.arch, transformer_config(ready.arch, parallel=config.parallel, dtype=getattr(torch, name), recompute=config.recompute)
    )
    student.to(device)
    load_hf_weights(student, ready.arch, config.init)
    return make_trainee(student, config, steps=steps)


def resume(job: Job, trainee: Trainee) -> int:
    """Load the run's last checkpoint if it has one; returns the step to go on with. Raises CheckpointError for another run's."""
    checkpoint = latest_checkpoint(job.output)
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    for key, value in job.position.items():
        if state["position"].get(key) != value:
            raise CheckpointError(
                f"{checkpoint}: made with {key} = {state['position'].get(key)!r}, now {value!r}; a resumed run must read the same data: use that setting, or another output"
            )
    load_checkpoint(checkpoint, trainee)
    step = int(state["step"])
    if step:
        trainee.scheduler.step(increment=step)
    say(f"{job.name}: going on after step {step} from {checkpoint}")
    return step


def position_of(config: TrainerConfig, reader: StoreReader) -> dict[str, Any]:
    """What decides the order of the data, for the checkpoint."""
    fields = {key: getattr(config, key) for key in _POSITION_FIELDS if hasattr(config, key)}
    return fields | {
        "num_rollouts": len(reader),
        "student": reader.manifest.sampler.weights_sha256,
        "num_tokens": int(reader.lengths.sum()),
    }


def report(job: Job, step: int, result: Any, *, seconds: float) -> dict[str, Any]:
    """Log a step on the first rank."""
    lengths = job.source.lengths(job.source.step_rollouts(step))
    tokens = int(lengths.sum())
    flops = job.ready.arch.train_flops(tokens, int((lengths**2).sum()))
    row = step_row(step + 1, result, seconds=seconds, batch_tokens=tokens, flops=flops, num_ranks=dist.get_world_size())
    if dist.get_rank() == 0:
        append_jsonl(job.output / "metrics.jsonl", row)
        if step == 0 or (step + 1) % job.config.log_every == 0 or step + 1 == job.steps:
            print(console_line(row, total=job.steps, distils=job.name == "train"), flush=True)
    return row


def check_finite(job: Job, step: int, grad_norm: float) -> None:
    """Raise UserError if the step's loss or gradient is not a number; the checkpoint on disk is from before it."""
    if not math.isfinite(grad_norm):
        rollouts = ", ".join(map(str, job.source.step_rollouts(step)[:20].tolist()))
        raise UserError(
            f"{job.name}: loss or gradient of step {step + 1} is not finite; rollouts (global index): {rollouts}; nothing of this step was saved"
        )


class StopRequest:
    """SIGTERM and SIGUSR1 ask the run to finish its step, save and exit; every rank hears of a signal to any.

    Slurm gives a signal to every process of a step, also to those that are writing a checkpoint, and its job script repeats SIGUSR1:
    they must live through it. What this thread starts inherits that SIGUSR1 is blocked.
    """

    def __init__(self) -> None:
        self._flag = torch.zeros(1)
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGUSR1)}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def _set(self, number: int, frame: Any) -> None:
        self._flag.fill_(1.0)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # one that waited comes to the handler now
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        flag = self._flag.clone()
        if signal.SIGUSR1 in signal.sigpending():  # no other thread took it
            flag.fill_(1.0)
        if torch.cuda.is_available():
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


class _NoCost:
    """Ranks other than the first write no cost row."""

    tokens = 0

    def __enter__(self) -> _NoCost:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def on_first_rank(function: Callable[[], T]) -> T:
    """Run on rank 0 alone; its result, or its UserError, is everybody's."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def describe(job: Job) -> str:
    p = job.config.parallel
    return (
        f"{job.name}: {job.ready.arch.num_parameters / 1e6:.1f}M parameters from {job.config.init}; {len(job.source.reader)} rollouts, {job.steps} steps of "
        f"{job.config.global_batch}; tp {p.tp} x pp {p.pp} x dp {job.source.dp_size} on {dist.get_world_size()} rank(s), {job.device.type}"
    )
