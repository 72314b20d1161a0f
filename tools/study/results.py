"""What was found, read from the files of a study: evaluations, stores, training metrics, and the records of jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import read_jsonl
from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.intervals import Interval, Totals
from megatron_opd.evaluate.rows import read_rows
from megatron_opd.safety.untrusted import read_object

from .arms import COMPARISONS, Arm
from .columns import Columns, read_columns
from .estimates import Estimate, interval_of, over_seeds, paired
from .plan import DRIFT, OTHER, Job, Replicate, list_jobs
from .run import UNKNOWN, Runner
from .subject import ARITHMETIC, Subject

COMPONENTS = ("generate", "sft", "rollout", "score", "derive", "train", "rounds", "convert", "eval")


@dataclass(frozen=True)
class Run:
    """One arm of one seed. Tokens are of responses.

    cpu_seconds: by component; what is shared counts in full for each arm that needs it. `distilling`: without SFT and evaluation.
    teacher_seconds: CPU seconds of the commands that hold a teacher: its sampling and scoring, or all of the rounds; without those for SFT.
    commits: of the code that made it, as its jobs were begun.
    """

    arm: str
    seed: int
    accuracy: Interval
    reverse_kl: Interval
    kl_to_ref: Interval
    stopped_share: float
    steps: int
    sft_tokens: int
    scored_tokens: int
    sampled_tokens: int
    trained_tokens: int
    cpu_seconds: dict[str, float]
    distilling: float
    teacher_seconds: float
    resumed_jobs: int
    commits: list[str]
    folder: str
    columns: Columns | None
    scores: Totals = field(repr=False)


@dataclass(frozen=True)
class Found:
    """A study as far as it has come."""

    subject: Subject
    settings: dict[str, Any]
    arms: list[Arm]
    runs: list[Run]
    seconds: float  # CPU seconds of all jobs that are done
    other: dict[str, list[Interval]]  # reverse KL of the students before distillation to the teacher of the other style, by student
    teachers: dict[str, list[Interval]]  # accuracy
    commits: dict[str, int]  # jobs that are done, by the commit of the code that they were begun with

    def of(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]

    def estimate(self, arm: str, figure: str) -> Estimate | None:
        """Of "accuracy", "reverse_kl" or "kl_to_ref"; None where no seed is done."""
        intervals = [getattr(run, figure) for run in self.of(arm)]
        return over_seeds(intervals, least=0.0, most=1.0 if figure == "accuracy" else float("inf")) if intervals else None

    def mean(self, arm: str, figure: str) -> float:
        values = [getattr(run, figure) for run in self.of(arm)]
        return sum(values) / len(values)

    def difference(self, arm: str, against: str) -> Estimate | None:
        """Of accuracies, over the seeds that both have, each paired by prompt."""
        before = {run.seed: run for run in self.of(against)}
        pairs = [(run, before[run.seed]) for run in self.of(arm) if run.seed in before]
        return over_seeds([paired(run.scores, earlier.scores) for run, earlier in pairs], least=-1.0, most=1.0) if pairs else None

    def differences(self) -> list[tuple[str, str, Estimate]]:
        wanted = [(arm.name, start_name(arm.student)) for arm in self.arms] + COMPARISONS
        found = ((arm, against, self.difference(arm, against)) for arm, against in wanted)
        return [(arm, against, estimate) for arm, against, estimate in found if estimate is not None]


def start_name(student: str) -> str:
    return f"sft-{student}"


def collect(runner: Runner, replicates: Sequence[Replicate], arms: Sequence[Arm]) -> Found:
    """Of the arms and seeds whose jobs are all done."""
    records = {job.name: read_object(runner.record(job)) for job in list_jobs(replicates, arms) if runner.done(job)}
    runs: list[Run] = []
    other: dict[str, list[Interval]] = {}
    teachers: dict[str, list[Interval]] = {}
    for replicate in replicates:
        for student in ("a", "b"):
            jobs = replicate.start_jobs(student)
            if all(job.name in records for job in jobs):
                runs.append(_start_run(replicate, student, jobs, records))
                folder = replicate.folder / replicate.start(student) / "eval"
                if replicate.subject.other_teacher:
                    other.setdefault(student, []).append(interval_of(read_object(folder / OTHER / "sft.json")["reverse_kl"]))
                record = read_object(folder / replicate.subject.evaluation / "teacher.json")
                teachers.setdefault(student, []).append(interval_of(record["accuracy"]))
        for arm in arms:
            jobs = replicate.arm_jobs(arm)
            if all(job.name in records for job in jobs):
                runs.append(_arm_run(replicate, arm, jobs, records))
    seconds = sum(record["cpu_seconds"] for record in records.values())
    commits = Counter(commit for record in records.values() for commit in _commits(record))
    return Found(
        replicates[0].subject, asdict(replicates[0].settings), list(arms), runs, seconds, other, teachers, dict(sorted(commits.items()))
    )


def _commits(record: Mapping[str, Any]) -> list[str]:
    return record.get("commits") or [UNKNOWN]


def _start_run(replicate: Replicate, student: str, jobs: Sequence[Job], records: dict[str, Any]) -> Run:
    folder = replicate.folder / replicate.start(student)
    figures = _figures(replicate, folder, "sft") | {"kl_to_ref": Interval(0.0, 0.0, 0.0)}
    return Run(
        arm=start_name(student), seed=replicate.seed, **figures, steps=0, sft_tokens=_tokens(folder / "sft.opd.zarr"), scored_tokens=0,
        sampled_tokens=0, trained_tokens=0, **_costs(jobs, records), folder=str(folder),
    )  # fmt: skip


def _arm_run(replicate: Replicate, arm: Arm, jobs: Sequence[Job], records: dict[str, Any]) -> Run:
    folder, start = replicate.folder / arm.name, replicate.folder / replicate.start(arm.student)
    steps = read_jsonl(folder / "opd/metrics.jsonl", number="step")
    drift = read_object(folder / "eval" / DRIFT / "opd.json")["reverse_kl"]
    of_rounds = sorted((folder / "rounds").glob("*/rollouts.opd.zarr"))
    scored = sum(map(_tokens, of_rounds if arm.every is not None else [replicate.folder / replicate.store(arm)]))
    return Run(
        arm=arm.name, seed=replicate.seed, **_figures(replicate, folder, "opd"), kl_to_ref=interval_of(drift), steps=len(steps),
        sft_tokens=_tokens(start / "sft.opd.zarr"), scored_tokens=scored, sampled_tokens=0 if arm.own_answers else scored,
        trained_tokens=sum(row["response_tokens"] for row in steps), **_costs(jobs, records), folder=str(folder),
    )  # fmt: skip


def _figures(replicate: Replicate, folder: Path, model: str) -> dict[str, Any]:
    evaluation = folder / "eval" / replicate.subject.evaluation
    record = read_object(evaluation / f"{model}.json")
    rows = list(read_rows(evaluation / f"{model}.prompts.jsonl"))
    prompts = [row["prompt"] for row in read_jsonl(replicate.folder / "prompts/eval.jsonl")]
    return {
        "accuracy": interval_of(record["accuracy"]),
        "reverse_kl": interval_of(record["reverse_kl"]),
        "stopped_share": record["stopped_share"],
        "columns": read_columns(prompts, rows) if replicate.subject is ARITHMETIC else None,
        "scores": {row.prompt: (float(row.score or 0.0), 1.0) for row in rows},
    }


def _costs(jobs: Sequence[Job], records: dict[str, Any]) -> dict[str, Any]:
    seconds = dict.fromkeys(COMPONENTS, 0.0)
    distilling = teacher = 0.0
    for job in jobs:
        if job.component == "eval" and job is not jobs[-1]:
            continue  # of the student before distillation
        cost = records[job.name]["cpu_seconds"]
        seconds[job.component] += cost
        if job.component != "eval" and not job.of_start:
            distilling += cost
            teacher += cost if job.component in ("generate", "score", "rounds") else 0.0
    resumed = sum(records[job.name]["attempts"] > 1 for job in jobs)
    commits = sorted({commit for job in jobs for commit in _commits(records[job.name])})
    return {"cpu_seconds": seconds, "distilling": distilling, "teacher_seconds": teacher, "resumed_jobs": resumed, "commits": commits}


@cache
def _tokens(store: Path) -> int:
    return sum(part.num_response_tokens for part in StoreReader(str(store)).parts.values())
