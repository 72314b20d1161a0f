"""Evaluations of the weights under way: every so many steps, on prompts of the recipe's [eval.NAME], between two steps.

All ranks write their weights; the first makes a Hugging Face directory of them, samples and grades while the others sleep, and its figures
become fields of the step's row. Nothing of it reaches the training: weights, optimizer and data are not touched, and what is random in a
step is a function of the step. A row of a step has all its evaluations, so a run that was killed makes none twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.saved import checkpoint_folder, step_name
from megatron_opd.convert.hf_files import write_hf_directory
from megatron_opd.convert.mcore_files import McoreTensors
from megatron_opd.convert.to_hf import hf_tensors
from megatron_opd.errors import LineageError
from megatron_opd.evaluate.run import evaluate_one, read_questions
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import Lineage, Prompt, PromptFile
from megatron_opd.safety.durable import make_folder
from megatron_opd.serve.opening import open_engine, uses_sglang
from megatron_opd.serve.stage import Lend, closing_engine, lending_one
from megatron_opd.train.checkpoint import CheckpointWriter
from megatron_opd.train.eval_checks import evaluation_under_way
from megatron_opd.train.job import Job, while_others_wait
from megatron_opd.train.optim import Trainee

_MOST_PATIENCE = 60.0  # seconds that a training waits for a server that is away


@dataclass
class Evals:
    """The evaluations of one training; every method is called on every rank. made, failed: on the first."""

    job: Job
    lineage: Lineage
    made: int = 0
    failed: int = 0
    seconds: float = 0.0

    def after(self, step: int, trainee: Trainee, writer: CheckpointWriter) -> dict[str, Any]:
        """Fields for the row of `step`: eval/NAME/accuracy and so on, or eval/NAME/error; none where no evaluation is due.

        Raises CheckpointError where the weights can't be written.
        """
        if not self.job.config.evaluates_after(step):
            return {}
        started = time.monotonic()
        folder = writer.write_weights(trainee, step)
        fields = while_others_wait(partial(self._evaluate, folder, step))
        self.seconds += time.monotonic() - started
        return fields

    def facts(self) -> dict[str, Any]:
        """For the account of the stage."""
        if not self.made + self.failed:
            return {}
        return {"evaluations": self.made, "failed_evaluations": self.failed, "evaluation_seconds": self.seconds}

    @cached_property
    def _questions(self) -> dict[str, tuple[PromptFile, list[Prompt]]]:
        config = self.job.config
        return {
            name: read_questions(evaluation_under_way(self.job.recipe, config, name, model=config.init, label="", output=config.output))
            for name in config.evals or []
        }

    def _evaluate(self, folder: Path, step: int) -> dict[str, Any]:
        """On the first rank; `folder` has the weights, and is removed. What goes wrong is no reason to end the training."""
        fields: dict[str, Any] = {}
        names, label = self.job.config.evals or [], step_name(step).replace("_", "-")
        left = list(names)
        try:
            student = folder / label
            self._write_student(folder, student)
            recipe = self.job.recipe.model_copy(update={"run_dir": str(folder)})  # the training's own account has the time
            with _engine(recipe.engine_for(self.job.config.init), str(student), self.job) as lend:
                while left:
                    started = time.monotonic()
                    found = self._evaluate_one(recipe, left[0], student, label, lend)
                    fields |= _fields(found, time.monotonic() - started)
                    self.made += 1
                    del left[0]
        except Exception as error:  # of an engine or a grader, too, which raise what they like
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"WARNING: {self.job.name}: after step {step} {', '.join(left) or 'the engine'} could not be evaluated: {text}; "
                f"training goes on ({self.failed + len(left)} failed so far)",
                flush=True,
            )
            self.failed += len(left)
            fields |= {f"eval/{name}/error": text for name in left}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return fields

    def _write_student(self, folder: Path, target: Path) -> None:
        source = McoreTensors(folder, self.job.ready.arch)
        write_hf_directory(
            target,
            hf_tensors(source, self.job.ready.arch, source.dtype),
            side_files=Path(self.job.config.init),
            dtype=source.dtype,
            lineage=self.lineage,
        )

    def _evaluate_one(self, recipe: Recipe, name: str, student: Path, label: str, lend: Lend) -> dict[str, Any]:
        """Figures and rows go to OUTPUT/eval/NAME when both are there; the samples are not kept."""
        here = evaluation_under_way(recipe, self.job.config, name, model=str(student), label=label, output=str(student.parent / "eval"))
        questions = self._questions[name]
        result = evaluate_one(recipe, here, questions, lend)
        if result["prompts_sha256"] != questions[0].sha256:
            raise LineageError(f"{here.prompts} changed while training ran; put it back, or start the training again")
        there = here.model_copy(update={"output": str(self.job.output / "eval")})
        make_folder(there.folder)
        for made, kept in ((here.rows, there.rows), (here.record, there.record)):
            if made.exists():  # nothing is graded without a grader
                os.replace(made, kept)
        return result


@contextlib.contextmanager
def _engine(config: EngineConfig, student: str, job: Job) -> Iterator[Lend]:
    """An engine with the student's weights. Servers have those that training starts from before, and again behind it."""
    if not uses_sglang(config):
        with lending_one(config, student) as lend:
            yield lend
        return
    config = config.model_copy(update={"patience": min(config.patience, _MOST_PATIENCE)})
    with closing_engine(open_engine(config, job.config.init, reclaim=checkpoint_folder(job.output))) as engine:
        try:
            engine.load(student)
            yield lambda model: contextlib.nullcontext(engine)
        finally:
            engine.load(job.config.init)


def _fields(result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Of a row: numbers, or None where an interval has no bound."""
    found: dict[str, Any] = {}
    if (accuracy := result.get("accuracy")) is not None:
        found = {"accuracy": accuracy["mean"], "accuracy_low": accuracy["low"], "accuracy_high": accuracy["high"]}
    if (grading := result.get("grading")) is not None:
        found |= {key: grading[key] for key in ("timeouts", "errors") if grading[key]}
    found |= {key: result[key] for key in ("stopped_share", "response_length", "excluded")} | {"seconds": seconds}
    return {f"eval/{result['evaluation']}/{key}": value for key, value in found.items()}
