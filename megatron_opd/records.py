"""The records that flow between the stages; each checks itself when it is built.

Legend: T tokens of one rollout (prompt and response together), K teacher candidates a position.
One alignment rule: `logp[t]` is log p(tokens[t] | tokens[:t]), natural logarithm; NaN where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

# A log-probability computed in fp32 may exceed 0 by rounding; more than this is an error.
LOGP_EPSILON = 1e-3
# Engines write the lowest finite number for -inf (SGLang clamps to it); no real model is this sure that a token won't come.
LOGP_FLOOR = -1e4
_StoreId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
# A count or a row number in a manifest; what is larger was not counted, and would overflow.
_Count = Annotated[int, Field(ge=0, lt=1 << 40)]


class Finish(IntEnum):
    """Why a rollout ended: its end-of-turn token, the length limit, or the engine gave up."""

    STOP = 0
    LENGTH = 1
    ABORT = 2


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file. `content` is text, or chat messages [{role, content, ...}, ...] as `data.messages` writes them.

    `tools` are the functions that the model may call, [{"type": "function", "function": {name, ...}}, ...]; None where there are none.
    """

    index: int
    content: str | list[dict[str, Any]]
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None


def check_logp(logp_T: np.ndarray, name: str, start: int) -> None:
    """Raise ValueError unless `logp_T` is NaN before `start` and a log-probability from there on."""
    if not np.isnan(logp_T[:start]).all():
        raise ValueError(f"{name} has values at prompt tokens; position t must hold log p(tokens[t])")
    response = logp_T[start:]
    if response.size == 0 or (response.min() >= LOGP_FLOOR and response.max() <= LOGP_EPSILON):
        return
    bad = np.flatnonzero(~((response >= LOGP_FLOOR) & (response <= LOGP_EPSILON)))  # NaN is neither
    if bad.size:
        t = start + int(bad[0])
        raise ValueError(f"{name}[{t}] is {logp_T[t]}, not a log-probability ({bad.size} such positions)")


def check_ending(response: np.ndarray, finish: Finish, stop_ids: Sequence[int]) -> None:
    """Raise ValueError unless a response (ids, [R]) ends at its first stop id, if it has one, and has one if it stopped by itself."""
    found = np.flatnonzero(np.isin(response, stop_ids))
    if found.size and int(found[0]) != len(response) - 1:
        token = int(response[found[0]])
        raise ValueError(f"{len(response) - 1 - int(found[0])} tokens stand behind the stop id {token} in the response")
    if (finish is Finish.STOP) != bool(found.size):
        raise ValueError(f"it ended by {finish.name.lower()} at token {int(response[-1])}; the stop ids are {list(stop_ids)}")


@dataclass(frozen=True)
class Rollout:
    """A prompt and one sampled response as token ids. tokens int32 [T], student_logp float32 [T] (of the sampler, T=1)."""

    tokens: np.ndarray
    prompt_len: int
    prompt_index: int
    sample_index: int
    finish: Finish
    student_logp: np.ndarray

    def __post_init__(self) -> None:
        T = len(self.tokens)
        if self.tokens.dtype != np.int32 or self.student_logp.dtype != np.float32:
            raise ValueError(f"tokens must be int32 and student_logp float32, got {self.tokens.dtype} and {self.student_logp.dtype}")
        if len(self.student_logp) != T:
            raise ValueError(f"{T} tokens but {len(self.student_logp)} log-probabilities")
        if not 0 < self.prompt_len < T:
            raise ValueError(f"prompt_len {self.prompt_len} of {T} tokens: prompt and response must each have a token")
        if self.tokens.min() < 0:
            raise ValueError(f"negative token id {int(self.tokens.min())}")
        check_logp(self.student_logp, "student_logp", self.prompt_len)

    @property
    def response_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    def check_ending(self, stop_ids: Sequence[int]) -> None:
        """Raise ValueError unless the response ends as `check_ending` demands."""
        check_ending(self.tokens[self.prompt_len :], self.finish, stop_ids)

    def cut(self, max_tokens: int | None) -> Rollout:
        """This rollout, or its first `max_tokens` tokens (finish LENGTH). Raises ValueError if no token of the response is left."""
        if max_tokens is None or len(self.tokens) <= max_tokens:
            return self
        return replace(self, tokens=self.tokens[:max_tokens], student_logp=self.student_logp[:max_tokens], finish=Finish.LENGTH)


