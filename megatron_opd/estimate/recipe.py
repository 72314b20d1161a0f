"""What a whole recipe would cost: a line for every stage, their sum, and what would not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_opd.checks.calibrate import SHARE_FOR_WEIGHTS
from megatron_opd.cost.gpus import Gpu
from megatron_opd.data.order import num_steps
from megatron_opd.errors import UserError
from megatron_opd.estimate.allocation import Allocation, Role, check_allocation, plan_serving
from megatron_opd.estimate.compute import START_SECONDS, Sampling, Serving, predict_speed, sampling_hours, scoring_hours
from megatron_opd.estimate.memory import GIB, Layout, Memory, check_fits, describe
from megatron_opd.estimate.ranges import NOTHING, Range, exactly
from megatron_opd.estimate.storage import (
    candidate_bytes,
    checkpoint_bytes,
    conversion_memory,
    model_bytes,
    num_checkpoints,
    save_memory,
    store_bytes,
)
from megatron_opd.estimate.workload import (
    Lengths,
    Model,
    count_prompts,
    find_teacher,
    longest_response,
    sampled_lengths,
    student_of,
    trained_lengths,
)
from megatron_opd.pipeline.stages import Stage, evaluation_at, list_stages
from megatron_opd.recipe.cluster import limit_hours
from megatron_opd.recipe.config import Recipe, SampleStage
from megatron_opd.recipe.evaluation import Evaluation
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

PER = 1000  # prompts, where nobody knows how many there are
HOUR = 3600


@dataclass(frozen=True)
class Row:
    """What a stage takes in all its runs; `per`: of so many prompts, as their number is not known."""

    stage: str
    what: str
    tokens: Range = NOTHING
    gpu_hours: Range | None = NOTHING  # None: not known
    disk: Range = NOTHING
    runs: int = 1
    per: int | None = None
    gpus: int | None = None  # where not all are used

    def wall(self, gpus: int) -> Range | None:
        """Hours of all runs, on `gpus` in all."""
        return None if self.gpu_hours is None else self.gpu_hours * (1 / (self.gpus or gpus))

    def times(self, runs: int) -> Row:
        hours = None if self.gpu_hours is None else self.gpu_hours * runs
        return replace(self, tokens=self.tokens * runs, gpu_hours=hours, disk=self.disk * runs, runs=runs)


@dataclass(frozen=True)
class Estimate:
    """`rows` in the order of the run; `lines` say what they rest on."""

    rows: list[Row]
    lines: list[str]
    notes: list[str]
    gpus: int

    @property
    def gpu_hours(self) -> Range:
        """Of all stages whose amount of work is known."""
        return sum((row.gpu_hours for row in self.rows if row.gpu_hours is not None and row.per is None), NOTHING)

    @property
    def disk(self) -> Range:
        """Bytes, of the same stages."""
        return sum((row.disk for row in self.rows if row.per is None), NOTHING)


class Estimator:
    """The stages of one recipe on one allocation. Raises UserError for what can't fit or does not divide."""

    def __init__(self, recipe: Recipe, allocation: Allocation, gpu: Gpu):
        self.recipe, self.allocation, self.gpu = recipe, allocation, gpu
        self.notes = check_allocation(recipe, allocation)
        asked = Allocation(recipe.slurm.nodes, recipe.slurm.gpus_per_node)
        self.slurm = recipe.slurm if replace(allocation, memory_gib=None) == asked else None  # where slurm/pipeline.sh asks for these GPUs
        self.student = student_of(recipe)
        assert self.student.arch is not None
        self.arch: Architecture = self.student.arch
        self.teachers: dict[str, Model] = {}
        self.lines: list[str] = []

    def estimate(self) -> Estimate:
        runs: dict[str, int] = {}
        stages: dict[str, Stage] = {}
        for stage in list_stages(self.recipe):
            runs[stage.name] = runs.get(stage.name, 0) + 1
            stages.setdefault(stage.name, stage)
        teacher = self._teacher(self.recipe.models.teacher)
        once = [self._row(stage) for stage in stages.values()]
        self.notes += self._over_time(once)
        rows = [self._models(teacher), *(row.times(runs[row.stage]) for row in once)]
        head = [self.student.describe("student"), *(model.describe("teacher") for model in self.teachers.values())]
        gpu = self.gpu
        head.append(
            f"{self.allocation}: {gpu.name} of {gpu.memory_gib:g} GiB, {gpu.bf16_flops / 1e12:.0f} TFLOP/s in bf16, {gpu.bytes_per_second / 1e12:.2f} TB/s"
        )
        return Estimate(rows, head + self.lines, self.notes, self.allocation.gpus)

    def _row(self, stage: Stage) -> Row:
        recipe, name = self.recipe, stage.name
        if name == "generate" and recipe.generate is not None:
            return self._sample(name, recipe.generate, recipe.sft, self._teacher(recipe.generate.model), "teacher", rounds=1)
        if name == "rollout" and recipe.rollout is not None:
            rounds = recipe.rounds.count if recipe.rounds.prompts == "slice" else 1
            return self._sample(name, recipe.rollout, recipe.train, self.student, "student", rounds=rounds)
        if name == "score" and recipe.rollout is not None:
            return self._score(recipe.rollout)
        if name in ("sft", "train"):
            return self._train(name)
        if name in ("sft-hf", "opd-hf"):
            return Row(name, "CPU: one process", disk=exactly(2 * self.arch.num_parameters))
        if name == "engines":
            return self._engines()
        if stage.evaluation is not None:
            return self._evaluate(name, evaluation_at(recipe, stage))
        return Row(name, "CPU: one process")

    def _models(self, teacher: Model) -> Row:
        sizes = [model_bytes(model) for model in (teacher, self.student)]
        unknown = "" if None not in sizes else "; the teacher's size is not known"
        return Row("models", f"teacher and student{unknown}", disk=exactly(sum(size or 0 for size in sizes)))

    def _teacher(self, directory: str) -> Model:
        if directory not in self.teachers:
            self.teachers[directory] = find_teacher(directory)
        return self.teachers[directory]

    def _serving(self, name: str, model: Model, role: Role, longest: int) -> tuple[Architecture, Serving, str] | None:
        """None where the model's sizes are not known."""
        if model.arch is None:
            return None
        there = Allocation(self._nodes(name), self.allocation.per_node)
        serving = plan_serving(self.recipe.engine, role, model.arch, there, self.gpu, tokens=longest, stage=name)
        idle = serving.gpus - serving.copies * serving.tp
        where = f" on {there.nodes} of {self.allocation.nodes} nodes" if there != self.allocation else ""
        words = f"{role}: {serving.copies} x tp {serving.tp}{where}" + (f" ({idle} GPUs idle)" if idle else "")
        return model.arch, serving, words

    def _nodes(self, name: str) -> int:
        """Nodes that share the stage: an evaluation's work is not divided, and Slurm's jobs divide that of others by slurm.shards."""
        if self.recipe.engine.urls:  # servers wherever they are
            return self.allocation.nodes
        if name.startswith("eval-"):
            return 1
        shards = self.allocation.nodes if self.slurm is None else getattr(self.slurm.shards, name)
        return min(shards, self.allocation.nodes)

    def _over_time(self, rows: list[Row]) -> Iterator[str]:
        """Stages (rows of one run each) that may take longer than their jobs' time."""
        if self.slurm is None:
            return
        for row in rows:
            name = "eval" if row.stage.startswith("eval-") else row.stage
            limit = getattr(self.slurm.time, name, None)
            hours = row.wall(self.allocation.gpus)
            if limit is not None and hours is not None and row.per is None and hours.high > limit_hours(limit):
                yield f"WARNING: {row.stage} takes {hours.text()} hours, and slurm.time.{name} is {limit}: its job may have to be queued again; raise it"

    def _sample(self, name: str, stage: SampleStage, trainer: TrainerConfig, model: Model, role: Role, *, rounds: int) -> Row:
        lengths = sampled_lengths(stage.store, longest_response(stage, trainer))
        work, per = self._work(name, stage, lengths, longest_response(stage, trainer), rounds)
        tokens = lengths.tokens * (work.prompts * work.samples)
        disk = store_bytes(tokens, 2)
        planned = self._serving(name, model, role, lengths.longest)
        if planned is None:
            return Row(name, f"{role}: sizes unknown", tokens, None, disk, per=per)
        arch, serving, words = planned
        hours = sampling_hours(arch, self.gpu, serving, work) + _start(serving.gpus)
        return Row(name, words, tokens, hours, disk, per=per, gpus=serving.gpus)

    def _work(
        self, name: str, stage: SampleStage | Evaluation, lengths: Lengths, longest: int, rounds: int = 1
    ) -> tuple[Sampling, int | None]:
        """What is sampled, and for how many prompts where their number is not known."""
        count = count_prompts(stage)
        known = PER if count.prompts is None else -(-count.prompts // rounds)
        how = f"for each {PER:,} prompts, as {count.source}" if count.prompts is None else f"{count.prompts:,} prompts ({count.source})"
        samples = stage.sampling.samples_per_prompt
        most = stage.sampling.max_new_tokens
        how += (
            f", as far as the model has positions ({longest:,} of {most:,} tokens)"
            if isinstance(stage, Evaluation) and longest < most
            else ""
        )
        self._say(
            f"{f'eval.{stage.name}' if isinstance(stage, Evaluation) else name}: {how}, {samples} response(s) each of {lengths.response.text()} tokens, prompts of {lengths.prompt:.0f} ({lengths.source})"
        )
        return Sampling(known, samples, lengths.prompt, lengths.response, longest), None if count.prompts is not None else PER

    def _say(self, line: str) -> None:
        if line not in self.lines:  # the same for all models that are evaluated
            self.lines.append(line)

    def _score(self, rollout: SampleStage) -> Row:
        """What `rollout` samples, by the teacher."""
        recipe = self.recipe
        lengths = sampled_lengths(rollout.store, longest_response(rollout, recipe.train))
        count = count_prompts(rollout).prompts
        rounds = recipe.rounds.count if recipe.rounds.prompts == "slice" else 1
        rollouts = (PER if count is None else -(-count // rounds)) * rollout.sampling.samples_per_prompt
        tokens = lengths.tokens * rollouts
        disk = store_bytes(tokens, 1 + len(recipe.score.derived)) + candidate_bytes(recipe.score, lengths.response * rollouts)
        per = PER if count is None else None
        planned = self._serving("score", self._teacher(recipe.score.model), "teacher", lengths.longest)
        if planned is None:
            return Row("score", "teacher: sizes unknown", tokens, None, disk, per=per)
        arch, serving, words = planned
        hours = scoring_hours(arch, self.gpu, serving, rollouts=rollouts, tokens=lengths.tokens) + _start(serving.gpus)
        return Row("score", words, tokens, hours, disk, per=per, gpus=serving.gpus)

    def _evaluate(self, name: str, stage: Evaluation) -> Row:
        """Samples of one model, scored by the teacher if the recipe wants the reverse KL."""
        role: Role = "teacher" if stage.label == "teacher" else "student"
        model = self._teacher(self.recipe.models.teacher) if role == "teacher" else self.student
        longest = longest_response(stage, None, model)
        lengths = sampled_lengths(stage.store, longest)
        work, per = self._work(name, stage, lengths, longest)
        sampled = self._serving(name, model, role, lengths.longest)
        scored = None if stage.teacher is None else self._serving(name, self._teacher(stage.teacher), "teacher", lengths.longest)
        rollouts = work.prompts * work.samples
        tokens = lengths.tokens * rollouts
        disk = store_bytes(tokens, 2 if stage.teacher is None else 3)
        if sampled is None or (scored is None and stage.teacher is not None):
            return Row(name, "teacher: sizes unknown", tokens, None, disk, per=per)
        arch, serving, words = sampled
        hours = sampling_hours(arch, self.gpu, serving, work) + _start(serving.gpus)
        if scored is not None:
            teacher, serving, scoring = scored
            hours += scoring_hours(teacher, self.gpu, serving, rollouts=rollouts, tokens=lengths.tokens) + _start(serving.gpus)
            words += f", then {scoring}" if scoring != words else ", also to score"
        return Row(name, words, tokens, hours, disk, per=per, gpus=serving.gpus)

    def _engines(self) -> Row:
        """A few rollouts through both engines on one GPU: little more than their start. A student too large for it is not compared."""
        if (model_bytes(self.student) or 0) > SHARE_FOR_WEIGHTS * self.gpu.memory_gib * GIB:
            return Row("engines", "skipped: the student is too large for one GPU", gpus=1)
        return Row("engines", "both engines on one GPU", gpu_hours=_start(1) * 2, gpus=1)

    def _train(self, name: str) -> Row:
        config = self.recipe.sft if name == "sft" else self.recipe.train
        sampler = self.recipe.generate if name == "sft" else self.recipe.rollout
        if sampler is None:
            section = "generate" if name == "sft" else "rollout"
            self.lines.append(f"{name}: the recipe has no [{section}] section, so no data to estimate it by")
            return Row(name, "not known", gpu_hours=None)
        lengths = trained_lengths(config, sampler)
        if lengths.longest > config.micro_batch_tokens and config.overlong == "refuse":
            raise UserError(
                f"{name}: a rollout may have {lengths.longest} tokens ({lengths.source}), over micro_batch_tokens = {config.micro_batch_tokens}; "
                f"raise it, or cut with {name}.max_response_tokens or {name}.overlong = 'cut'"
            )
        gpus, arch = self.allocation.gpus, self.arch
        memory = check_fits(arch, name, config, gpus, self.gpu.memory_gib, mean_tokens=lengths.tokens.high)
        layout = Layout.of(config, gpus)
        steps, per = self._steps(name, config, sampler, lengths)
        speed = predict_speed(arch, config, layout, tokens=lengths.tokens, steps=steps, gpu=self.gpu)
        self.lines += list(_training_lines(name, config, lengths, memory, self.gpu, arch, self.allocation))
        self.lines.append(
            f"  speed: {speed.tokens_per_second.text()} tokens/s, {speed.step_seconds.text()} s a step; {steps:,} steps"
            + (f" for each {PER:,} prompts" if per else "")
        )
        self.lines.append(f"  a step: {speed.step.describe()}")
        saved = num_checkpoints(config, steps)
        words = " x ".join(f"{key} {getattr(layout, key)}" for key in ("tp", "pp", "cp", "dp")) + (
            f", ep {layout.ep}" if layout.ep > 1 else ""
        )
        disk = exactly(saved * checkpoint_bytes(arch, config))
        tokens = Range(*(steps * config.step_tokens(mean) for mean in (lengths.tokens.low, lengths.tokens.high)))
        return Row(name, words, tokens, speed.gpu_hours + _start(gpus), disk, per=per)

    def _steps(self, name: str, config: TrainerConfig, sampler: SampleStage, lengths: Lengths) -> tuple[int, int | None]:
        """Optimizer steps of one run of the stage, and for how many prompts where their number is not known."""
        rounds = self.recipe.rounds.count if name == "train" else 1
        if name == "train" and rounds > 1 and self.recipe.rounds.steps is not None:
            return self.recipe.rounds.steps, None
        if config.steps is not None:
            return -(-config.steps // rounds), None
        count = count_prompts(sampler).prompts
        prompts = PER if count is None else count
        share = rounds if self.recipe.rounds.prompts == "slice" else 1
        rollouts = lengths.rollouts or -(-prompts // share) * sampler.sampling.samples_per_prompt
        if config.global_batch is not None:
            steps = num_steps(rollouts, step=config.global_batch, epochs=config.epochs)
        else:  # of the longest responses there may be
            mean = lengths.tokens.high
            steps = num_steps(round(rollouts * mean), step=round(config.step_tokens(mean)), epochs=config.epochs)
        return steps, None if count is not None or lengths.rollouts else PER


def _training_lines(
    name: str, config: TrainerConfig, lengths: Lengths, memory: Memory, gpu: Gpu, arch: Architecture, allocation: Allocation
) -> Iterator[str]:
    yield f"{name}: {lengths.tokens.text()} tokens a rollout ({lengths.source})"
    yield f"  memory: {memory.total / GIB:.1f} of {gpu.memory_gib:g} GiB on the fullest GPU ({describe(memory)})"
    host, save = memory.host * allocation.per_node, save_memory(arch, config, allocation)
    parts = f"while a checkpoint is saved or loaded {save / GIB:.0f} GiB" + (f", for the optimizer {host / GIB:.0f} GiB" if host else "")
    room = "" if allocation.memory_gib is None else f" of {allocation.memory_gib:g} GiB"
    yield f"  memory of a node: {parts}{room}; of one process that converts a checkpoint {conversion_memory(arch).text(GIB)} GiB"
    if allocation.memory_gib is not None and host + save > allocation.memory_gib * GIB:
        offload = f", or lower {name}.optimizer_offload" if host else ""
        raise UserError(
            f"{name}: needs about {(host + save) / GIB:.0f} GiB of a node's memory, which has {allocation.memory_gib:g}: {parts}; "
            f"take more nodes{offload}"
        )
    yield f"  one checkpoint: {checkpoint_bytes(arch, config) / 1e9:.3g} GB"


def _start(gpus: int) -> Range:
    """GPU hours until a model is loaded."""
    return START_SECONDS * (gpus / HOUR)


def estimate_recipe(recipe: Recipe, allocation: Allocation, gpu: Gpu) -> list[str]:
    """Lines that say what every stage would need on these GPUs. Raises UserError for what can't fit or does not divide."""
    found = Estimator(recipe, allocation, gpu).estimate()
    return [*found.notes, *found.lines, "", *table(found), "", *_remarks(found)]


def table(estimate: Estimate) -> list[str]:
    """A line a stage, and their sum."""
    heads = ("stage", "runs on", "tokens, M", "GPU hours", "hours", "disk, GB")
    lines: list[tuple[str, ...]] = [heads]
    for row in estimate.rows:
        name = row.stage + (f" x {row.runs}" if row.runs > 1 else "") + (" *" if row.per else "")
        hours = "unknown" if row.gpu_hours is None else _shown(row.gpu_hours)
        wall = "unknown" if (took := row.wall(estimate.gpus)) is None else _shown(took)
        lines.append((name, row.what, _shown(row.tokens, 1e6), hours, wall, _shown(row.disk, 1e9)))
    total = estimate.gpu_hours
    walls = [row.wall(estimate.gpus) for row in estimate.rows if row.per is None]
    one_by_one = sum((wall for wall in walls if wall is not None), NOTHING)
    lines.append(("total", "", "", total.text(), _shown(one_by_one), estimate.disk.text(1e9)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _shown(figure: Range, scale: float = 1.0) -> str:
    return "" if figure == NOTHING else figure.text(scale)


def _remarks(estimate: Estimate) -> Iterator[str]:
    if any(row.per for row in estimate.rows):
        yield f"* for each {PER:,} prompts, as nobody knows how many there are: not in the total; give num_prompts, or put the file there"
    if unknown := [row.stage for row in estimate.rows if row.gpu_hours is None]:
        yield f"not in the total of GPU hours: {', '.join(unknown)}"
    yield "estimates by the model in docs/training.md, which has not been compared with a run on GPUs yet; GPU hours count every GPU while a stage runs"
