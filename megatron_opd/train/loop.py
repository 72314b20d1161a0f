"""Training: SFT and distillation differ in their loss alone. Killed anywhere, the same command goes on to the same losses."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_opd.config import DriftConfig, Recipe, TrainerConfig, TrainStage
from megatron_opd.convert.to_mcore import load_hf_weights
from megatron_opd.cost import StageCost, open_meter, provenance
from megatron_opd.data.joined import open_training_stores
from megatron_opd.data.order import num_steps
from megatron_opd.durable import write_file
from megatron_opd.errors import Interrupted, UserError
from megatron_opd.lineage import check_weights
from megatron_opd.model import parallel
from megatron_opd.model.student import build_chunks, transformer_config
from megatron_opd.records import ModelFingerprint
from megatron_opd.saved import LATEST, checkpoint_folder
from megatron_opd.train.batches import BatchSource, MicroBatch
from megatron_opd.train.checkpoint import CheckpointWriter, find_fault, load_checkpoint
from megatron_opd.train.drift import DriftRule, Watch, advice
from megatron_opd.train.identity import Resumption, plan_resume
from megatron_opd.train.launch import tell_launcher
from megatron_opd.train.loss import LossFunction, make_loss, sft_loss
from megatron_opd.train.metrics import MetricsLog, ResourceMeter, StepFacts, console_line, step_row
from megatron_opd.train.optim import Trainee, make_trainee, optimizer_config
from megatron_opd.train.readiness import Readiness, check_loggers, check_stage
from megatron_opd.train.resume import OutputLock, write_history
from megatron_opd.train.step import StepResult, train_step
from megatron_opd.train.stop import StopRequest

T = TypeVar("T")

_READING_SECONDS = 1.0


def run_sft(recipe: Recipe, *, allow_changes: bool = False) -> Path | None:
    """Fine-tune the base student on the teacher's answers. Returns the last checkpoint. Raises UserError, Interrupted."""
    return _run(recipe, "sft", recipe.sft, sft_loss, allow_changes=allow_changes, sequence_mean=False, teacher=None)


def run_train(recipe: Recipe, *, allow_changes: bool = False) -> Path | None:
    """Distil on scored rollouts. Returns the last checkpoint. Raises UserError, Interrupted.

    `allow_changes`: a run that was begun with another objective may go on with this one, which is recorded.
    """
    stage = recipe.train
    return _run(
        recipe,
        "train",
        stage,
        make_loss(stage.loss),
        allow_changes=allow_changes,
        sequence_mean=stage.loss.normalization == "sequence",
        teacher=stage.teacher,
        topk=stage.loss.needs_topk,
    )


def _run(
    recipe: Recipe,
    name: str,
    config: TrainerConfig,
    loss: LossFunction,
    *,
    allow_changes: bool,
    sequence_mean: bool,
    teacher: str | None,
    topk: bool = False,
) -> Path | None:
    check_loggers(config.loggers)
    if config.deterministic:
        parallel.make_deterministic()
    device = parallel.start(config.parallel, seed=config.seed, timeout_minutes=config.process_group_minutes)
    stop = StopRequest(Path(config.output))
    ready = on_first_rank(lambda: check_stage(recipe, name))
    source = BatchSource(
        reader=open_training_stores(config.store, teacher),
        config=config,
        teacher=teacher,
        sequence_mean=sequence_mean,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pad_multiple=config.token_multiple,
        cp_rank=parallel_state.get_context_parallel_rank(),
        topk=topk,
        quadratic_cost=ready.arch.train_flops(0, 1) / ready.arch.train_flops(1, 0),
    )
    steps = config.steps or num_steps(len(source.reader), global_batch=config.global_batch, epochs=config.epochs)
    lock = OutputLock(Path(config.output))
    on_first_rank(lock.acquire)
    going = find_start(name, config, ready, allow_changes=allow_changes)
    job = Job(name, recipe, config, Path(config.output), ready, going, source, steps, device)
    say(describe(job))
    for note in (*ready.notes, *going.notes, *(f"WARNING: {override}" for override in going.overrides)):
        say(note)
    trainee = build_trainee(ready, config, steps=steps, device=device)
    if going.checkpoint is None:
        check_initial_weights(config.init, ready.init, device)
    progress = resume(job, trainee)
    stop.listen_to_interrupts()
    tell_launcher()
    meter = open_meter([f"GPU-{torch.cuda.get_device_properties(device).uuid}"]) if device.type == "cuda" else None
    with (
        StageCost(recipe.run_dir, name, num_gpus=dist.get_world_size() if device.type == "cuda" else 0, meter=meter)
        if dist.get_rank() == 0
        else _NoCost() as cost
    ):
        checkpoint = train(job, trainee, loss, progress, stop, cost, ResourceMeter(meter))
    stop.close()
    parallel.stop()
    lock.release()
    if stop.interrupted and progress.step < steps:
        raise Interrupted
    return checkpoint


