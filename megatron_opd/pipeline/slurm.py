"""A recipe's stages as jobs of Slurm: what each asks sbatch for, which it waits for; and the record of those that were submitted."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_opd.cost.meter import read_jsonl
from megatron_opd.errors import ConfigError, UserError
from megatron_opd.evaluate.chosen import check_code_allowed
from megatron_opd.pipeline.stages import RECIPE, Stage, list_stages, made_by, upstream
from megatron_opd.recipe.cluster import SlurmConfig, check_gpus_template
from megatron_opd.recipe.config import Recipe
from megatron_opd.safety.redact import redact_override, redact_words

RECORDS = "slurm_jobs.jsonl"  # in the run folder
SCRIPT = "slurm/stage.sh"
# Seconds before the end of its time that Slurm tells a job: what a checkpoint takes, or the requests under way.
_SIGNAL = {"train": 600, "serve": 120, "one": 120, "cpu": 120}
_CHECKS = {"check": "train", "check-sft": "sft"}  # the jobs that look whether a training can start
# Fields that slurm/env.sh may give as well, and what they are called there. What sbatch reads by itself begins with SBATCH_.
_SITE = {
    "account": "SBATCH_ACCOUNT",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "cpu_partition": "CPU_PARTITION",
    "gpus": "GPUS",
    "ranks_per_node": "RANKS_PER_NODE",
    "image_train": "IMAGE_TRAIN",
    "image_serve": "IMAGE_SERVE",
    "image_engines": "IMAGE_ENGINES",
    "venv_train": "VENV_TRAIN",
    "venv_serve": "VENV_SERVE",
    "mounts": "MOUNTS",
    "cache_dir": "CACHE_DIR",
    "retries": "RETRIES",
    "max_restarts": "MAX_RESTARTS",
}


@dataclass(frozen=True)
class Job:
    """One job: `words` follow `megatron-opd`, `options` follow `sbatch`, `after` are the labels of the jobs that must succeed first."""

    label: str
    kind: Literal["cpu", "serve", "train", "one"]
    words: tuple[str, ...]
    options: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def script(self) -> list[str]:
        return [SCRIPT, self.kind, self.label, *self.words]


@dataclass(frozen=True)
class Cluster:
    """The recipe's [slurm] section over the site's settings (slurm/env.sh, by name): what the recipe gives goes first."""

    section: SlurmConfig
    site: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> str | None:
        """A setting that both may give; None where neither does."""
        own = getattr(self.section, name)
        return (str(own) if own is not None else self.site.get(_SITE[name])) or None

    @property
    def ranks_per_node(self) -> int:
        own = self.get("ranks_per_node")
        if own is not None and (not own.isdecimal() or int(own) == 0):
            raise ConfigError(f"RANKS_PER_NODE={own} in slurm/env.sh: a whole number above 0 is expected")
        return int(own) if own else self.section.gpus_per_node

    @property
    def ranks(self) -> int:
        return self.section.nodes * self.ranks_per_node

    def gpus(self, count: int) -> str:
        """The site's option for `count` GPUs of a node."""
        try:
            template = check_gpus_template(self.get("gpus") or "--gpus-per-node={n}")
        except ValueError as error:
            raise ConfigError(f"GPUS in slurm/env.sh: {error}") from None
        return template.replace("{n}", str(count))

    def describe(self) -> list[str]:
        """Which settings come from where, for people."""
        recipe = {name: value for name, value in self.section.model_dump(exclude_none=True).items() if isinstance(value, str | int)}
        site = {name: self.site[_SITE[name]] for name in _SITE if name not in recipe and self.site.get(_SITE[name])}
        lines = [("recipe", recipe), ("slurm/env.sh", site)]
        return ["settings (what the recipe gives goes before slurm/env.sh):"] + [
            f"  {source}: {' '.join(f'{name}={value}' for name, value in found.items())}" for source, found in lines if found
        ]

    def variables(self, recipe: Recipe) -> dict[str, str]:
        """The environment of every job besides that of the shell which submits. Raises ConfigError for a secret that is not there.

        slurm/lib.sh takes OPD_SET_NAME for NAME after it has read slurm/env.sh.
        """
        given = {
            site: str(value)
            for name, site in _SITE.items()
            if (value := getattr(self.section, name)) is not None and not site.startswith("SBATCH_")
        }
        settings = given | {"RANKS_PER_NODE": str(self.ranks_per_node)} | self.section.variables()
        return {f"OPD_SET_{name}": value for name, value in settings.items()} | {
            "OPD_PROLOGUE": "\n".join(self.section.lines()),
            "OPD_RUN_DIR": recipe.run_dir,
            "OPD_CHECKED": "yes",  # by a job without GPUs
        }


