"""The recipe's [slurm] section: what its jobs ask a cluster for. A field that is not given is left to slurm/env.sh, the site's file."""

from __future__ import annotations

import datetime
import os
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.layout import MOST, MOST_RANKS, Section
from megatron_opd.safety.redact import NOT_KEPT, referenced

MOST_SHARDS = 1000  # slurm.conf's MaxArraySize is 1001 by default
_TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-\d+(:[0-5]?\d){0,2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What this project gives sbatch itself: its jobs would not fit what was checked, not find each other, or not go on, with another value.
_OURS = (
    "--job-name", "--dependency", "--array", "--nodes", "--parsable", "--output", "--export", "--wrap", "--time", "--signal", "--requeue",
    "--no-requeue", "--ntasks", "--ntasks-per-node", "--tasks-per-node", "--gpus", "--gpus-per-node", "--gres", "--open-mode",
    "--kill-on-invalid-dep", "--chdir",
)  # fmt: skip
_OURS_SHORT = ("-J", "-d", "-a", "-N", "-o", "-t", "-n", "-G", "-D")


def _as_text(value: Any) -> Any:
    """In an override, slurm.time.train=12:00:00 is a time of TOML and slurm.account=1234 a number."""
    if isinstance(value, datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[^\x00-\x1f]*$")]


class TimesConfig(Section):
    """Time limits, as sbatch takes them. A stage that needs longer goes back into the queue and goes on."""

    cpu: _Text = Field(default="04:00:00", description="each job without a GPU: checks, conversions, report")
    generate: _Text = Field(default="24:00:00", description="each job of generate")
    sft: _Text = Field(default="48:00:00", description="each job of sft")
    rollout: _Text = Field(default="12:00:00", description="each job of rollout")
    score: _Text = Field(default="12:00:00", description="each job of score")
    engines: _Text = Field(default="01:00:00", description="the comparison of serving and training engine")
    train: _Text = Field(default="24:00:00", description="each job of train")
    eval: _Text = Field(default="12:00:00", description="each job of eval")

    @field_validator("*")
    @classmethod
    def _check(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError("a time such as 90 (minutes), 12:00:00 or 2-00:00:00 (days) is expected")
        return value


class ShardsConfig(Section):
    """Nodes that share the work of an inference stage: tasks of an array, each with servers of its own."""

    generate: int = Field(default=1, gt=0, le=MOST_SHARDS, description="nodes of generate")
    rollout: int = Field(default=1, gt=0, le=MOST_SHARDS, description="nodes of rollout")
    score: int = Field(default=1, gt=0, le=MOST_SHARDS, description="nodes of score")


class SlurmConfig(Section):
    """How `slurm/pipeline.sh` submits the recipe."""

    nodes: int = Field(default=1, gt=0, le=MOST_RANKS, description="nodes of sft and of train")
    gpus_per_node: int = Field(
        default=8, gt=0, le=MOST_RANKS, description="GPUs of a node; jobs of sft, train and inference take all of them"
    )
    ranks_per_node: int | None = Field(
        default=None, gt=0, le=MOST_RANKS, description="ranks of sft and train on a node; by default one a GPU"
    )
    gpus: _Text | None = Field(
        default=None, description="how the site asks for {n} GPUs of a node, for example --gpus-per-node={n} or --gres=gpu:h100:{n}"
    )
    partition: _Text | None = Field(default=None, description="partition of jobs with GPUs")
    cpu_partition: _Text | None = Field(default=None, description="partition of jobs without")
    account: _Text | None = Field(default=None, description="account that the jobs are charged to")
    qos: _Text | None = Field(default=None, description="quality of service of the jobs")
    options: list[_Text] = Field(default_factory=list, description="further options of sbatch for every job, a word each")
    gpu_options: list[_Text] = Field(
        default=["--exclusive", "--mem=0"], description="further ones of jobs that take the GPUs of whole nodes"
    )
    cpus: int = Field(default=16, gt=0, le=MOST_RANKS, description="CPU cores of a job that does not take a whole node")
    memory: _Text = Field(default="64G", description="memory, as sbatch takes it, of a job that does not take a whole node")
    time: TimesConfig = TimesConfig()
    shards: ShardsConfig = ShardsConfig()
    prologue: list[str] = Field(
        default_factory=list, description="lines of shell before the command of each job, such as 'module load cuda'"
    )
    environment: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(
        default_factory=dict,
        description="further variables of each job; HF_TOKEN = '$HF_TOKEN' takes a value from the shell that submits. Secret ones are not recorded",
    )
    image_train: _Text | None = Field(default=None, description="container image of the training software; docs/containers.md")
    image_serve: _Text | None = Field(default=None, description="container image of the inference software")
    image_engines: _Text | None = Field(default=None, description="container image that holds both, for the comparison of the two")
    venv_train: _Text | None = Field(default=None, description="virtual environment of the training software, where there is no image")
    venv_serve: _Text | None = Field(default=None, description="virtual environment of the inference software, where there is no image")
    mounts: _Text | None = Field(
        default=None, description="what a container sees besides this directory: SOURCE:TARGET, with commas between"
    )
    cache_dir: _Text | None = Field(
        default=None, description="a directory on each node's own disk, for what Triton, CUDA and torch compile"
    )
    retries: int | None = Field(
        default=None, ge=0, le=MOST, description="times that a job which failed by a node's fault is tried on others"
    )
    max_restarts: int | None = Field(default=None, ge=0, le=MOST, description="times that a job goes back into the queue in all")

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, gpus: str | None) -> str | None:
        return None if gpus is None else check_gpus_template(gpus)

    @field_validator("options", "gpu_options")
    @classmethod
    def _check_options(cls, options: list[str]) -> list[str]:
        for word in options:
            if not word.startswith("-"):
                raise ValueError(f"{word!r} is no option of sbatch; write --name=value, a word each")
            if _sets_ours(name := word.partition("=")[0]):
                raise ValueError(f"{name} is set by the pipeline itself; there are fields for nodes, shards, time and gpus")
        return options

    @field_validator("environment")
    @classmethod
    def _check_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
            if "\0" in value:
                raise ValueError(f"the value of {name} holds a NUL character")
        return environment

    @property
    def train_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node

    def variables(self) -> dict[str, str]:
        """`environment` with values such as $HF_TOKEN taken from this process. Raises ConfigError for what is not there."""
        filled = {}
        for name, value in self.environment.items():
            source = referenced(value)
            if value == NOT_KEPT:
                raise ConfigError(
                    f"slurm.environment.{name}: the value is not kept in a recipe that a run wrote; give it again, or write '${name}' to take it "
                    "from the environment"
                )
            if source is not None and source not in os.environ:
                raise ConfigError(f"slurm.environment.{name} is to be taken from the environment variable {source}, which is not set")
            filled[name] = value if source is None else os.environ[source]
        return filled

    def lines(self) -> list[str]:
        """`prologue`. Raises ConfigError where a recipe that a run wrote leaves a secret out."""
        for line in self.prologue:
            if NOT_KEPT in line:
                raise ConfigError(
                    f"slurm.prologue: a value is {NOT_KEPT}, as secrets are in a recipe that a run wrote; give the field again"
                )
        return self.prologue


def limit_hours(time: str) -> float:
    """Hours of a time limit as `TimesConfig` has it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if not dash and len(numbers) < 3:
        numbers.insert(0, 0)
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return 24 * int(days or 0) + hours + minutes / 60 + seconds / 3600


def _sets_ours(name: str) -> bool:
    """Whether an option of sbatch, without its value, is one of ours: -N4 is -N, and --arr may stand for --array."""
    if not name.startswith("--"):
        return name[:2] in _OURS_SHORT
    return name.startswith(("--ntasks", "--gpus")) or any(ours.startswith(name) for ours in _OURS)


def check_gpus_template(template: str) -> str:
    """Raises ValueError unless it says where the number goes."""
    if not template.startswith("-") or template.replace("{n}", "").count("{") or "{n}" not in template:
        raise ValueError("an option of sbatch with {n} for the number is expected, such as --gpus-per-node={n} or --gres=gpu:h100:{n}")
    return template
