"""Training: SFT and distillation differ in their loss alone. Killed anywhere, the same command goes on to the same losses."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_opd.checkpoints.checksums import content_id
from megatron_opd.convert.to_mcore import load_hf_weights
from megatron_opd.cost.meter import StageCost, open_meter
from megatron_opd.data.joined import open_training_stores
from megatron_opd.errors import Interrupted, UserError
from megatron_opd.hf.lineage import check_weights
from megatron_opd.model import parallel
from megatron_opd.model.student import build_chunks, transformer_config
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.rounds import round_recipe, round_steps, write_round
from megatron_opd.recipe.training_stages import TrainerConfig, TrainStage
from megatron_opd.records import ModelFingerprint
from megatron_opd.safety.durable import write_file
from megatron_opd.safety.locks import Lock
from megatron_opd.train.batches import BatchSource
from megatron_opd.train.checkpoint import CheckpointWriter, find_fault, load_checkpoint
from megatron_opd.train.drift import DriftRule, Watch, advice
from megatron_opd.train.evaluating import Evals
from megatron_opd.train.history import write_history
from megatron_opd.train.identity import Resumption, plan_resume
from megatron_opd.train.job import Job, Progress, describe, on_first_rank, read_step, say, step_facts, too_many_skipped
from megatron_opd.train.launch import tell_launcher
from megatron_opd.train.loss import LossFunction, make_loss, sft_loss
from megatron_opd.train.metrics import MetricsLog, ResourceMeter, console_line, step_row
from megatron_opd.train.optim import Trainee, make_trainee, optimizer_config
from megatron_opd.train.readiness import Readiness, check_loggers, check_stage
from megatron_opd.train.step import train_step
from megatron_opd.train.stop import StopRequest

_READING_SECONDS = 1.0


def run_sft(recipe: Recipe, *, allow_changes: bool = False) -> Path | None:
    """Fine-tune the base student on the teacher's answers. Returns the last checkpoint. Raises UserError, Interrupted."""
    return _run(recipe, "sft", None, allow_changes=allow_changes)


def run_train(recipe: Recipe, *, number: int | None = None, allow_changes: bool = False) -> Path | None:
    """Distil on scored rollouts, in round `number` of several. Returns the last checkpoint. Raises UserError, Interrupted.

    `allow_changes`: a run that was begun with another objective may go on with this one, which is recorded.
    """
    return _run(recipe, "train", number, allow_changes=allow_changes)


def _run(recipe: Recipe, name: str, number: int | None, *, allow_changes: bool) -> Path | None:
    with open_session(recipe, name, number, allow_changes=allow_changes) as session:
        job = prepare(session, number)
        outcome = Outcome(job.going.checkpoint, ended=True)
        if job.going.finished_round is not None:
            keep_round(job)
        else:
            trainee, progress = start_training(session, job)
            outcome = run_job(session, job, trainee, progress)
    if session.stop.interrupted and not outcome.ended:
        raise Interrupted
    return outcome.checkpoint