def plan_jobs(
    recipe: Recipe, name: str, overrides: list[str], cluster: Cluster, *, first: str | None = None, last: str | None = None
) -> list[Job]:
    """The jobs of the recipe called `name` with these `overrides`, from stage `first` to stage `last`. Raises UserError, ConfigError.

    What Slurm could only find out with GPUs in its hands is refused here: layouts that do not fit the nodes, servers that do not fit a node.
    """
    stages = select_stages(list_stages(recipe), first, last)
    if (reason := no_engines(recipe, cluster)) is not None:
        if "engines" in (first, last):
            raise ConfigError(f"the job engines can't run: {reason}")
        stages = [stage for stage in stages if stage.name != "engines"]
    check_layout(recipe, cluster)
    check_code_allowed({name: recipe.eval[name] for name in dict.fromkeys(stage.evaluation for stage in stages) if name is not None})
    jobs: list[Job] = []
    for stage in stages:
        after = _needs(recipe, stage, jobs)
        if stage.runs_on == "train":
            check = _check_before(stage, name, overrides, cluster)
            jobs.append(_job(check, check.label, recipe, name, overrides, cluster, after))
            after = (check.label,)
        jobs.append(_job(stage, stage.label, recipe, name, overrides, cluster, after))
    return jobs


def select_stages(stages: list[Stage], first: str | None, last: str | None) -> list[Stage]:
    """Those between two labels; a name stands for the first of its rounds, or as the end for the last. Raises UserError.

    To begin with the check of a training is to begin with that training.
    """
    begin, end = 0, len(stages)
    if first is not None and first.partition("@")[0] in _CHECKS:  # submitted with its training
        name, sign, number = first.partition("@")
        first = f"{_CHECKS[name]}{sign}{number}"
    for label in (first, last):
        if label is not None and not any(stage.is_meant(label) for stage in stages):
            raise UserError(f"no stage {label!r} in this recipe; there are: {', '.join(stage.label for stage in stages)}")
    if first is not None:
        begin = next(number for number, stage in enumerate(stages) if stage.is_meant(first))
    if last is not None:
        end = max(number for number, stage in enumerate(stages, start=1) if stage.is_meant(last))
    if begin >= end:
        raise UserError(f"stage {last!r} comes before {first!r}; the order is: {', '.join(stage.label for stage in stages)}")
    return stages[begin:end]


def no_engines(recipe: Recipe, cluster: Cluster) -> str | None:
    """Why the engines can't be compared: the training image alone has no SGLang to start. None if they can, or the recipe compares none."""
    if not _launches(recipe) or all(stage.name != "engines" for stage in list_stages(recipe)):
        return None
    launch = recipe.engine.launch
    if not cluster.get("image_train") or cluster.get("image_engines") or (launch is not None and launch.command):
        return None
    return (
        "the training image has no SGLang; give an image that holds both (IMAGE_ENGINES in slurm/env.sh, slurm.image_engines), a command that "
        "starts SGLang in the training image (engine.launch.command), or running servers (engine.urls)"
    )


def _launches(recipe: Recipe) -> bool:
    return recipe.engine.launch is not None and not recipe.engine.urls and recipe.engine.kind != "transformers"


