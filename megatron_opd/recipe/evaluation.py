"""Evaluations of a recipe, [eval.NAME]: what is asked, how it is graded, and of which models."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from megatron_opd.recipe.code_limits import CodeLimits
from megatron_opd.recipe.inference import EncodingConfig, Sampling
from megatron_opd.recipe.layout import MOST, Section
from megatron_opd.recipe.paths import PathText
from megatron_opd.records import SamplingParams

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # no dot: it would be another section
_FORMER = ("name", "model")  # fields of an [eval] of older versions
_OF_RUN = re.compile(r"teacher|base|sft|opd|round-([1-9][0-9]{0,5})")


def is_name(text: str) -> bool:
    """Whether it can name an evaluation, or a model beside those of the run."""
    return _NAME.fullmatch(text) is not None


def is_model(label: str) -> bool:
    """Whether it is what a model of a run is called: teacher, base (the student before SFT), sft, round-N, opd."""
    return _OF_RUN.fullmatch(label) is not None


def round_number(label: str) -> int | None:
    """N of "round-N"."""
    found = _OF_RUN.fullmatch(label)
    return None if found is None or found[1] is None else int(found[1])


def model_order(label: str) -> tuple[int, int]:
    """Sorts models as a run makes them; those beside the run come last."""
    if (number := round_number(label)) is not None:
        return 3, number
    return {"teacher": 0, "base": 1, "sft": 2, "opd": 4}.get(label, 5), 0


def _check_model(label: str) -> str:
    if not is_model(label):
        raise ValueError("a model of the run is expected: 'teacher', 'base' (the student before SFT), 'sft', 'round-N' or 'opd'")
    return label


def _as_text(dates: Any) -> Any:
    """TOML has dates of its own."""
    return [value.isoformat() if type(value) is date else value for value in dates] if isinstance(dates, list | tuple) else dates


def check_dates(dates: tuple[str, str] | None) -> tuple[str, str] | None:
    """The dates as they were given. Raises ValueError."""
    if dates is not None:
        for text in dates:
            if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
                raise ValueError(f"{text!r} is no date: YYYY-MM-DD is expected, as '2024-08-01'")
            try:
                date.fromisoformat(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is no day of the calendar ({error}); give one that is, as '2024-08-01'") from None
        if dates[0] > dates[1]:
            raise ValueError(f"[from, to] with from at most to is expected, but {dates[0]} comes after {dates[1]}")
    return dates


def _check_baseline(label: str) -> str:
    return label if label == NO_BASELINE else _check_model(label)


NO_BASELINE = "none"
ModelLabel = Annotated[str, AfterValidator(_check_model)]
Baseline = Annotated[str, AfterValidator(_check_baseline)]
Dates = Annotated[tuple[str, str] | None, BeforeValidator(_as_text), AfterValidator(check_dates)]
DATES = "[from, to], both inclusive, as YYYY-MM-DD: only rows of these dates are taken"
Seed = Annotated[int | None, Field(ge=0, lt=1 << 63)]
SUBSET = "with num_prompts: N prompts of the whole file, drawn by this seed, in place of its first"


def check_subset(subset_seed: int | None, num_prompts: int | None) -> None:
    """Raise ValueError for a seed that draws nothing."""
    if subset_seed is not None and num_prompts is None:
        raise ValueError(f"subset_seed = {subset_seed} draws num_prompts prompts of the file; give num_prompts, or leave it out")


def output_of(run_dir: str | Path) -> Path:
    """The folder of a run's evaluations, each of which has one of its own there."""
    return Path(run_dir) / "eval"


