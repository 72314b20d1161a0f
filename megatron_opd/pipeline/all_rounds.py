"""All rounds of a recipe in one set of processes: ranks and engines start once, and what is on disk is what the separate commands make.

The first rank samples and scores while the others wait; then all of them train, and the student's engine takes the new weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.checkpoints.checksums import content_id
from megatron_opd.checkpoints.saved import find_checkpoint, read_state
from megatron_opd.convert.staging import AlreadyMade
from megatron_opd.errors import CheckpointError, Interrupted, UserError
from megatron_opd.pipeline.trained import trained_to_hf
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.rounds import ROUND_FILE, check_keep_alive, read_entries, round_folder, write_round
from megatron_opd.records import SamplingParams, TeacherScores
from megatron_opd.serve.engine import Engine, Failed, Generated, GenerateRequest, Progress, ScoreRequest
from megatron_opd.serve.opening import open_engine, uses_sglang
from megatron_opd.serve.sample import rollout
from megatron_opd.serve.score import score
from megatron_opd.train import loop
from megatron_opd.train.job import on_first_rank, say, while_others_wait
from megatron_opd.train.stop import StopRequest

T = TypeVar("T")


class Stopped(UserError):
    """A stop was asked for between two parts of rollouts or scores, of which those that are done are kept."""


def run_rounds(recipe: Recipe, *, allow_changes: bool = False) -> Path | None:
    """Do what is left of all rounds. Returns the last checkpoint. Raises UserError, Interrupted."""
    check_keep_alive(recipe)
    numbers = [None] if recipe.rounds.count == 1 else list(range(1, recipe.rounds.count + 1))
    with loop.open_session(recipe, "train", numbers[0], allow_changes=allow_changes) as session:
        session.listen()
        session.hold_output()
        engines = Engines(recipe, session)
        outcome, trainee = loop.Outcome(None, ended=False), None
        ended = on_first_rank(partial(_ended_rounds, recipe))
        try:
            if ended:
                on_first_rank(partial(_keep_rounds, recipe))
                while_others_wait(partial(_convert, recipe, ended))
            for number in numbers[ended:]:
                while_others_wait(partial(_sample_and_score, recipe, number, engines))
                job = loop.prepare(session, number, in_memory=trainee is not None)
                if trainee is None or job.resets:
                    trainee = None  # before another is made
                    trainee, progress = loop.start_training(session, job)
                elif job.going.checkpoint != outcome.checkpoint:
                    raise CheckpointError(
                        f"{outcome.checkpoint} is no longer the newest whole checkpoint ({job.going.checkpoint} is); run the same command again"
                    )
                else:
                    progress = loop.progress_of(job)
                outcome = loop.run_job(session, job, trainee, progress)
                if outcome.stopped:
                    raise Stopped("stopped as asked")
                while_others_wait(partial(_convert, recipe, number))
            say(f"rounds: all {len(numbers)} have ended")
            stopped = None
        except Stopped as stop:
            stopped = stop
            session.stop.requested()  # every rank hears of it
            session.stop.done()
            say(f"rounds: {stopped}; the same command goes on")
        finally:
            engines.close()
    if stopped is not None and session.stop.interrupted:
        raise Interrupted
    return outcome.checkpoint


def _ended_rounds(recipe: Recipe) -> int:
    """How many rounds have ended, by the newest whole checkpoint."""
    found = find_checkpoint(Path(recipe.train.output)).checkpoint
    entries = [] if found is None else read_entries(read_state(found), found)
    return sum(entry.last_step is not None for entry in entries)


def _keep_rounds(recipe: Recipe) -> None:
    """Write the files of rounds that have ended, where a kill came before that."""
    found = find_checkpoint(Path(recipe.train.output)).checkpoint
    if found is None or recipe.rounds.count == 1:
        return
    state = read_state(found)
    for entry in read_entries(state, found):
        if entry.last_step is not None and not (round_folder(recipe, entry.number) / ROUND_FILE).exists():
            write_round(recipe, entry, content_id(found) if entry.last_step == state["step"] else entry.content)


def _sample_and_score(recipe: Recipe, number: int | None, engines: Engines) -> None:
    rollout(recipe, number=number, lend=engines.lend_student)
    score(recipe, number=number, lend=engines.lend_teacher)


def _convert(recipe: Recipe, number: int | None) -> None:
    """The student for the next round's rollouts, or for evaluation."""
    try:
        print(trained_to_hf(recipe, "train", number), flush=True)
    except AlreadyMade as found:
        print(found, flush=True)