def check_layout(recipe: Recipe, cluster: Cluster) -> None:
    """Raise ConfigError, with every fault, where ranks or servers do not fit what the [slurm] section asks for."""
    faults = []
    section, per_node = cluster.section, cluster.ranks_per_node
    for name, stage in (("sft", recipe.sft), ("train", recipe.train)):
        try:
            stage.check_ranks(name, cluster.ranks)
        except ConfigError as error:
            faults.append(f"slurm.nodes = {section.nodes} of {per_node} ranks each: {error}")
    launch = recipe.engine.launch if not recipe.engine.urls else None
    for model in ("teacher", "student"):
        of_model = launch.serving(model) if launch is not None else None
        if of_model is not None and (count := of_model.servers * of_model.tp * of_model.dp) > section.gpus_per_node:
            faults.append(
                f"engine.launch for the {model}: servers * tp * dp = {of_model.servers} * {of_model.tp} * {of_model.dp} = {count} GPUs, but a node "
                f"has slurm.gpus_per_node = {section.gpus_per_node}; take fewer copies (dp), or nodes of more GPUs"
            )
    if recipe.engine.kind == "sglang" and launch is None and not recipe.engine.urls:
        faults.append("engine.kind = 'sglang', but no servers: give engine.launch, or the addresses of running ones (engine.urls)")
    if faults:
        raise ConfigError("these jobs can't run as asked:" + "".join(f"\n  - {fault}" for fault in faults))


def _needs(recipe: Recipe, stage: Stage, jobs: list[Job]) -> tuple[str, ...]:
    """The jobs before `stage`: an evaluation waits for its model (and for its baseline), the report for all, others for the one before."""
    chain = [job.label for job in jobs if not job.label.startswith("eval-")]
    evaluations = [job.label for job in jobs if job.label.startswith("eval-")]
    if stage.name == "report":
        return tuple(chain[-1:] + evaluations)
    if stage.evaluation is None:
        return tuple(chain[-1:])
    there = [job.label for job in jobs]
    needed = [name if number is None else f"{name}@{number}" for name, number in upstream(stage, recipe)]
    return tuple(label for label in ([] if made_by(recipe, stage) else ["inputs"]) + needed if label in there)


def _check_before(stage: Stage, name: str, overrides: list[str], cluster: Cluster) -> Stage:
    """The job without GPUs that looks whether a training can start."""
    label = next(check for check, training in _CHECKS.items() if training == stage.name)
    flags = stage.words[2:]  # --round N
    words = ("check", RECIPE, "--stage", stage.name, "--ranks", str(cluster.ranks), *flags)
    return Stage(label, words, "cpu", round=stage.round)


def _job(stage: Stage, label: str, recipe: Recipe, name: str, overrides: list[str], cluster: Cluster, after: tuple[str, ...]) -> Job:
    section = cluster.section
    shards = getattr(section.shards, stage.name, 1)
    options = [f"--job-name={recipe.name}-{label}", f"--output=logs/%x-{'%A_%a' if shards > 1 else '%j'}.out"]
    options += [f"--nodes={section.nodes if stage.runs_on == 'train' else 1}", f"--signal=B:USR1@{_SIGNAL[stage.runs_on]}"]
    if shards > 1:
        options.append(f"--array=0-{shards - 1}")
    partition = cluster.get("cpu_partition") if stage.runs_on == "cpu" else section.partition
    for option, value in (("partition", partition), ("account", section.account), ("qos", section.qos)):
        if value:
            options.append(f"--{option}={value}")
    if stage.runs_on in ("cpu", "one"):
        options += [f"--cpus-per-task={section.cpus}", f"--mem={section.memory}"]
    if stage.runs_on != "cpu":
        options.append(cluster.gpus(1 if stage.runs_on == "one" else section.gpus_per_node))
    if stage.runs_on in ("serve", "train"):
        options += section.gpu_options
    kind = "cpu" if stage.runs_on == "cpu" else "eval" if stage.evaluation is not None else stage.name
    options += [f"--time={getattr(section.time, kind)}", *section.options]
    before, after_all = _servers(stage, recipe, cluster)
    words = stage.command(name, [*before, *overrides, *after_all])
    if stage.name == "inputs":
        words += ["--ranks", str(cluster.ranks)]
    return Job(label, stage.runs_on, tuple(words), tuple(options), after)


