"""What a training is, or one round of several, and how its ranks speak with one voice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_opd.checkpoints.saved import LATEST, checkpoint_folder
from megatron_opd.cost.meter import provenance
from megatron_opd.errors import UserError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.objective import DriftConfig
from megatron_opd.recipe.training_stages import TrainerConfig, TrainStage
from megatron_opd.train.batches import BatchSource, MicroBatch
from megatron_opd.train.identity import Resumption
from megatron_opd.train.launch import threads_alone
from megatron_opd.train.metrics import StepFacts
from megatron_opd.train.readiness import Readiness
from megatron_opd.train.step import StepResult

T = TypeVar("T")

_WAIT = timedelta(seconds=60)
_turns = itertools.count()


@dataclass(frozen=True)
class Job:
    """What a run is, or a round of several; the same on every rank.

    `config` is the stage as the round sees it. Steps count through all rounds: this one's are those after `first` up to `steps`.
    """

    name: str
    recipe: Recipe
    config: TrainerConfig
    output: Path
    ready: Readiness
    going: Resumption
    source: BatchSource
    steps: int
    device: torch.device
    number: int | None = None  # of several rounds
    first: int = 0

    @property
    def drift(self) -> DriftConfig:
        drift = self.config.drift if isinstance(self.config, TrainStage) else DriftConfig()
        return drift.model_copy(update={"stop": True}) if self.ends_by_drift else drift

    @property
    def ends_by_drift(self) -> bool:
        return self.number is not None and self.recipe.rounds.until == "drift"

    @property
    def resets(self) -> bool:
        """Whether each round has an optimizer and a schedule of its own, beginning with the converted student."""
        return self.number is not None and self.recipe.rounds.optimizer == "reset"

    @property
    def total(self) -> int:
        """Steps of all rounds, at most."""
        return self.steps if self.number is None else self.config.steps or self.steps

    @property
    def schedule_steps(self) -> int:
        return self.steps - self.first if self.resets else self.total

    @property
    def optimizer_first(self) -> int:
        """Steps that the optimizer has not seen: those before it was made."""
        return self.first if self.resets else 0

    @property
    def title(self) -> str:
        return self.name if self.number is None else f"{self.name}: round {self.number} of {self.recipe.rounds.count}"


@dataclass
class Progress:
    """What a checkpoint keeps of the run beside weights and optimizer."""

    step: int = 0  # finished ones
    skipped: int = 0
    skipped_in_a_row: int = 0
    beyond_drift_limit: int = 0

    def count_skipped(self, result: StepResult) -> None:
        self.skipped += result.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0

    def begin_round(self, job: Job) -> None:
        """Nothing of the rounds before counts for the drift rule, nor for the optimizer if that is a new one."""
        self.skipped_in_a_row = self.beyond_drift_limit = 0
        if job.resets:
            self.skipped = 0

    def state(self, job: Job, ended_by: str | None = None) -> dict[str, Any]:
        """For a checkpoint; `ended_by`: 'steps' or 'drift' if the round, of several, ends with it."""
        counts = {key: value for key, value in vars(self).items() if key != "step"}
        settings = job.ready.identity.state() | {"overrides": job.going.overrides}
        state = {"step": self.step, "steps": job.steps, **settings, **counts, **provenance()}
        if job.going.rounds:
            *before, now = job.going.rounds
            ended = replace(now, last_step=self.step, ended_by=ended_by) if ended_by else now
            state["rounds"] = [entry.record() for entry in (*before, ended)]
        return state


def read_step(job: Job, step: int) -> list[MicroBatch]:
    """This rank's micro-batches, for a GPU in pinned memory. What is wrong with its data only this rank knows."""
    try:
        batches = job.source.micro_batches(step)
        return [batch.pinned() for batch in batches] if job.device.type == "cuda" else batches
    except UserError as error:
        error.rank = dist.get_rank()
        raise


def step_facts(job: Job, step: int, micro_batches: int, *, seconds: float, data_seconds: float) -> StepFacts:
    source, rollouts = job.source, job.source.step_rollouts(step)
    lengths = source.lengths(rollouts, step)
    return StepFacts(
        step=step + 1,
        epoch=source.order.epochs(step + 1 - job.first),
        lengths=lengths,
        response_lengths=lengths - source.reader.prompt_lens[rollouts],
        flops=job.ready.arch.train_flops(int(lengths.sum()), int((lengths**2).sum())),
        micro_batches=micro_batches,
        seconds=seconds,
        data_seconds=data_seconds,
        num_ranks=dist.get_world_size(),
        horizon=source.horizon.at(step) if source.horizon else None,
    )


def too_many_skipped(job: Job, step: int, result: StepResult, progress: Progress) -> UserError:
    rollouts = ", ".join(map(str, job.source.step_rollouts(step).tolist()))
    return UserError(
        f"{job.name}: loss or gradient of step {step + 1} is not finite (loss {result.sums.loss / result.sums.denominator}, gradient norm "
        f"{result.grad_norm}), after {progress.skipped_in_a_row - 1} skipped steps in a row; weights are those from before them. "
        f"Look at the rollouts (global index) {rollouts}; a lower lr, or another checkpoint in {checkpoint_folder(job.output) / LATEST}, may help"
    )


def on_first_rank(function: Callable[[], T]) -> T:
    """Run on rank 0 alone; its result, or its UserError or OSError, is everybody's."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def while_others_wait(function: Callable[[], T]) -> T:
    """As `on_first_rank`, for what may take hours: the other ranks sleep meanwhile, and the first has their cores."""
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"opd_turn_{next(_turns)}"
    answer: Callable[[], T]
    if dist.get_rank() == 0:
        try:
            with _cores_of_all():
                result = function()
            answer = lambda: result  # noqa: E731
        except (UserError, OSError) as error:
            answer = partial(_raise, error)
        store.set(key, "done")
    else:
        answer = partial(_raise, AssertionError("the first rank's"))
        while True:
            with contextlib.suppress(dist.DistStoreError):  # not yet
                store.wait([key], _WAIT)
                break
    return on_first_rank(answer)


def _raise(error: BaseException) -> Any:
    raise error


@contextlib.contextmanager
def _cores_of_all() -> Iterator[None]:
    before, alone = torch.get_num_threads(), threads_alone()
    torch.set_num_threads(alone or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def describe(job: Job) -> str:
    p = job.config.parallel
    return (
        f"{job.title}: {job.ready.arch.num_parameters / 1e6:.1f}M parameters from {job.config.init}; {len(job.source.reader)} rollouts, {job.steps - job.first} steps of "
        f"{job.config.batch}; tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {job.source.dp_size}{f' (ep {p.ep})' if p.ep > 1 else ''} on {dist.get_world_size()} rank(s), {job.device.type}"
    )