class Engines:
    """The student's engine and the teacher's, opened on the first rank when they are first needed, and both kept."""

    def __init__(self, recipe: Recipe, session: loop.Session):
        self.recipe, self.session = recipe, session
        self.open: dict[str, tuple[Engine, str]] = {}  # with the directory whose weights it has

    @contextlib.contextmanager
    def lend_student(self, model: str) -> Iterator[Engine]:
        yield self._get("student", model)

    @contextlib.contextmanager
    def lend_teacher(self, model: str) -> Iterator[Engine]:
        yield self._get("teacher", model)

    def _get(self, role: str, model: str) -> Engine:
        config = self.recipe.engine_for(model)
        if role not in self.open:
            first_gpu = 0
            if uses_sglang(config) and config.launch is not None and self.session.num_gpus:
                first_gpu = self.num_gpus()  # the ranks and the other model's servers have those before
            self.open[role] = open_engine(config, model, log_dir=f"{self.recipe.run_dir}/logs", first_gpu=first_gpu), model
        engine, loaded = self.open[role]
        if loaded != model:
            engine.load(model)
            self.open[role] = engine, model
        return LentEngine(engine, self.session.stop, num_gpus=self.num_gpus())

    def num_gpus(self) -> int:
        """GPUs that are held, whoever works: an engine in the first rank's process shares its."""
        servers = sum(engine.num_gpus for engine, _ in self.open.values()) if uses_sglang(self.recipe.engine) else 0
        return self.session.num_gpus + servers

    def close(self) -> None:
        for engine, _ in self.open.values():
            engine.close()
        self.open.clear()


class LentEngine(Engine):
    """An engine that stays open behind the stage, which ends after a part once a stop is asked for."""

    def __init__(self, engine: Engine, stop: StopRequest, *, num_gpus: int):
        self.engine, self.stop, self.num_gpus = engine, stop, num_gpus
        self.fingerprint, self.context_length = engine.fingerprint, engine.context_length

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingParams, progress: Progress | None = None) -> list[Generated]:
        return self.engine.generate(requests, sampling, progress)

    def score(self, requests: Sequence[ScoreRequest], top_k: int = 0, progress: Progress | None = None) -> list[TeacherScores]:
        return self.engine.score(requests, top_k, progress)

    def generate_parts(
        self, parts: Iterable[Sequence[GenerateRequest]], sampling: SamplingParams, progress: Progress | None = None
    ) -> Iterator[tuple[int, Sequence[Generated | Failed]]]:
        return self._until_stopped(self.engine.generate_parts(parts, sampling, progress))

    def score_parts(
        self, parts: Iterable[Sequence[ScoreRequest]], top_k: int = 0, progress: Progress | None = None
    ) -> Iterator[tuple[int, Sequence[TeacherScores | Failed]]]:
        return self._until_stopped(self.engine.score_parts(parts, top_k, progress))

    def _until_stopped(self, outcomes: Iterator[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        with contextlib.closing(outcomes):  # pyright: ignore[reportArgumentType]
            for outcome in outcomes:
                yield outcome
                if self.stop.noticed():
                    raise Stopped("stopped as asked between two parts, of which those that are done are kept")

    def load(self, model: str | Path) -> None:
        self.engine.load(model)

    def close(self) -> None:
        """Who lent it closes it."""
