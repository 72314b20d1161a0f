"""The recipe: one pydantic tree read from TOML, changed by dotted overrides, checked as a whole.

Every path may use {run_dir} and {name}, ~ and environment variables; the built recipe has them filled in, and remembers how they were
written. `None` means "off" or "not given"; there are no magic numbers for that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.cluster import SlurmConfig
from megatron_opd.recipe.derivation import DerivedConfig, check_names
from megatron_opd.recipe.evaluation import DATES, SUBSET, Dates, EvalStage, Seed, check_subset, named, round_number
from megatron_opd.recipe.inference import EncodingConfig, EngineConfig, Sampling
from megatron_opd.recipe.layout import MOST, Count
from megatron_opd.recipe.layout import Section as _Section
from megatron_opd.recipe.objective import RoundsConfig
from megatron_opd.recipe.paths import PathText
from megatron_opd.recipe.training_stages import SftStage, TrainStage
from megatron_opd.records import SamplingParams
from megatron_opd.safety.redact import holds_secret, redact, redact_address

STAGES = ("generate", "sft", "rollout", "score", "train", "eval")  # sections of a recipe, in the order of a run
# Text for the model, and for the shell, may hold braces of its own.
FREE_TEXT = {"system", "question", "prologue", "gpus"}
_FILLED_IN = {"name", "run_dir", "models"}  # what placeholders of other fields stand for


class ModelsConfig(_Section):
    """Hugging Face directories: config.json, safetensors, tokenizer."""

    teacher: PathText = Field(description="teacher model; must be the one whose answers the student was fine-tuned on")
    student: PathText = Field(description="base student, before SFT")


class SampleStage(_Section):
    """A stage that samples responses into a store."""

    model: PathText = Field(description="directory of the model that samples")
    prompts: PathText = Field(description="JSONL or Parquet file, or the folder of a Hugging Face dataset")
    store: PathText = Field(description="store that is made, or gone on with: a directory or an fsspec URL")
    num_prompts: int | None = Field(
        default=None, gt=0, le=MOST, description="use only N prompts of the file: the first, unless subset_seed"
    )
    subset_seed: Seed = Field(default=None, description=SUBSET)
    share: tuple[Count, Count] | None = Field(default=None, description="[i, n]: of these prompts the i-th of n equal shares, in order")
    dates: Dates = Field(default=None, description=DATES)
    unique_prompts: bool = Field(default=False, description="each prompt but once (DAPO-Math-17k holds each a hundred times)")
    prompts_per_part: int = Field(default=256, gt=0, le=MOST, description="prompts whose samples are written and sealed together")
    max_quarantined: float = Field(default=0.001, ge=0, le=1, description="share of failed rollouts above which the stage exits with 3")
    sampling: Sampling = SamplingParams()
    encoding: EncodingConfig = EncodingConfig()

    @model_validator(mode="after")
    def _check_share(self) -> SampleStage:
        if self.share is not None and self.share[0] > self.share[1]:
            raise ValueError(f"share = {list(self.share)}: [i, n] with i at most n is expected")
        check_subset(self.subset_seed, self.num_prompts)
        return self


class GenerateStage(SampleStage):
    """Teacher responses for SFT."""

    model: PathText = "{teacher}"
    store: PathText = "{run_dir}/sft.opd.zarr"


class RolloutStage(SampleStage):
    """Student responses for distillation."""

    model: PathText = "{run_dir}/sft-hf"
    store: PathText = "{run_dir}/rollouts.opd.zarr"
    allow_template_mismatch: bool = Field(default=False, description="prompts written otherwise than those of the SFT answers; recorded")
    sft_teacher: PathText | None = Field(default=None, description="declare the SFT teacher of a checkpoint made elsewhere (its directory)")


class ScoreStage(_Section):
    """Teacher log-probabilities of the rollouts."""

    store: PathText = Field(default="{run_dir}/rollouts.opd.zarr", description="store of the rollouts; the scores go into it")
    model: PathText = Field(default="{teacher}", description="directory of the model that scores")
    teacher: str = Field(default="teacher", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the teacher's group in the store")
    top_k: int = Field(default=0, ge=0, le=MOST, description="candidates of the teacher that are stored at each token; 0: none")
    topk_dtype: Literal["float32", "float16"] = Field(default="float32", description="of the candidates' log-probabilities")
    overlong: Literal["error", "cut", "skip"] = Field(
        default="error", description="rollouts longer than the teacher takes: score what fits, or leave them out; both are recorded"
    )
    max_quarantined: float = Field(default=0.001, ge=0, le=1, description="share of failed rollouts above which the stage exits with 3")
    allow_teacher_mismatch: bool = Field(default=False, description="score with a model that is not the student's SFT teacher; recorded")
    derived: Annotated[dict[str, DerivedConfig], BeforeValidator(check_names)] = Field(
        default_factory=dict, description="by name, [score.derived.NAME]: scores made of the teacher's, for train.teacher = 'NAME'"
    )

    @model_validator(mode="after")
    def _check_derived(self) -> ScoreStage:
        if self.teacher in self.derived:
            raise ValueError(
                f"derived.{self.teacher}: that is the name of the teacher that it would be made of (score.teacher); take another"
            )
        return self


class Recipe(_Section):
    """Everything that a run is made of. Stages not used by a recipe may be left out where they have no required field."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run; {name} in paths")
    run_dir: PathText = Field(default="runs/{name}", description="folder of what the run makes; {run_dir} in paths")
    models: ModelsConfig
    engine: EngineConfig = EngineConfig()
    generate: GenerateStage | None = None
    sft: SftStage = SftStage()
    rollout: RolloutStage | None = None
    score: ScoreStage = ScoreStage()
    train: TrainStage = TrainStage()
    rounds: RoundsConfig = RoundsConfig()
    eval: Annotated[dict[str, EvalStage], BeforeValidator(named)] = Field(default_factory=dict, description="by name: [eval.NAME]")
    slurm: SlurmConfig = SlurmConfig()
    _written: Recipe | None = PrivateAttr(default=None)  # with {placeholders}, ~ and $VARIABLES; None: as it is here

    @model_validator(mode="after")
    def _check_rounds(self) -> Recipe:
        if (fault := self.rounds.fault(self.train.steps, self.train.drift)) is not None:
            raise ValueError(f"rounds: {fault}")
        return self

    @model_validator(mode="after")
    def _check_derived_teacher(self) -> Recipe:
        if self.train.teacher in self.score.derived and self.train.loss.needs_topk:
            raise ValueError(
                f"train.loss.name = {self.train.loss.name!r} needs a teacher's candidates, and derived scores have none (train.teacher = "
                f"{self.train.teacher!r}); take a loss of the sampled token: 'opd' or 'exopd'"
            )
        return self

    @property
    def trains_on_any_teacher(self) -> bool:
        """Whether training reads scores that are made so that the teacher of [score] need not be the student's SFT teacher."""
        derived = self.score.derived.get(self.train.teacher)
        return derived is not None and derived.method == "residualize"

    @model_validator(mode="after")
    def _check_evaluations(self) -> Recipe:
        for name, stage in self.eval.items():
            for label in [*stage.models, *([stage.baseline] if stage.baseline else [])]:
                if (number := round_number(label)) is not None and number > self.rounds.count:
                    raise ValueError(f"eval.{name}: {label!r}, but the recipe has rounds.count = {self.rounds.count}")
        return self

    @model_validator(mode="after")
    def _check_evals_under_way(self) -> Recipe:
        names = ", ".join(self.eval) or "none"
        for stage, config in (("sft", self.sft), ("train", self.train)):
            if config.eval_every is not None and config.evals is None:
                raise ValueError(
                    f"{stage}.eval_every = {config.eval_every}: name what is to be evaluated, {stage}.evals=[...] (of {names})"
                )
            if unknown := [name for name in config.evals or [] if name not in self.eval]:
                raise ValueError(f"{stage}.evals: the recipe has no evaluation {', '.join(map(repr, unknown))}; it has {names}")
        return self

    @model_validator(mode="after")
    def _check_addresses(self) -> Recipe:
        for where, text in _texts(self.model_dump(exclude={"engine": True, "slurm": {"environment"}})):
            if holds_secret(text):
                raise ValueError(
                    f"{where}: the address {redact_address(text)!r} holds a password or key, which would end up in files and logs; give it without, "
                    "and the secret in the environment (AWS_SECRET_ACCESS_KEY and the like)"
                )
        return self

    def remember(self, written: Recipe) -> Recipe:
        """This recipe, which from now on is written down as `written`, from which it was filled in."""
        self._written = written
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """As pydantic's. A changed section is written down as it was given, the others as they were read; with another name, run_dir or models,
        which others were filled in with, all of it as it is filled in."""
        copy = super().model_copy(update=update, deep=deep)
        if update and copy._written is not None:
            copy._written = None if _FILLED_IN & update.keys() else copy._written.model_copy(update=update)
        return copy

    def engine_for(self, model: str) -> EngineConfig:
        """The engine settings for serving the model in this directory: engine.launch.teacher counts for a teacher's, .student for any other."""
        teachers = [self.models.teacher, self.score.model]
        teachers += [self.generate.model] if self.generate else []
        teachers += [stage.teacher for stage in self.eval.values() if stage.teacher]
        return self.engine.serving("teacher" if os.path.realpath(model) in map(os.path.realpath, teachers) else "student")

    def recorded(self, **options: Any) -> dict[str, Any]:
        """The recipe as it may be written down and sent to others: without the values of secrets. `options` are model_dump's."""
        return redact(self.model_dump(**options))

    def to_toml(self) -> str:
        """The checked recipe, every default included, with placeholders as they were written, so that it can be used under another name.

        Options that are off are left out, as TOML has no null, and so are secrets.
        """
        written = self._written or self
        tree = written.recorded(exclude_none=True)
        if not written.eval:
            del tree["eval"]
        if not written.score.derived:
            del tree["score"]["derived"]
        for name, stage in written.eval.items():
            if stage.teacher is None:
                tree["eval"][name]["teacher"] = "none"  # left out, it would be the default again
        return tomli_w.dumps(tree)


def _texts(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree that is not for the model, with its field."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in FREE_TEXT or isinstance(value, dict):
                yield from _texts(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, f"{where}.{number}")
    elif isinstance(node, str):
        yield where, node


def require(section: Any, name: str) -> Any:
    """The stage's section, or a ConfigError that says that the recipe has none."""
    if section is None:
        raise ConfigError(f"the recipe has no [{name}] section; add it, or give its fields as overrides ({name}.prompts=...)")
    return section
