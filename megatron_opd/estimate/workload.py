"""What a run has to work on: its models, and how many sequences of how many tokens, from what is there already or guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.data.joined import open_training_stores, training_stores_exist
from megatron_opd.data.order import cut_lengths
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.estimate.known_models import KNOWN, known_config, known_prompts
from megatron_opd.estimate.ranges import Range, exactly
from megatron_opd.recipe.config import Recipe, SampleStage
from megatron_opd.recipe.evaluation import Evaluation
from megatron_opd.recipe.training_stages import TrainerConfig

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

# Where there is no store to look into: tokens of a prompt, and the mean response as a share of the longest that may be. The first share is an
# assumption, the second the most that is possible.
PROMPT_TOKENS = 256
RESPONSE_SHARE = (0.4, 1.0)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a response on average, of the longest sequence, and where they are from; `rollouts` in the store."""

    source: str
    prompt: float
    response: Range
    longest: int
    rollouts: int | None = None

    @property
    def tokens(self) -> Range:
        """Of a rollout, prompt and response."""
        return self.response + exactly(self.prompt)


@dataclass(frozen=True)
class Count:
    """Prompts, None where nobody knows, and why."""

    prompts: int | None
    source: str


@dataclass(frozen=True)
class Model:
    """A model and where its sizes are from; `arch` is None where they are not known, and `source` then says why."""

    directory: str
    arch: Architecture | None
    source: str

    def describe(self, role: str) -> str:
        sizes = "unknown" if self.arch is None else f"{self.arch.num_parameters / 1e9:.2f} billion parameters"
        active = f", {self.arch.num_active_parameters / 1e9:.2f} active" if self.arch is not None and self.arch.num_experts else ""
        return f"{role}: {sizes}{active} ({self.source})"


def find_model(*directories: str) -> Model:
    """The first of these directories that is there, else the published model of the last one's name. Raises UserError for a damaged one."""
    from megatron_opd.model.architecture import parse_architecture, read_architecture

    for directory in directories:
        if (Path(directory) / "config.json").exists():
            return Model(directory, read_architecture(directory), f"{directory}/config.json")
    directory = directories[-1]
    if (config := known_config(directory)) is not None:
        return Model(directory, parse_architecture(config, directory), f"the published sizes; {directory} is not there")
    return Model(
        directory, None, f"{directory}: no config.json, and no model whose sizes are known ({', '.join(KNOWN)}); put the model there"
    )


def find_teacher(directory: str) -> Model:
    """As `find_model`; a teacher is never trained, so one whose architecture is not supported is merely unknown here."""
    try:
        return find_model(directory)
    except UserError as error:
        return Model(directory, None, str(error))


def trained_lengths(config: TrainerConfig, sampler: SampleStage) -> Lengths:
    """As training reads them, cut; from the store where it is there."""
    if (reader := _reader(config.store)) is not None:
        lengths, prompts = cut_lengths(reader, config), reader.prompt_lens.astype("int64")
        response = exactly(float((lengths - prompts).mean()))
        return Lengths(reader.location.url, float(prompts.mean()), response, int(lengths.max()), len(reader))
    longest = longest_response(sampler, config)
    return _guess(min(longest, config.longest_response or longest))


def sampled_lengths(store: str, longest: int) -> Lengths:
    """As they are sampled; from the store where parts of it are there."""
    if (reader := _reader(store)) is not None:
        response = exactly(float(reader.response_lens.mean()))
        return Lengths(
            reader.location.url, float(reader.prompt_lens.mean()), response, int(reader.prompt_lens.max()) + longest, len(reader)
        )
    return _guess(longest)


def longest_response(sampler: SampleStage | Evaluation, config: TrainerConfig | None, model: Model | None = None) -> int:
    """Tokens that a response may have: sampling goes no further than training reads, and than the `model` has positions."""
    most = sampler.sampling.max_new_tokens
    if model is not None and model.arch is not None:
        most = min(most, max(1, model.arch.max_positions - PROMPT_TOKENS))
    return min(most, config.max_response_tokens or most) if config is not None else most


def count_prompts(stage: SampleStage | Evaluation) -> Count:
    """Prompts of a stage: as the recipe says, else those of its file, else of the published data set of its name."""
    if stage.num_prompts is not None:
        return Count(stage.num_prompts, "num_prompts")
    if Path(stage.prompts).exists():
        try:
            unique, split = (stage.unique_prompts, "train") if isinstance(stage, SampleStage) else (False, "test")
            file, _ = read_prompts(stage.prompts, dates=stage.dates, unique=unique, split=split, answers=False)
        except UserError as error:
            return Count(None, str(error))
        return Count(file.num_prompts, stage.prompts)
    if stage.dates is None and (known := known_prompts(stage.prompts)) is not None:
        return Count(known, f"the data set's name; {stage.prompts} is not there")
    return Count(None, f"{stage.prompts} is not there, and there is no num_prompts")


def student_of(recipe: Recipe) -> Model:
    """Raises UserError where its sizes are not known."""
    model = find_model(recipe.train.init, recipe.sft.init, recipe.models.student)
    if model.arch is None:
        raise UserError(model.source)
    return model


def _guess(longest: int) -> Lengths:
    low, high = RESPONSE_SHARE
    return Lengths("no store yet, guessed", PROMPT_TOKENS, Range(low * longest, high * longest), PROMPT_TOKENS + longest)


def _reader(store: str | list[str]) -> StoreReader | None:
    """The reader of a store, or of several, if rollouts are in it."""
    reader = open_training_stores(store) if training_stores_exist(store) else None
    return reader if reader is not None and len(reader) else None