class EvalStage(Section):
    """Accuracy on verifiable prompts and, with a teacher, reverse KL to it on the model's own samples."""

    models: list[ModelLabel] = Field(
        default=["teacher", "sft", "opd"],
        description="what 'run' evaluates: 'teacher', 'base' (the student before SFT), 'sft', 'round-N' and 'opd' (after distillation)",
    )
    prompts: PathText = Field(description="JSONL or Parquet file with answers, or the folder of a Hugging Face dataset")
    dates: Dates = Field(default=None, description=DATES)
    grader: Literal["exact", "number", "math", "choice", "reasoning_gym", "code", "none"] = Field(
        default="exact", description="what tells a right response from a wrong one; docs/evaluation.md"
    )
    grading_seconds: float = Field(
        default=5.0, ge=0.01, le=3600, description="seconds of CPU time to grade a response; one that takes more scores 0 and is counted"
    )
    allow_code_execution: bool = Field(default=False, description="for grader 'code': run what the models write, isolated and limited")
    code: CodeLimits = CodeLimits()
    teacher: PathText | None = Field(default="{teacher}", description="score samples with this model for the reverse KL; 'none' does not")
    baseline: Baseline | None = Field(
        default=None,
        description="the model that those after it are compared with, paired by prompt; one of `models`, or 'none'; by default 'sft' where it fits",
    )
    num_prompts: int | None = Field(
        default=None, gt=0, le=MOST, description="use only N prompts of the file: the first, unless subset_seed"
    )
    subset_seed: Seed = Field(default=None, description=SUBSET)
    sampling: Sampling = SamplingParams()
    encoding: EncodingConfig = EncodingConfig()
    allow_template_mismatch: bool = Field(default=False, description="prompts written otherwise than those of the SFT answers; recorded")

    @field_validator("teacher")
    @classmethod
    def _none_is_off(cls, teacher: str | None) -> str | None:
        return None if teacher == "none" else teacher

    @model_validator(mode="after")
    def _check_models(self) -> EvalStage:
        check_subset(self.subset_seed, self.num_prompts)
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models = {self.models}: each of them once is expected")
        if self.baseline not in (None, NO_BASELINE, *self.models):
            raise ValueError(
                f"baseline = {self.baseline!r} is not one of models = {self.models}; add it there, or take one of them, or {NO_BASELINE!r}"
            )
        return self

    def baseline_of(self, label: str) -> str | None:
        """What the model called `label` is compared with, None for nothing."""
        wanted = self.baseline or ("sft" if "sft" in self.models else NO_BASELINE)
        return wanted if wanted != NO_BASELINE and model_order(wanted) < model_order(label) else None


class Evaluation(EvalStage):
    """An evaluation of one model. `label` is what the model is called, `model` its directory, `baseline` what it is compared with.

    Its files are in OUTPUT/NAME.
    """

    output: PathText = "eval"
    name: str
    label: str
    model: PathText

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def store(self) -> str:
        """The model's samples."""
        return self.store_of(self.label)

    def store_of(self, label: str) -> str:
        return str(self.folder / f"{label}.opd.zarr")

    @property
    def record(self) -> Path:
        """The figures."""
        return self.folder / f"{self.label}.json"

    @property
    def rows(self) -> Path:
        """The verdict on each sample."""
        return self.rows_of(self.label)

    def rows_of(self, label: str) -> Path:
        return self.folder / f"{label}.prompts.jsonl"

    @property
    def results(self) -> list[Path]:
        """All that the evaluation makes."""
        return [self.record, Path(self.store), self.rows]

    @property
    def title(self) -> str:
        return f"eval.{self.name} {self.label}"


def named(section: Any) -> Any:
    """The [eval] table of a recipe as read: without evaluations that are switched off. Raises ValueError for what is no table of them.

    Recipes of older versions had one evaluation without a name of its own: in their place of names stand fields.
    """
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError("tables [eval.NAME] are expected")
    fields = [key for key, value in section.items() if value is not None and not isinstance(value, dict | EvalStage)]
    if fields:
        raise ValueError(_without_name(section, fields))
    for name in section:
        if not is_name(name) or is_model(name):
            why = "that is what a model is called" if is_model(name) else "letters, digits, - and _ are expected"
            raise ValueError(f"eval.{name}: this can't be the name of an evaluation: {why}")
    return {name: value for name, value in section.items() if value is not None}


def _without_name(section: dict[str, Any], fields: list[str]) -> str:
    """What to write in place of an [eval] with `fields` of its own."""
    known = {*EvalStage.model_fields, *_FORMER}
    names = [key for key, value in section.items() if isinstance(value, dict | EvalStage) and key not in known]
    named = f"{', '.join(f'eval.{field}' for field in fields[:3])}: every evaluation has a name and a section of its own, [eval.NAME]"
    if names:
        return f"{named} (here are {', '.join(names)}); give eval.{names[0]}.{fields[0]}"
    tables = [key for key, value in section.items() if isinstance(value, dict)]
    lines = "".join(f", [eval.aime24.{table}] for [eval.{table}]" for table in tables)
    gone = [field for field in _FORMER if field in fields]
    without = f", and leave out {' and '.join(gone)}, in whose place stands models = ['sft', 'opd']" if gone else ""
    return f"{named}; in the recipe's file write [eval.aime24] for [eval]{lines}{without}; or do without it: eval=null"