def find_start(name: str, config: TrainerConfig, ready: Readiness, *, allow_changes: bool) -> Resumption:
    """Where the run goes on: from the newest checkpoint of which every byte is as it was written."""
    damaged: dict[Path, str] = {}
    while True:
        going = on_first_rank(lambda: plan_resume(name, config, ready.identity, allow_changes=allow_changes, damaged=damaged))
        if going.checkpoint is None or (fault := find_fault(going.checkpoint)) is None:
            return going
        damaged[going.checkpoint] = fault


def check_initial_weights(directory: str, model: ModelFingerprint, device: torch.device) -> None:
    """The weights that were loaded are those that the checks took them for: the first rank reads every byte.

    The checks go by the files' times where they can, which can lie. Raises LineageError.
    """
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(check_weights, directory, model) if dist.get_rank() == 0 else None
        busy = torch.ones(1, device=device)
        while busy.item():  # a large model may take longer to read than a collective may wait
            busy.fill_(reading is not None and not reading.done())
            dist.all_reduce(busy)
            time.sleep(_READING_SECONDS if busy.item() else 0)
        on_first_rank(lambda: reading.result() if reading else None)


@dataclass(frozen=True)
class Job:
    """What a run is, the same on every rank."""

    name: str
    recipe: Recipe
    config: TrainerConfig
    output: Path
    ready: Readiness
    going: Resumption
    source: BatchSource
    steps: int
    device: torch.device

    @property
    def drift(self) -> DriftConfig:
        return self.config.drift if isinstance(self.config, TrainStage) else DriftConfig()


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

    def state(self, job: Job) -> dict[str, Any]:
        counts = {key: value for key, value in vars(self).items() if key != "step"}
        consumed = self.step * job.config.global_batch
        settings = job.ready.identity.state() | {"overrides": job.going.overrides}
        return {"step": self.step, "steps": job.steps, "consumed_rollouts": consumed, **settings, **counts, **provenance()}


def train(
    job: Job, trainee: Trainee, loss: LossFunction, progress: Progress, stop: StopRequest, cost: Any, resources: ResourceMeter
) -> Path | None:
    """The loop: batch, step, report, save. Returns the last checkpoint, None if it was stopped before there was one."""
    config, watch = job.config, Watch(job.drift.ratio)
    drift = DriftRule(job.drift, progress.beyond_drift_limit)
    overrides = [*job.ready.lineage.overrides, *job.going.overrides]
    lineage = job.ready.lineage.model_copy(update={"overrides": overrides})
    writer = CheckpointWriter(
        job.output, config.init, lineage, config.keep_last, config.keep_every, config.async_save, damaged=set(job.going.damaged)
    )
    checkpoint, saved = job.going.checkpoint, progress.step
    stopping, too_far = stop.requested(), None
    log = open_log(job) if progress.step < job.steps and not stopping else None
    while progress.step < job.steps and not stopping:
        step, start = progress.step, time.perf_counter()
        micro_batches = read_step(job, step)
        data_seconds = time.perf_counter() - start
        result = train_step(
            trainee, job.ready.arch, loss, micro_batches, seed=config.seed + step, chunk_tokens=config.chunk_tokens, watch=watch
        )
        if step == job.going.step:  # a start that comes to no step leaves the folder as it was
            on_first_rank(lambda: start_files(job))
        facts = step_facts(job, step, len(micro_batches), seconds=time.perf_counter() - start, data_seconds=data_seconds)
        row = step_row(result, facts, resources.read(facts.seconds))
        report(job, row, log)
        cost.tokens += row["batch_tokens"]
        progress.count_skipped(result)
        if progress.skipped_in_a_row > config.max_skipped_steps:
            writer.finish()
            raise too_many_skipped(job, step, result, progress)
        too_far = None if result.skipped else drift.check(row)
        progress.step, progress.beyond_drift_limit = step + 1, drift.beyond
        if too_far:
            say(advice(too_far, config.output, job.recipe.name))
        stopping = stop.requested() or bool(too_far and job.drift.stop)
        writer.poll()
        due = progress.step % config.save_every == 0 or progress.step == job.steps or stopping
        if due and progress.step > progress.skipped:  # an optimizer without a step has no state to save
            on_first_rank(lambda: log and log.sync())  # what a checkpoint covers is on disk before it is announced
            checkpoint, saved = writer.save(trainee, progress.state(job)), progress.step
            on_first_rank(cost.keep)
    writer.finish()
    cost.facts |= {"skipped_steps": progress.skipped} if progress.skipped else {}
    if (energy := resources.total_energy()) is not None:
        cost.facts["energy_joules"] = energy
    if log is not None:
        log.close()
    if stopping:
        stop.done()
    if stopping and progress.step < job.steps:
        why = "by the drift rule" if too_far else "as asked"
        say(f"{job.name}: stopped after step {saved} {why}; the same command goes on from {checkpoint or 'the start'}")
    elif checkpoint is None:
        raise UserError(
            f"{job.name}: all {progress.step} steps were skipped as their loss or gradient is not finite; there is nothing to save"
        )
    else:
        say(f"{job.name}: {checkpoint}")
    return checkpoint


