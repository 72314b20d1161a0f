"""`megatron-opd run`: every stage of a recipe that is left, in order; what is done is skipped, what was stopped goes on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_opd.errors import BRANCH, UserError
from megatron_opd.pipeline.closing import closing
from megatron_opd.pipeline.plan import NOT_FINISHED, lines_of, select, shown
from megatron_opd.pipeline.set_aside import set_aside
from megatron_opd.pipeline.stages import RECIPE, Stage, list_stages
from megatron_opd.pipeline.states import Status
from megatron_opd.pipeline.status import Survey
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.stored import store_recipe
from megatron_opd.safety.locks import Lock
from megatron_opd.safety.processes import STOP_SIGNALS, has_gpu

# The package that runs here, whatever folder of that name lies where one stands; ended with the process that started it, kill -9 included.
_CHILD = (
    "import sys; parent, root = sys.argv.pop(1), sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "from megatron_opd.safety.processes import end_with_parent; end_with_parent(int(parent)); from megatron_opd.__main__ import run; sys.exit(run())"
)


CommandLine = Callable[[list[str]], int]  # the words after megatron-opd; returns the exit code


def run_recipe(recipe: Recipe, command_line: CommandLine, *, typed: list[str], first: str | None = None, last: str | None = None) -> int:
    """Do what is left up to stage `last`; returns the exit code of the first stage that fails, or NOT_FINISHED where one stopped early.

    Stale stages from `first` on are made again, and so is what was made of them; what they made before is set aside. Earlier ones are taken
    as they are. Without `first`, a stale stage is refused. `typed`: recipe and overrides as they were given. `command_line` runs a stage in this process. Raises UserError.
    """
    started = time.monotonic()
    stages = list_stages(recipe)
    end = stages.index(select(stages, last)[-1]) + 1 if last is not None else len(stages)
    begin = stages.index(select(stages, first)[0]) if first is not None else None
    if begin is not None and begin >= end:
        raise UserError(f"--from {first} comes after --until {last}; nothing lies between them")
    with _alone(recipe):
        _refuse_stale(recipe, begin, end, typed)  # before its settings are kept
        store_recipe(recipe, whole=True)
        code = _do(recipe, command_line, begin, end, typed)
    if code == 0 and end == len(stages):
        print(f"\n{closing(recipe)}\n\n{time.monotonic() - started:.0f} s in all")
        print(f"report: {Path(recipe.run_dir) / 'report' / 'report.html'}")
    return code


def _do(recipe: Recipe, command_line: CommandLine, begin: int | None, end: int, typed: list[str]) -> int:
    """The first stage that is not settled, again and again: what was set aside may send one back."""
    said: set[str] = set()
    while True:
        found = _refuse_stale(recipe, begin, end, typed)
        number = next((number for number, status in enumerate(found[:end]) if _is_due(status, number, begin)), None)
        for before, status in enumerate(found[: end if number is None else number]):
            if status.stage.label not in said:
                said.add(status.stage.label)
                kept = "   (taken as it is, as --from comes after it)" if status.stale is not None and before < (begin or 0) else ""
                print("\n".join(lines_of([status])) + kept, flush=True)
        if number is None:
            return 0
        status = found[number]
        said.add(status.stage.label)
        if status.stale is not None:
            _make_again(recipe, found, number)
            continue
        due = [other for one, other in enumerate(found[number:end], number) if _is_due(other, one, begin) and other.stale is None]
        stage = _with_its_model(_with_its_round(recipe, status.stage, found[:end]), [other.stage for other in due])
        code = _run_stage(recipe, stage, command_line, typed, place=f"{number + 1}/{end}")
        if code:
            return code
        after = Survey(recipe).stages(begin or 0)[number]
        if not after.settled:
            print("\n".join(["run: this stage is not finished:", *lines_of([after]), "the same command goes on"]))
            return NOT_FINISHED


def _is_due(status: Status, number: int, begin: int | None) -> bool:
    """Whether there is something to do; what is stale before --from is taken as it is."""
    return not status.settled and not (status.stale is not None and begin is not None and number < begin)


def _refuse_stale(recipe: Recipe, begin: int | None, end: int, typed: list[str]) -> list[Status]:
    """The status of every stage; raises UserError if one that is to be done is stale, unless --from allows to make it again."""
    found = Survey(recipe).stages(begin or 0)
    if begin is None and (stale := next((status for status in found[:end] if status.stale), None)) is not None:
        raise UserError(_refusal(recipe, stale, typed))
    return found


def _make_again(recipe: Recipe, found: list[Status], number: int) -> None:
    """Set aside what stage `number` made, and what was made from it, up to the last stage: what stays would pass for its result.

    The training of all rounds is one: where one round's must be made again, the first begins anew.
    """
    stale = [status for status in found[number:] if status.stale is not None]
    if any(status.stage.name == "train" and status.stage.round is not None for status in stale):
        first = next(one for one, status in enumerate(found) if status.stage.name == "train")
        of_rounds = [status for status in found[first:] if status.done and status.stage.round is not None]
        stale = [*(status for status in stale if status not in of_rounds), *of_rounds]
    print("\n".join(lines_of(stale)))
    place = set_aside(recipe, [status.stage for status in stale])
    if place is None:
        raise UserError(f"{stale[0].stage.label} is stale, but nothing that it made was found; move it away yourself")
    print(f"set aside in {place}: {', '.join(status.stage.label for status in stale)}", flush=True)


def _refusal(recipe: Recipe, status: Status, typed: list[str]) -> str:
    label, command = status.stage.label, shlex.join(["megatron-opd", "run", *shown(typed)])
    return (
        f"{label} is STALE: {status.stale}\n"
        f"  to make it and what follows again (what is there is set aside): {command} --from {label}\n"
        f"  to keep it: use the inputs and settings that it was made with, or {BRANCH.replace('RECIPE', recipe.run_dir)}"
    )


def _with_its_round(recipe: Recipe, stage: Stage, until: list[Status]) -> Stage:
    """With `rounds.keep_alive` all rounds by one command, once the engines were compared on the first rollouts, unless --until ends before the last."""
    first = stage.round == 1 and stage.name in ("rollout", "score", "derive")
    all_of_them = any(status.stage.name == "opd-hf" and status.stage.round == recipe.rounds.count for status in until)
    if stage.round is None or first or not recipe.rounds.keep_alive or not all_of_them:
        return stage
    return replace(stage, words=("rounds", RECIPE), runs_on="train")


def _with_its_model(stage: Stage, due: list[Stage]) -> Stage:
    """Evaluations of one model that are due by one command, which loads the model once."""
    if stage.evaluation is None or stage.model is None:
        return stage
    names = [other.evaluation for other in due if other.model == stage.model and other.evaluation is not None]
    return replace(stage, words=("eval", RECIPE, *names, "--of", stage.model))


def _run_stage(recipe: Recipe, stage: Stage, command_line: CommandLine, typed: list[str], *, place: str) -> int:
    """The exit code of the stage's command. A person would give the run's folder for the recipe, which does not keep secrets."""
    words, by_folder = stage.command(typed[0], typed[1:]), stage.command(recipe.run_dir, [])
    print(f"\n[{place}] {stage.label}\n$ {shlex.join(['megatron-opd', *by_folder])}", flush=True)
    if stage.runs_on != "cpu" and has_gpu():
        return _in_a_process(words)
    return command_line(words)


def _in_a_process(words: list[str]) -> int:
    """The stage's exit code. In this process it would go on holding GPU memory that the next stage needs."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-P", "-c", _CHILD, str(os.getpid()), root, *words])
    before = {number: signal.signal(number, lambda heard, frame: process.send_signal(heard)) for number in STOP_SIGNALS}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells the child, too: it saves and ends
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        process.kill()
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone(recipe: Recipe) -> Iterator[None]:
    """One `run` at a time works in a run's folder."""
    with Lock(Path(recipe.run_dir), wait_seconds=0):
        yield