@dataclass
class Session:
    """The ranks of a training from their start to their end, which is one stage, or several rounds of it."""

    recipe: Recipe
    name: str
    output: Path
    device: torch.device
    stop: StopRequest
    allow_changes: bool
    lock: Lock = field(init=False)
    locked: bool = False
    listening: bool = False
    meter: Any = None
    trainee: Trainee | None = None

    def __post_init__(self) -> None:
        self.lock = Lock(self.output)

    def hold_output(self) -> None:
        if not self.locked:
            on_first_rank(self.lock.acquire)
            self.locked = True

    def listen(self) -> None:
        """From now on Ctrl-C is a request to stop."""
        if not self.listening:
            self.stop.listen_to_interrupts()
            tell_launcher()
            self.listening = True
            if self.device.type == "cuda":
                self.meter = open_meter([f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"])

    @property
    def num_gpus(self) -> int:
        return dist.get_world_size() if self.device.type == "cuda" else 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or dist.get_world_size() == 1:  # leaving a world whose other ranks may wait in a collective can block
            self.stop.close()
            if self.trainee is not None:
                self.trainee.release()
            parallel.stop()
            self.lock.release()


def open_session(recipe: Recipe, name: str, number: int | None, *, allow_changes: bool) -> Session:
    """Join the ranks. Raises ConfigError."""
    config: TrainerConfig = getattr(round_recipe(recipe, number), name)
    check_loggers(config.loggers)
    if config.deterministic:
        parallel.make_deterministic()
    device = parallel.start(config.parallel, seed=config.seed, timeout_minutes=config.process_group_minutes)
    return Session(recipe, name, Path(config.output), device, StopRequest(Path(config.output)), allow_changes)


def prepare(session: Session, number: int | None, *, in_memory: bool = False) -> Job:
    """Everything that must hold before the first step, and where it is. `in_memory`: no checkpoint will be loaded. Raises UserError."""
    recipe, name = session.recipe, session.name
    config: TrainerConfig = getattr(round_recipe(recipe, number), name)
    ready = on_first_rank(lambda: check_stage(recipe, name, number))
    stage = config if isinstance(config, TrainStage) else None
    teacher = stage.teacher if stage else None
    source = BatchSource(
        reader=open_training_stores(config.store, teacher),
        config=config,
        teacher=teacher,
        sequence_mean=stage is not None and stage.loss.normalization == "sequence",
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pad_multiple=config.token_multiple,
        cp_rank=parallel_state.get_context_parallel_rank(),
        topk=stage is not None and stage.loss.needs_topk,
        horizon=stage.loss.horizon if stage is not None else None,
        quadratic_cost=ready.arch.train_flops(0, 1) / ready.arch.train_flops(1, 0),
    )
    steps = config.steps or source.order.num_steps(config.epochs)
    session.hold_output()
    going = find_start(name, config, ready, allow_changes=session.allow_changes, in_memory=in_memory)
    first = 0
    if going.rounds:
        first = going.rounds[-1].steps_before
        steps = first + (round_steps(recipe) or 0)
    source = replace(source, first_step=first)
    job = Job(name, recipe, config, session.output, ready, going, source, steps, session.device, number, first)
    say(describe(job))
    for note in (*ready.notes, *going.notes, *(f"WARNING: {override}" for override in going.overrides)):
        say(note)
    return job


def start_training(session: Session, job: Job) -> tuple[Trainee, Progress]:
    """The student, its optimizer and where they are, from the Hugging Face directory or from the checkpoint. Raises UserError."""
    if session.trainee is not None:
        session.trainee.release()
        session.trainee = None
    trainee = session.trainee = build_trainee(job.ready, job.config, steps=job.schedule_steps, device=job.device)
    if job.going.checkpoint is None or (job.going.begins_round and job.resets):
        check_initial_weights(job.config.init, job.ready.init, job.device)
    progress = resume(job, trainee)
    session.listen()
    return trainee, progress


def run_job(session: Session, job: Job, trainee: Trainee, progress: Progress) -> Outcome:
    """The steps that are left, with their account."""
    stage = job.config if isinstance(job.config, TrainStage) else None
    facts = {} if job.number is None else {"round": job.number}
    with (
        StageCost(job.recipe.run_dir, job.name, num_gpus=session.num_gpus, facts=facts, meter=session.meter)
        if dist.get_rank() == 0
        else _NoCost() as cost
    ):
        loss = make_loss(stage.loss) if stage is not None else sft_loss
        return train(job, trainee, loss, progress, session.stop, cost, ResourceMeter(session.meter))


def find_start(name: str, config: TrainerConfig, ready: Readiness, *, allow_changes: bool, in_memory: bool = False) -> Resumption:
    """Where the run goes on: from the newest checkpoint of which every byte is as it was written.

    `in_memory`: what the checkpoint holds is in this process, which wrote it; it is not read again.
    """
    damaged: dict[Path, str] = {}
    while True:
        going = on_first_rank(lambda: plan_resume(name, config, ready.identity, allow_changes=allow_changes, damaged=damaged))
        if going.checkpoint is None or in_memory or (fault := find_fault(going.checkpoint)) is None:
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
class Outcome:
    """What a run came to: its last checkpoint, None if it was stopped before there was one, and whether all its steps are made."""

    checkpoint: Path | None
    ended: bool
    stopped: bool = False  # it was asked to, be it at its last step


def train(
    job: Job, trainee: Trainee, loss: LossFunction, progress: Progress, stop: StopRequest, cost: Any, resources: ResourceMeter
) -> Outcome:
    """The loop: batch, step, report, save."""
    config, watch = job.config, Watch(job.drift.ratio)
    drift = DriftRule(job.drift, progress.beyond_drift_limit)
    overrides = list(dict.fromkeys([*job.ready.lineage.overrides, *job.going.overrides]))
    lineage = job.ready.lineage.model_copy(update={"overrides": overrides})
    writer = CheckpointWriter(
        job.output, config.init, lineage, config.keep_last, config.keep_every, config.async_save, damaged=set(job.going.damaged)
    )
    evals = Evals(job, lineage)
    checkpoint, saved = job.going.checkpoint, progress.step
    stopping, too_far, ended_by = stop.requested(), None, None
    log = open_log(job) if progress.step < job.steps and not stopping else None
    while progress.step < job.steps and not stopping and ended_by is None:
        step, start = progress.step, time.perf_counter()
        micro_batches = read_step(job, step)
        data_seconds = time.perf_counter() - start
        result = train_step(
            trainee,
            job.ready.arch,
            loss,
            micro_batches,
            seed=config.seed + step - job.first,
            chunk_tokens=config.chunk_tokens,
            watch=watch,
        )
        if step == job.going.step:  # a start that comes to no step leaves the folder as it was
            on_first_rank(lambda: start_files(job))
        facts = step_facts(job, step, len(micro_batches), seconds=time.perf_counter() - start, data_seconds=data_seconds)
        row = step_row(result, facts, resources.read(facts.seconds)) | ({} if job.number is None else {"round": job.number})
        row |= evals.after(step + 1, trainee, writer)
        report(job, row, log)
        cost.tokens += row["batch_tokens"]
        cost.facts |= evals.facts()
        progress.count_skipped(result)
        if progress.skipped_in_a_row > config.max_skipped_steps:
            writer.finish()
            cost.facts |= log.close() if log is not None else {}
            raise too_many_skipped(job, step, result, progress)
        too_far = None if result.skipped else drift.check(row)
        progress.step, progress.beyond_drift_limit = step + 1, drift.beyond
        if progress.step == job.steps:
            ended_by = "steps"
        elif too_far and job.ends_by_drift:
            ended_by = "drift"
            say(f"{job.title} ends after step {progress.step}: {too_far}")
        elif too_far and isinstance(config, TrainStage):
            say(advice(too_far, config, job.recipe.name))
        stopping = stop.requested() or bool(too_far and job.drift.stop and ended_by is None)
        writer.poll()
        due = progress.step % config.save_every == 0 or ended_by or stopping
        if due and progress.step - job.optimizer_first > progress.skipped:  # an optimizer without a step has no state to save
            on_first_rank(lambda: log and log.sync())  # what a checkpoint covers is on disk before it is announced
            checkpoint, saved = writer.save(trainee, progress.state(job, ended_by)), progress.step
            on_first_rank(cost.keep)
    writer.finish()
    cost.facts |= {"skipped_steps": progress.skipped} if progress.skipped else {}
    if (energy := resources.total_energy()) is not None:
        cost.facts["energy_joules"] = energy
    cost.facts |= log.close() if log is not None else {}
    if stopping:
        stop.done()
    if stopping and progress.step < job.steps and ended_by is None:
        why = "by the drift rule" if too_far else "as asked"
        say(f"{job.name}: stopped after step {saved} {why}; the same command goes on from {checkpoint or 'the start'}")
        return Outcome(checkpoint, ended=False, stopped=True)
    if checkpoint is None or (job.number is not None and saved < progress.step):
        raise UserError(
            f"{job.title}: all {progress.step - job.first} steps were skipped as their loss or gradient is not finite; there is nothing to save"
        )
    say(f"{job.title}: {checkpoint}")
    if ended_by is not None and job.number is not None:
        ended = replace(job.going.rounds[-1], last_step=progress.step, ended_by=ended_by)
        on_first_rank(lambda: write_round(job.recipe, ended, content_id(checkpoint)))
    return Outcome(checkpoint, ended=True, stopped=stopping)


def keep_round(job: Job) -> None:
    """A round that has ended is left as it is; its file is written where a kill came before that."""
    ended, going = job.going.finished_round, job.going
    if ended is None or going.checkpoint is None:
        return
    say(f"{job.title} has ended: steps {ended.first_step} to {ended.last_step}")
    content = content_id(going.checkpoint) if going.step == ended.last_step else ended.content
    on_first_rank(lambda: write_round(job.recipe, ended, content))


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
    students = build_chunks(ready.arch, model_config, longest=config.micro_batch_tokens)
    for student in students:
        student.to(device)
        load_hf_weights(student, ready.arch, config.init)
    return make_trainee(students, config, steps=steps)


def resume(job: Job, trainee: Trainee) -> Progress:
    """Load the run's last checkpoint if it has one. Raises CheckpointError."""
    going = job.going
    if going.checkpoint is None:
        return Progress()
    if not (going.begins_round and job.resets):
        load_checkpoint(going.checkpoint, trainee)
    progress = progress_of(job)
    if progress.step > job.optimizer_first:
        trainee.scheduler.step(increment=progress.step - job.optimizer_first)
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


def progress_of(job: Job) -> Progress:
    """What the checkpoint says of it."""
    progress = Progress(**{field.name: int(job.going.state.get(field.name, 0)) for field in fields(Progress)})
    if job.going.begins_round:
        progress.begin_round(job)
    return progress


def report(job: Job, row: dict[str, Any], log: MetricsLog | None) -> None:
    """Log a step on the first rank."""
    if log is not None:
        log.write(row)
        step = row["step"]
        log.pace.made(step, row["seconds"], time.monotonic())
        if step == 1 or step % job.config.log_every == 0 or step == job.steps or row["skipped"]:
            print(console_line(row, total=job.total, distils=job.name == "train", left=log.pace.left(job.total)), flush=True)


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