@dataclass(frozen=True)
class TeacherScores:
    """Teacher log-probabilities of one rollout. logp float32 [T]; topk_ids int32 [T,K] and topk_logp float32 [T,K] or None."""

    logp: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logp: np.ndarray | None = None

    def check_against(self, rollout: Rollout) -> None:
        """Raise ValueError unless these scores are complete for `rollout`."""
        T = len(rollout.tokens)
        if self.logp.shape != (T,):
            raise ValueError(f"{T} tokens but teacher log-probabilities of shape {self.logp.shape}")
        check_logp(self.logp, "teacher logp", rollout.prompt_len)
        if (self.topk_ids is None) != (self.topk_logp is None):
            raise ValueError("topk_ids and topk_logp go together")
        if self.topk_ids is not None and self.topk_logp is not None:
            start = rollout.prompt_len
            if self.topk_ids.shape != self.topk_logp.shape or self.topk_ids.shape[:1] != (T,) or self.topk_ids.ndim != 2:
                raise ValueError(f"top-k arrays of shape {self.topk_ids.shape} and {self.topk_logp.shape} for {T} tokens")
            if (self.topk_ids[:start] != -1).any() or not np.isnan(self.topk_logp[:start]).all():
                raise ValueError("top-k arrays have values at prompt tokens; there the ids are -1 and the log-probabilities NaN")
            if self.topk_ids[start:].min() < 0:
                raise ValueError("a response position has no top-k ids")
            # Where there is a NaN both are NaN, and no comparison holds.
            if not (self.topk_logp[start:].min() >= LOGP_FLOOR and self.topk_logp[start:].max() <= LOGP_EPSILON):
                raise ValueError("a response position has a top-k value that is not a log-probability")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenizerFingerprint(_Record):
    """Identity of a tokenizer: its token-to-id table, its special ids, its chat template and how it splits text.

    `base_sha256` is of the table without the tokens that were added to the model's own, which `added` lists; `reading_sha256` of merges
    and of the ids of a fixed text. Fingerprints of older versions lack these.
    """

    vocab_sha256: str
    num_tokens: int
    eos_token_id: int | None = None
    chat_template_sha256: str | None = None
    base_sha256: str | None = None
    added: dict[str, int] | None = None
    reading_sha256: str | None = None


class ModelFingerprint(_Record):
    """Identity of a model directory. `weights_sha256` covers names, dtypes, shapes and bytes, not the split into files."""

    name: str
    config_sha256: str
    weights_sha256: str
    vocab_size: int
    tokenizer: TokenizerFingerprint

    def short(self) -> str:
        name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in self.name)
        return f"{name} ({self.weights_sha256[:12]})"


class SftFacts(_Record):
    """How the SFT answers of a student were asked for and how they ended, as their store says.

    `stop_ids`: ids that ended answers, the most frequent first. `chat_templates`: by name, what wrote the prompts; empty: plain text.
    `prompt_suffix`: ids behind the last message; `prompt_probe`: ids of a fixed conversation. `stopped_within`: share of answers that ended by themselves in so many tokens.
    """

    stop_ids: list[int] = Field(default_factory=list)
    chat_templates: dict[str, str] = Field(default_factory=dict)
    prompt_suffix: list[int] = Field(default_factory=list)
    prompt_probe: list[int] = Field(default_factory=list)
    num_answers: int = 0
    stopped_within: dict[int, float] = Field(default_factory=dict)

    def expected_stop_share(self, max_tokens: int) -> float:
        """Share of answers that ended by themselves within `max_tokens` tokens, rounded down to what was counted."""
        return max((share for tokens, share in self.stopped_within.items() if tokens <= max_tokens), default=0.0)


class Lineage(_Record):
    """Where a model's behaviour comes from; travels with checkpoints, HF directories and stores."""

    base: ModelFingerprint | None = None
    sft_teacher: ModelFingerprint | None = None
    sft_teacher_declared: bool = False
    opd_teacher: ModelFingerprint | None = None
    sft: SftFacts | None = None
    overrides: list[str] = Field(default_factory=list)


class PromptFile(_Record):
    """Identity of a prompt file: sha256 of what is sampled from (contents and tools, not answers) and its number of prompts."""

    name: str
    sha256: str
    num_prompts: _Count