def _servers(stage: Stage, recipe: Recipe, cluster: Cluster) -> tuple[list[str], list[str]]:
    """Overrides before the user's own, and behind them: the training software starts the server, and the job has one GPU."""
    launch = recipe.engine.launch
    if launch is None or not _launches(recipe) or stage.runs_on != "one":
        return [], []
    sizes = [f"engine.launch{where}.{name}=1" for where in ("", ".student") for name in ("servers", "tp", "dp")]
    serve = cluster.get("venv_serve")
    if serve and not cluster.get("image_train") and not launch.command:
        words = [os.path.abspath(f"{serve}/bin/python"), "-m", "sglang.launch_server"]
        return [f"engine.launch.command={json.dumps(words)}"], sizes
    return [], sizes


def shell_plan(jobs: Sequence[Job], recipe: Recipe, cluster: Cluster) -> str:
    """What slurm/pipeline.sh carries out: a line of shell for each variable, image and job."""
    lines = [["record_in", recipe.run_dir]]
    lines += [["variable", name, value] for name, value in cluster.variables(recipe).items()]
    lines += [["image", image] for name in ("image_train", "image_serve", "image_engines") if (image := cluster.get(name))]
    for job in jobs:
        record = json.dumps({"label": job.label, "command": _shown(job.words), "options": list(job.options)})
        lines.append(["submit", job.label, " ".join(job.after), record[1:-1], *job.options, *job.script])
    return "# jobs\n" + "".join(f"{shlex.join(line)}\n" for line in lines)


def describe(jobs: Sequence[Job], recipe: Recipe, cluster: Cluster) -> list[str]:
    """For people: which settings come from where, and what is left out."""
    lines = cluster.describe()
    reason = no_engines(recipe, cluster)
    if reason is not None and any(job.label.partition("@")[0] in ("score", "check", "train") for job in jobs):
        lines.append(f"no job engines: {reason}. Training goes on all the same, and says that the noise between the engines is not known.")
    return lines


def show_plan(jobs: Sequence[Job], recipe: Recipe, cluster: Cluster) -> list[str]:
    """The jobs as sbatch lines, for people; the ids of jobs that are waited for are not known yet."""
    lines = describe(jobs, recipe, cluster)
    for job in jobs:
        after = [f"--dependency=afterok:{':'.join(f'<{label}>' for label in job.after)}", "--kill-on-invalid-dep=yes"] if job.after else []
        words = [*job.options, *job.script[:3], *_shown(job.words)]
        lines.append(f"{job.label:<20} {' '.join(['sbatch', *after, shlex.join(words)])}")
    return lines


def _shown(words: Sequence[str]) -> list[str]:
    return [redact_override(word) for word in redact_words(list(words))]


def read_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run's jobs, oldest first: submitted, cancelled, started, retried, failed. Damaged rows are said and left out."""
    rows = read_jsonl(Path(run_dir) / RECORDS)
    return [row for row in rows if all(isinstance(row.get(key), str) for key in ("event", "job"))]


def read_jobs(run_dir: str | Path) -> dict[str, list[str]]:
    """Ids of the jobs that were submitted for each stage (by its label), oldest first."""
    rows = read_rows(run_dir)
    cancelled = {row["job"] for row in rows if row["event"] == "cancelled"}
    jobs: dict[str, list[str]] = {}
    for row in rows:
        if row["event"] == "submitted" and isinstance(row.get("label"), str) and row["job"] not in cancelled:
            jobs.setdefault(row["label"], []).append(row["job"])
    return jobs


def job_states(ids: Iterable[str]) -> dict[str, str]:
    """'RUNNING on node3', 'PENDING (Dependency)', or for an array '2 RUNNING, 1 PENDING', of those jobs that are in the queue now.

    Empty where there is no squeue or it does not answer.
    """
    wanted = set(ids)
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%F|%T|%R"],
            capture_output=True, text=True, errors="replace", timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, list[tuple[str, str]]] = {}
    for line in answer.stdout.splitlines():
        job, _, rest = line.partition("|")
        state, _, where = rest.partition("|")
        if job in wanted:
            found.setdefault(job, []).append((state, where))
    return {job: _describe_states(tasks) for job, tasks in found.items()}


def _describe_states(tasks: list[tuple[str, str]]) -> str:
    if len(tasks) == 1:
        state, where = tasks[0]
        return f"{state} {where}" if where.startswith("(") else f"{state} on {where}" if where else state
    states = [state for state, _ in tasks]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
