"""`run --plan` and `progress`: a line a stage, and the command that comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from megatron_opd.errors import ConfigError
from megatron_opd.pipeline.slurm import job_states, read_jobs
from megatron_opd.pipeline.stages import Stage, list_stages
from megatron_opd.pipeline.states import Status
from megatron_opd.pipeline.status import Survey
from megatron_opd.recipe.config import Recipe
from megatron_opd.safety.redact import redact_override, redact_words

NOT_FINISHED = 3  # exit code
_WIDTH = 22  # of a label


def show_plan(recipe: Recipe, *, typed: list[str], only: str | None = None, number: int | None = None, last: str | None = None) -> int:
    """Print how far every stage is, up to `last`, and the next command; returns 0 if nothing is left, otherwise NOT_FINISHED.

    With `only`, one stage by itself: whether those before it are stale is not asked. With `number`, the stages of that round.
    `typed`: recipe and overrides as they were given. Raises UserError.
    """
    survey, stages = Survey(recipe), list_stages(recipe)
    stages = stages if last is None else stages[: stages.index(select(stages, last)[-1]) + 1]
    chosen = stages if number is None else [stage for stage in stages if stage.round == number]
    if only is not None:
        found = [survey.stage(stage) for stage in select(chosen, only)]
    else:
        found = [status for status in survey.stages() if status.stage in chosen]
    for line in lines_of(found, _queued(recipe, found)):
        print(line)
    left = [status for status in found if not status.settled]
    if not left:
        return 0
    if only is None:
        print(f"next: {next_command(next((status for status in left if status.stale), left[0]), shown(typed))}")
    return NOT_FINISHED


def shown(typed: list[str]) -> list[str]:
    """Recipe and overrides for people: without what may be secret."""
    return [*typed[:1], *map(redact_override, redact_words(typed[1:]))]


def select(stages: list[Stage], name: str) -> list[Stage]:
    """Those that a person means by a label ('train', 'train@3'; 'eval' is all evaluations, 'eval-aime24' one of each model). Raises ConfigError."""
    chosen = [stage for stage in stages if stage.is_meant(name)]
    if not chosen:
        raise ConfigError(f"no stage {name!r} in this recipe; there are {', '.join(stage.label for stage in stages)}")
    return chosen


def lines_of(found: Iterable[Status], queued: dict[str, str] | None = None) -> list[str]:
    """One line a stage, and more where there is something to say of it; `queued`: what Slurm says of its job, by label."""
    lines = []
    for status in found:
        lines.append(f"{status.stage.label:<{_WIDTH}} {status.state:<12} {status.amount:<22} {status.where}".rstrip())
        said = [text for text in (status.stale, status.note, (queued or {}).get(status.stage.label)) if text]
        lines += [f"{'':<{_WIDTH}} {line}" for text in said for line in text.splitlines()]
    return lines


def _queued(recipe: Recipe, found: list[Status]) -> dict[str, str]:
    """Slurm's last job of each stage that is not done: its id, and where it is if it is in the queue."""
    left = {status.stage.label for status in found if not status.settled}
    jobs = {label: ids[-1] for label, ids in read_jobs(recipe.run_dir).items() if label in left}
    states = job_states(jobs.values()) if jobs else {}
    return {label: f"Slurm job {job}: {states.get(job, 'not in the queue')}" for label, job in jobs.items()}


def next_command(left: Status, typed: list[str]) -> str:
    """What does the next stage, and everything that is left."""
    everything = shlex.join(["megatron-opd", "run", *typed])
    if left.stale is not None:
        return f"{everything} --from {left.stage.label}   (sets aside what {left.stage.label} and the stages after it made, and makes it again)"
    return f"{everything}   ({left.stage.label} alone: {shlex.join(['megatron-opd', *left.stage.command(typed[0], typed[1:])])})"