def read_step(job: Job, step: int) -> list[MicroBatch]:
    """This rank's micro-batches. What is wrong with its data only this rank knows."""
    try:
        return [batch.to(job.device) for batch in job.source.micro_batches(step)]
    except UserError as error:
        error.rank = dist.get_rank()
        raise


def open_log(job: Job) -> MetricsLog | None:
    """On the first rank, where steps are logged; rows of steps that will be made again are cut when the first of them is."""
    box: list[MetricsLog] = []
    settings = job.recipe.recorded()
    on_first_rank(lambda: box.append(MetricsLog(job.output, job.config, first_step=job.going.step, settings=settings)))
    return box[0] if box else None


def start_files(job: Job) -> None:
    """Write down what the steps from here on are made with: the resolved recipe, and what of it changed."""
    write_file(job.output / "recipe.toml", job.recipe.to_toml())
    write_history(job.output, job.going)


def build_trainee(ready: Readiness, config: TrainerConfig, *, steps: int, device: torch.device) -> Trainee:
    """The student with the initial Hugging Face weights, wrapped for training."""
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    optimizer_config(config, bf16=name == "bfloat16")  # what this machine can't do is refused before weights are read
    model_config = transformer_config(
        ready.arch,
        parallel=config.parallel,
        dtype=getattr(torch, name),
        recompute=config.recompute,
        recompute_modules=config.recompute_modules,
        fp8=config.fp8,
        deterministic=config.deterministic,
    )
    students = build_chunks(ready.arch, model_config)
    for student in students:
        student.to(device)
        load_hf_weights(student, ready.arch, config.init)
    return make_trainee(students, config, steps=steps)


def resume(job: Job, trainee: Trainee) -> Progress:
    """Load the run's last checkpoint if it has one. Raises CheckpointError."""
    going = job.going
    if going.checkpoint is None:
        return Progress()
    load_checkpoint(going.checkpoint, trainee)
    progress = Progress(**{field.name: int(going.state.get(field.name, 0)) for field in fields(Progress)})
    if progress.step:
        trainee.scheduler.step(increment=progress.step)
    say(f"{job.name}: going on after step {progress.step} from {going.checkpoint}")
    if going.unrecorded:
        say(
            f"{job.name}: an older version wrote it and did not record {', '.join(going.unrecorded)}: that these are as they were is not checked"
        )
    if going.settings:
        say(f"{job.name}: settings that were others before: {', '.join(going.settings)}")
    if progress.step > job.steps:
        say(f"{job.name}: that is past the {job.steps} steps asked for: nothing to do")
    return progress


def step_facts(job: Job, step: int, micro_batches: int, *, seconds: float, data_seconds: float) -> StepFacts:
    source, rollouts = job.source, job.source.step_rollouts(step)
    lengths = source.lengths(rollouts)
    return StepFacts(
        step=step + 1,
        epoch=(step + 1) * job.config.global_batch / len(source.reader),
        lengths=lengths,
        response_lengths=lengths - source.reader.prompt_lens[rollouts],
        flops=job.ready.arch.train_flops(int(lengths.sum()), int((lengths**2).sum())),
        micro_batches=micro_batches,
        seconds=seconds,
        data_seconds=data_seconds,
        num_ranks=dist.get_world_size(),
    )


def report(job: Job, row: dict[str, Any], log: MetricsLog | None) -> None:
    """Log a step on the first rank."""
    if log is not None:
        log.write(row)
        step = row["step"]
        log.pace.made(step, row["seconds"], time.monotonic())
        if step == 1 or step % job.config.log_every == 0 or step == job.steps or row["skipped"]:
            print(console_line(row, total=job.steps, distils=job.name == "train", left=log.pace.left(job.steps)), flush=True)


def too_many_skipped(job: Job, step: int, result: StepResult, progress: Progress) -> UserError:
    rollouts = ", ".join(map(str, job.source.step_rollouts(step).tolist()))
    return UserError(
        f"{job.name}: loss or gradient of step {step + 1} is not finite (loss {result.sums.loss / result.sums.denominator}, gradient norm "
        f"{result.grad_norm}), after {progress.skipped_in_a_row - 1} skipped steps in a row; weights are those from before them. "
        f"Look at the rollouts (global index) {rollouts}; a lower lr, or another checkpoint in {checkpoint_folder(job.output) / LATEST}, may help"
    )


class _NoCost:
    """Ranks other than the first write no cost row."""

    def __init__(self) -> None:
        self.tokens = 0
        self.facts: dict[str, Any] = {}

    def keep(self) -> None:
        pass

    def __enter__(self) -> _NoCost:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


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


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def describe(job: Job) -> str:
    p = job.config.parallel
    return (
        f"{job.name}: {job.ready.arch.num_parameters / 1e6:.1f}M parameters from {job.config.init}; {len(job.source.reader)} rollouts, {job.steps} steps of "
        f"{job.config.global_batch}; tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {job.source.dp_size}{f' (ep {p.ep})' if p.ep > 1 else ''} on {dist.get_world_size()} rank(s), {job.device.type}"
    )
