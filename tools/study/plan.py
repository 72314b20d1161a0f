"""What a study has to do: recipes, one a run folder, and the jobs, each a command of one of them, in the order in which they may run.

STUDY/seed-0/start-a/      the answers of teacher A, the student that was fine-tuned on them, its rollouts with all teachers' scores
             start-b/      the same of teacher B
             answers-a/    teacher A's own responses to the prompts of the rollouts
             ARM/          a student that was distilled; 'megatron-opd run STUDY/seed-0/ARM/arm.toml' makes it by hand
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from megatron_opd.recipe.files import read_tree

from .arms import Arm, in_order
from .settings import Settings
from .subject import ARITHMETIC, Subject

RECIPE = "arm.toml"
DRIFT, OTHER = "drift", "other"  # evaluations against pi_ref and the teacher of the other style, beside that against the OPD teacher
Component = Literal["generate", "sft", "convert", "rollout", "score", "derive", "train", "rounds", "eval"]
_SEEDS_APART = 1000  # rounds count their seeds of sampling up


@dataclass(frozen=True)
class Job:
    """`megatron-opd WORDS`. needs: names of jobs. store: what no other job may write to at the same time. of_start: makes the SFT student.

    recipe_sha256: of the recipe that it is a command of, with what that extends; "" for none.
    """

    name: str
    component: Component
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    store: str = ""
    of_start: bool = False
    recipe_sha256: str = ""


@dataclass(frozen=True)
class Replicate:
    """A seed's part of the study: its own initial students, prompts, answers, rollouts and orders."""

    folder: Path
    seed: int
    settings: Settings
    subject: Subject = ARITHMETIC

    def recipe(self, name: str) -> str:
        return str(self.folder / name / RECIPE)

    def start(self, student: str) -> str:
        return f"start-{student}"

    def name(self, job: str) -> str:
        return f"seed-{self.seed}/{job}"

    # -- recipes

    def trees(self) -> dict[str, dict[str, Any]]:
        """The recipes of all arms and of what they share, by the name of their folder."""
        arms = self.subject.possible
        trees = {self.start(student): self.start_tree(student) for student in {arm.student for arm in arms}}
        trees |= {f"answers-{arm.teacher}": self.answers_tree(arm.teacher) for arm in arms if arm.own_answers}
        return trees | {arm.name: self.arm_tree(arm) for arm in arms}

    def start_tree(self, student: str) -> dict[str, Any]:
        """The recipe that fine-tunes on a teacher's answers and samples from the result."""
        tree = self._tree(self.start(student), teacher=student, student=student)
        tree["eval"] = {self.subject.evaluation: self._evaluation(models=["teacher", "sft"], baseline="none")}
        if self.subject.other_teacher:
            other = "b" if student == "a" else "a"
            tree["eval"][OTHER] = self._evaluation(models=["sft"], grader="none", teacher=self._place(f"teacher-{other}"))
        return tree

    def answers_tree(self, teacher: str) -> dict[str, Any]:
        """The recipe that samples the teacher's own responses to the prompts of the rollouts."""
        tree = self._tree(f"answers-{teacher}", teacher=teacher, student=teacher)
        tree["generate"] |= {
            "prompts": self._place("prompts/rollout.jsonl"),
            "store": self._place(f"answers-{teacher}/answers.opd.zarr"),
            "prompts_per_part": 250,
            "sampling": {"seed": self._seed, "samples_per_prompt": self.settings.samples},
        }
        return tree

    def arm_tree(self, arm: Arm) -> dict[str, Any]:
        """The recipe of an arm. What it shares with others it names by path."""
        tree, start = self._tree(arm.name, teacher=arm.teacher, student=arm.student), self.start(arm.student)
        student = self._place(f"{start}/sft-hf")
        tree["generate"]["store"] = tree["sft"]["store"] = self._place(f"{start}/sft.opd.zarr")
        tree["generate"]["model"] = self._place(f"teacher-{arm.student}")
        tree["sft"]["output"] = self._place(f"{start}/sft")
        tree["rollout"]["model"] = student
        train = tree["train"]
        train |= {"init": student, "loss": arm.loss, "steps": self.settings.steps * arm.times}
        train["save_every"] = arm.every or train["steps"]
        tree["unset"] = ["train.loss"]
        if arm.lr is not None:
            train["lr"] = arm.lr
        score: dict[str, Any] = {"top_k": arm.top_k if arm.scores == "top_k" else 0}
        if arm.every is None:
            store = self._place(self.store(arm))
            tree["rollout"]["store"] = train["store"] = score["store"] = store
            score["teacher"] = arm.teacher if arm.scores in ("shuffle", "residualize") else arm.scores_name
            train["teacher"] = arm.scores_name
        else:
            tree["rounds"] = {"count": train["steps"] // arm.every, "keep_alive": True}
            # In rounds the plain loss may ruin a student, whose responses then do not end: a result, no fault of the inputs.
            if arm.loss["name"] == "opd":
                train["allow_stop_mismatch"] = True
        if arm.own_answers:
            train["allow_off_policy"] = True
        if not arm.consistent and arm.scores != "residualize":
            score["allow_teacher_mismatch"] = train["allow_teacher_mismatch"] = True
        if arm.scores in ("shuffle", "residualize"):
            score["derived"] = {arm.scores_name: {"method": arm.scores, "seed": self._seed}}
        tree["score"] = score
        tree["eval"] = {
            self.subject.evaluation: self._evaluation(models=["opd"], baseline="none"),
            DRIFT: self._evaluation(models=["opd"], baseline="none", grader="none", teacher=student),
        }
        return tree

    def _tree(self, name: str, *, teacher: str, student: str) -> dict[str, Any]:
        s, one_rank = self.settings, {"tp": 1, "pp": 1}
        sft_steps = s.sft_steps if student == "a" else s.sft_b_steps
        return {
            "name": name,
            "extends": self.subject.recipe,
            "run_dir": self._place(name),
            "models": {"teacher": self._place(f"teacher-{teacher}"), "student": self._place("student")},
            "generate": {"prompts": self._place(f"prompts/sft-{student}.jsonl"), "sampling": {"seed": self._seed}},
            "sft": {"steps": sft_steps, "seed": self.seed, "save_every": sft_steps, "parallel": one_rank},
            "rollout": {"prompts": self._place("prompts/rollout.jsonl"), "sampling": {"seed": self._seed, "samples_per_prompt": s.samples}},
            "train": {"global_batch": s.batch, "seed": self.seed, "steps": s.steps, "parallel": one_rank},
        }

    def _evaluation(self, **changes: Any) -> dict[str, Any]:
        sampling = {"seed": self._seed, "max_new_tokens": self.subject.max_new_tokens}
        return {"prompts": self._place("prompts/eval.jsonl"), "sampling": sampling} | changes

    @property
    def _seed(self) -> int:
        return self.seed * _SEEDS_APART

    def _place(self, name: str) -> str:
        return str(self.folder / name)

    def store(self, arm: Arm) -> str:
        """Where the responses of an arm without rounds are, from the seed's folder."""
        return f"answers-{arm.teacher}/answers.opd.zarr" if arm.own_answers else f"{self.start(arm.student)}/rollouts.opd.zarr"

    # -- jobs

    def start_jobs(self, student: str) -> list[Job]:
        start, recipe = self.start(student), self.recipe(self.start(student))
        chain: list[tuple[Component, tuple[str, ...]]] = [
            ("generate", ("generate", recipe)),
            ("sft", ("sft", recipe, "--nproc", "1")),
            ("convert", ("convert", "trained", recipe, "--stage", "sft")),
        ]
        jobs: list[Job] = []
        for component, words in chain:
            jobs.append(Job(self.name(f"{start}/{component}"), component, words, tuple(job.name for job in jobs[-1:]), of_start=True))
        jobs.append(Job(self.name(f"{start}/eval"), "eval", ("eval", recipe), (jobs[-1].name,), of_start=True))
        return jobs

    def arm_jobs(self, arm: Arm) -> list[Job]:
        """All that an arm needs, beginning with what it shares with others; jobs of one name are the same job."""
        jobs, start, recipe = self.start_jobs(arm.student), self.start(arm.student), self.recipe(arm.name)
        if arm.every is not None:
            last = Job(self.name(f"{arm.name}/rounds"), "rounds", ("rounds", recipe, "--nproc", "1"), (self.name(f"{start}/convert"),))
            jobs.append(last)
        else:
            jobs += self._offline_jobs(arm)
            last = jobs[-1]
        return [*jobs, Job(self.name(f"{arm.name}/eval"), "eval", ("eval", recipe), (last.name,))]

    def _offline_jobs(self, arm: Arm) -> Iterable[Job]:
        start, recipe, store = self.start(arm.student), self.recipe(arm.name), self.store(arm)

        def maker(scores: str) -> str:
            """The recipe of the first arm with these scores, whichever arms are chosen: a job is always the same command."""
            same = (
                other
                for other in in_order(self.subject.possible)
                if other.every is None and self.store(other) == store and other.scores_name == scores
            )
            return self.recipe(next(same, arm).name)

        converted = self.name(f"{start}/convert")
        if arm.own_answers:
            answers = f"answers-{arm.teacher}"
            sampled = Job(self.name(f"{answers}/generate"), "generate", ("generate", self.recipe(answers)))
        else:
            sampled = Job(self.name(f"{start}/rollout"), "rollout", ("rollout", self.recipe(start)), (converted,))
        source = arm.teacher if arm.scores in ("shuffle", "residualize") else arm.scores_name
        place = str(Path(store).parent)
        scored = Job(self.name(f"{place}/score-{source}"), "score", ("score", maker(source)), (sampled.name,), store)
        jobs = [sampled, scored]
        if source != arm.scores_name:
            jobs.append(
                Job(self.name(f"{place}/derive-{arm.scores_name}"), "derive", ("derive", maker(arm.scores_name)), (scored.name,), store)
            )
        needs = (jobs[-1].name, converted)
        jobs.append(Job(self.name(f"{arm.name}/train"), "train", ("train", recipe, "--nproc", "1"), needs))
        return [*jobs, Job(self.name(f"{arm.name}/convert"), "convert", ("convert", "trained", recipe), (jobs[-1].name,))]


def list_jobs(replicates: Sequence[Replicate], arms: Sequence[Arm]) -> list[Job]:
    """Every job once, those of the first seed first."""
    jobs: dict[str, Job] = {}
    for replicate in replicates:
        base = read_tree(replicate.subject.recipe)
        hashes = {replicate.recipe(name): _sha256([base, tree]) for name, tree in replicate.trees().items()}
        for arm in arms:
            for job in replicate.arm_jobs(arm):
                recipe = next(word for word in job.words if word in hashes)
                jobs.setdefault(job.name, replace(job, recipe_sha256=hashes[recipe]))
    return list(jobs.values())


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def write_recipes(replicate: Replicate) -> None:
    """Of all arms, also those that were not chosen: shared scores are made by the recipe of one of the arms."""
    for name, tree in replicate.trees().items():
        path = Path(replicate.recipe(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(tree), encoding="utf-8")


def folder_of(study: Path, seed: int) -> Path:
    return study / f"seed-{seed}"


def seeds_in(study: Path) -> list[int]:
    """The seeds that have a folder."""
    return sorted(int(path.name.removeprefix("seed-")) for path in study.glob("seed-*") if path.name.removeprefix("seed-").isdecimal())
