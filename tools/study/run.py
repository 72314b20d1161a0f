"""Runs jobs side by side, each as soon as what it needs is done. A job that is done has a record of what it cost, and is not run again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import git_commit
from megatron_opd.safety.durable import write_json
from megatron_opd.safety.untrusted import read_object

from . import forks
from .plan import Job

UNKNOWN = "unknown"  # commit, where there is no checkout


@dataclass(frozen=True)
class Runner:
    """Jobs of the study in `folder`; records are in FOLDER/jobs, output is in FOLDER/logs."""

    folder: Path
    lanes: int
    say: Callable[[str], Any] = print

    def record(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.name}.json"

    def log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.name}.log"

    def done(self, job: Job) -> bool:
        """Raises ValueError if it was done by another command, or with another recipe."""
        if not self.record(job).exists():
            return False
        record = read_object(self.record(job))
        if (words := record["words"]) != list(job.words):
            raise ValueError(
                f"study: {self.record(job)} is of the command {words}, now it would be {list(job.words)}; take another --folder"
            )
        if (recipe := record.get("recipe_sha256")) not in (None, job.recipe_sha256):  # None: of a study before they were kept
            raise ValueError(
                f"study: {self.record(job)} is of a recipe that hashes to {recipe[:12]}, now it would be {job.recipe_sha256[:12]}: "
                "arms, sizes or the recipe that they extend have changed; take another --folder"
            )
        return True

    def left(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if not self.done(job)]

    def run(self, jobs: Sequence[Job], *, until: float | None = None) -> list[Job]:
        """Run what is left, and begin nothing after `until` (of time.monotonic). Returns the jobs that failed.

        Ctrl-C and SIGTERM stop the commands, each of which goes on at the next call.
        """
        left = self.left(jobs)
        done = {job.name for job in jobs} - {job.name for job in left}
        total = len(left)
        running: dict[int, tuple[Job, float, float]] = {}
        failed: list[Job] = []
        try:
            while True:
                busy = {job.store for job, _, _ in running.values() if job.store}
                for job in list(left):
                    if len(running) == self.lanes or (until is not None and time.monotonic() > until):
                        break
                    if done.issuperset(job.needs) and job.store not in busy:
                        left.remove(job)
                        busy |= {job.store} - {""}
                        running[self._start(job)] = job, time.monotonic(), os.getloadavg()[0]
                if not running:
                    return failed
                ended = forks.wait()
                job, started, load = running.pop(ended.pid)
                seconds = time.monotonic() - started
                if ended.code:
                    failed.append(job)
                    self.say(f"{job.name}: FAILED ({ended.code}); see {self.log(job)}")
                    continue
                self._keep(job, ended, seconds, load)
                done.add(job.name)
                self.say(
                    f"[{total - len(left) - len(running)}/{total}] {job.name}: {ended.cpu_seconds:.1f} s of CPU time in {seconds:.1f} s"
                )
        finally:
            forks.stop(list(running))

    def _start(self, job: Job) -> int:
        begun = self._begun(job)
        begun.parent.mkdir(parents=True, exist_ok=True)
        with begun.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {git_commit() or UNKNOWN}\n")
        return forks.start(job.words, self.log(job))

    def _keep(self, job: Job, ended: forks.Ended, seconds: float, load: float) -> None:
        begun = self._begun(job)
        attempts = begun.read_text(encoding="utf-8").splitlines()
        record = {
            "words": list(job.words),
            "recipe_sha256": job.recipe_sha256,
            "commits": sorted({line.partition(" ")[2] or UNKNOWN for line in attempts}),
            "component": job.component,
            "cpu_seconds": round(ended.cpu_seconds, 3),  # of the last attempt
            "seconds": round(seconds, 3),
            "attempts": len(attempts),
            "load_average_before": round(load, 2),
        }
        write_json(self.record(job), record)
        begun.unlink()

    def _begun(self, job: Job) -> Path:
        """A line for each attempt: when, and of which commit; gone when the job is done."""
        return self.record(job).with_suffix(".begun")