class SamplingParams(_Record):
    """How responses are sampled. Seeds make the `transformers` engine reproducible."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1 << 31, description="0 samples from the whole vocabulary")
    max_new_tokens: int = Field(default=4096, gt=0, le=1 << 31)
    samples_per_prompt: int = Field(default=1, gt=0, lt=1 << 20)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    stop_token_ids: list[Annotated[int, Field(ge=0, le=1 << 31)]] = Field(
        default_factory=list, description="ids that end a response besides those that the model's files, template and SFT answers name"
    )


MAX_PARTS = 10**6  # folders of six digits
EXTENDED_FORMAT = 2  # of a store with extensions, which programs that know none must not take for the whole


class Extension(_Record):
    """What a store was asked to hold from then on: all of `prompts`, `samples_per_prompt` of each; the parts that it had stay.

    `extends` and `store_id`: identities of the store before and with it.
    """

    prompts: PromptFile
    samples_per_prompt: int = Field(gt=0, lt=1 << 20)
    extends: _StoreId
    store_id: _StoreId
    provenance: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """Parts `first_part` on, which hold these samples of these prompts (rows of the prompt file); of the store as first made, and each extension.

    `generation`: the extension that asked for it, from 1; 0 for the store as it was first made.
    """

    generation: int
    first_part: int
    prompts: range
    samples: range
    prompts_per_part: int

    @property
    def num_parts(self) -> int:
        return -(-len(self.prompts) // self.prompts_per_part)

    def prompt_range(self, part: int) -> range:
        """Prompts of part `part` of the store."""
        start = (part - self.first_part) * self.prompts_per_part
        return self.prompts[start : start + self.prompts_per_part]


class StoreManifest(_Record):
    """Attributes of a store's root group.

    `prompts` and `sampling.samples_per_prompt` are those that the store was first made for; `num_prompts` and `samples_per_prompt` those of now.

    `stop_ids`: every id that ends a response (empty in a store of an older version). `turn_end`: the one with which the chat template
    closes a turn. `chat_templates`: what wrote the prompts; `prompt_suffix`: its ids behind the last message; `prompt_probe`: its ids for a
    fixed conversation.
    """

    format_version: int = 1
    sampler_role: str
    sampler: ModelFingerprint
    lineage: Lineage
    prompts: PromptFile
    prompts_per_part: int = Field(gt=0, lt=1 << 40)
    sampling: SamplingParams
    encoding: dict[str, Any] = Field(default_factory=dict)
    stop_ids: list[int] = Field(default_factory=list)
    turn_end: int | None = None
    chat_templates: dict[str, str] = Field(default_factory=dict)
    prompt_suffix: list[int] = Field(default_factory=list)
    prompt_probe: list[int] = Field(default_factory=list)
    allow_template_mismatch: bool = False
    engine: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    extensions: list[Extension] = Field(default_factory=list, max_length=1 << 16)

    @model_validator(mode="after")
    def _parts_have_names(self) -> StoreManifest:
        if (self.format_version == EXTENDED_FORMAT) != bool(self.extensions):
            raise ValueError(f"format {self.format_version} with {len(self.extensions)} extensions")
        prompts, samples = self.prompts.num_prompts, self.sampling.samples_per_prompt
        for extension in self.extensions:
            now, each = extension.prompts.num_prompts, extension.samples_per_prompt
            if now < prompts or each < samples or (now, each) == (prompts, samples):
                raise ValueError(f"an extension from {prompts} prompts x {samples} samples to {now} x {each}")
            prompts, samples = now, each
        if self.num_parts > MAX_PARTS:
            raise ValueError(f"{self.num_parts} parts, at most {MAX_PARTS} are possible; raise prompts_per_part")
        return self

    @property
    def all_prompts(self) -> PromptFile:
        """Identity of the prompts that the store holds now."""
        return self.extensions[-1].prompts if self.extensions else self.prompts

    @property
    def num_prompts(self) -> int:
        return self.all_prompts.num_prompts

    @property
    def samples_per_prompt(self) -> int:
        return self.extensions[-1].samples_per_prompt if self.extensions else self.sampling.samples_per_prompt

    def segments(self) -> list[Segment]:
        """In the order of their parts. An extension adds the new samples of the prompts that were there, then the new prompts."""
        prompts, samples = self.prompts.num_prompts, self.sampling.samples_per_prompt
        found = [Segment(0, 0, range(prompts), range(samples), self.prompts_per_part)]
        for generation, extension in enumerate(self.extensions, start=1):
            now, each = extension.prompts.num_prompts, extension.samples_per_prompt
            for rows, numbers in ((range(prompts), range(samples, each)), (range(prompts, now), range(each))):
                if rows and numbers:
                    first = found[-1].first_part + found[-1].num_parts
                    found.append(Segment(generation, first, rows, numbers, self.prompts_per_part))
            prompts, samples = now, each
        return found

    @property
    def num_parts(self) -> int:
        last = self.segments()[-1]
        return last.first_part + last.num_parts

    @property
    def vocab_size(self) -> int:
        return self.sampler.vocab_size

    def segment(self, part: int) -> Segment:
        """The one that part `part` is of."""
        return next(segment for segment in reversed(self.segments()) if segment.first_part <= part)

    def prompt_range(self, part: int) -> range:
        """Rows of the prompt file that part `part` holds."""
        return self.segment(part).prompt_range(part)

    def sample_range(self, part: int) -> range:
        """Samples of each of its prompts that part `part` holds."""
        return self.segment(part).samples

    def num_pairs(self, part: int) -> int:
        """How many rollouts part `part` is to account for."""
        segment = self.segment(part)
        return len(segment.prompt_range(part)) * len(segment.samples)

    def pairs(self, part: int) -> list[tuple[int, int]]:
        """(prompt, sample) of every rollout that part `part` is to account for, in order."""
        return [(prompt, sample) for prompt in self.prompt_range(part) for sample in self.sample_range(part)]


class Excluded(_Record):
    """A rollout that was asked for and is not there (or not scored), with the reason; `quarantined`: the engine failed at it."""

    prompt_index: _Count
    sample_index: _Count
    reason: str
    quarantined: bool = False


class PartManifest(_Record):
    """Attributes of a sealed part; written last. `crc32c` is of each array's raw bytes.

    `store_id`: identity of the store that it was made for. `endings`: how many responses each stop id ended. Parts of older versions
    have neither.
    """

    part: _Count
    store_id: _StoreId | None = None
    num_rollouts: _Count
    num_tokens: _Count
    num_response_tokens: _Count
    excluded: list[Excluded] = Field(default_factory=list)
    endings: dict[int, int] | None = None
    crc32c: dict[str, int]
    provenance: dict[str, Any] = Field(default_factory=dict)


class ScoreManifest(_Record):
    """Attributes of a teacher's group in a part; written last.

    `excluded` rollouts have no scores (NaN), and those longer than `max_tokens` are scored up to there; training leaves both out.
    `largest_candidate` is the highest token id among the teacher's candidates, None without any. `store_id` as in `PartManifest`.
    """

    part: _Count
    store_id: _StoreId | None = None
    teacher: ModelFingerprint
    top_k: int = Field(default=0, ge=0, lt=1 << 20)
    max_tokens: int | None = Field(default=None, gt=0, lt=1 << 40)
    largest_candidate: _Count | None = None
    excluded: list[Excluded] = Field(default_factory=list)
    allow_teacher_mismatch: bool = False
    part_crc32c: dict[str, int]
    crc32c: dict[str, int]
    engine: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)


class Gap(_Record):
    """|difference| of two engines' log-probabilities of the same tokens, nats."""

    mean: float
    p99: float
    max: float
    tokens: int

    def describe(self) -> str:
        return f"mean {self.mean:.2g}, p99 {self.p99:.2g}, max {self.max:.2g} nats over {self.tokens} tokens"


class Calibration(_Record):
    """How far the engines are apart on a sample of a store's rollouts.

    `floor`: the sampler scored by the serving engine, against Megatron. `stored`: pi_ref as stored, against Megatron. `replicas`: servers
    of one model with each other, by the model's weights_sha256. `skipped`: why the engines were not compared.
    """

    floor: Gap | None = None
    stored: Gap | None = None
    replicas: dict[str, Gap] = Field(default_factory=dict)
    num_rollouts: int = 0
    skipped: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class LossSums:
    """Sums over the response tokens of a global batch; means are made where they are printed."""

    loss: float = 0.0
    denominator: float = 0.0
    tokens: float = 0.0
    sequences: float = 0.0
    nll: float = 0.0
    reverse_kl: float = 0.0
    abs_advantage: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(**{name: getattr(self, name) + getattr(other, name) for name in LOSS_SUM_NAMES})


LOSS_SUM_NAMES = tuple(LossSums.__dataclass_fields__)
