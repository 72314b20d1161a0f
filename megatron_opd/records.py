"""The records that flow between the stages; each checks itself when it is built.

Legend: T tokens of one rollout (prompt and response together), K teacher candidates a position.
One alignment rule: `logp[t]` is log p(tokens[t] | tokens[:t]), natural logarithm; NaN where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

# A log-probability computed in fp32 may exceed 0 by rounding; more than this is an error.
LOGP_EPSILON = 1e-3
# Engines write the lowest finite number for -inf (SGLang clamps to it); no real model is this sure that a token won't come.
LOGP_FLOOR = -1e4
# A difference of log-probabilities taken off a log-probability.
_LARGEST_SCORE = 2e4
StoreId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
# A count or a row number in a manifest; what is larger was not counted, and would overflow.
Count = Annotated[int, Field(ge=0, lt=1 << 40)]


class Finish(IntEnum):
    """Why a rollout ended: its end-of-turn token, the length limit, or the engine gave up."""

    STOP = 0
    LENGTH = 1
    ABORT = 2


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file. `content` is text, or chat messages [{role, content, ...}, ...] as `data.messages` writes them.

    `tools` are the functions that the model may call, [{"type": "function", "function": {name, ...}}, ...]; None where there are none.
    `meta` are the row's other columns. `where` is its file and row, for messages.
    """

    index: int
    content: str | list[dict[str, Any]]
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    where: str = field(default="", compare=False)


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


def check_scores(score_T: np.ndarray, name: str, start: int) -> None:
    """As `check_logp`, for scores that may exceed 0."""
    if not np.isnan(score_T[:start]).all():
        raise ValueError(f"{name} has values at prompt tokens; position t must hold the score of tokens[t]")
    if (bad := np.flatnonzero(~(np.abs(score_T[start:]) <= _LARGEST_SCORE))).size:
        t = start + int(bad[0])
        raise ValueError(f"{name}[{t}] is {score_T[t]}, not a score ({bad.size} such positions)")


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
    """Teacher log-probabilities of one rollout. logp float32 [T]; topk_ids int32 [T,K] and topk_logp float32 [T,K] or None.

    `are_log_probs` is False for derived scores that may exceed 0.
    """

    logp: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logp: np.ndarray | None = None
    are_log_probs: bool = True

    def check_against(self, rollout: Rollout) -> None:
        """Raise ValueError unless these scores are complete for `rollout`."""
        T = len(rollout.tokens)
        if self.logp.shape != (T,):
            raise ValueError(f"{T} tokens but teacher log-probabilities of shape {self.logp.shape}")
        (check_logp if self.are_log_probs else check_scores)(self.logp, "teacher logp", rollout.prompt_len)
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


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenizerFingerprint(Record):
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


class ModelFingerprint(Record):
    """Identity of a model directory. `weights_sha256` covers names, dtypes, shapes and bytes, not the split into files."""

    name: str
    config_sha256: str
    weights_sha256: str
    vocab_size: int
    tokenizer: TokenizerFingerprint

    def short(self) -> str:
        name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in self.name)
        return f"{name} ({self.weights_sha256[:12]})"


class SftFacts(Record):
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


class RoundRecord(Record):
    """A round of rollout, score and train that a student went through: its number, from 1, and its store."""

    number: int = Field(ge=1, lt=1 << 40)
    store_id: StoreId


class Sparse(Record):
    """A record of which some fields are not written where they are empty: its bytes are then those of older versions, and are read by them."""

    _left_out: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = serialize(self)
        return {name: value for name, value in content.items() if value or name not in self._left_out}


class Derivation(Record):
    """How scores were made of those of another teacher, without a model.

    `source`: name of that teacher's group; `settings`: those of the method; `version`: of what the method computes.
    """

    method: Literal["residualize", "shuffle"]
    source: str
    settings: dict[str, int | float]
    version: int

    @property
    def mends(self) -> bool:
        """Whether the teacher need not be the one whose answers the student was fine-tuned on."""
        return self.method == "residualize"

    @property
    def are_log_probs(self) -> bool:
        """Whether its values are log-probabilities of a distribution, and so never above 0."""
        return self.method == "shuffle"

    def describe(self) -> str:
        settings = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        what = "without their recurring part" if self.method == "residualize" else "SHUFFLED between tokens, as a control"
        return f"the scores of {self.source!r} {what} ({self.method} {self.version}: {settings})"


class Lineage(Sparse):
    """Where a model's behaviour comes from; travels with checkpoints, HF directories and stores.

    `opd_scores`: how the scores that it was distilled on were made of those of `opd_teacher`, None where they are its own.
    `rounds`: those that the model was distilled in, in order; empty outside of rounds.
    """

    _left_out = ("opd_scores", "rounds")

    base: ModelFingerprint | None = None
    sft_teacher: ModelFingerprint | None = None
    sft_teacher_declared: bool = False
    opd_teacher: ModelFingerprint | None = None
    opd_scores: Derivation | None = None
    sft: SftFacts | None = None
    overrides: list[str] = Field(default_factory=list)
    rounds: list[RoundRecord] = Field(default_factory=list)


class PromptFile(Record):
    """Identity of a prompt file: sha256 of what is sampled from (contents and tools, not answers) and its number of prompts."""

    name: str
    sha256: str
    num_prompts: Count


class SamplingParams(Record):
    """How responses are sampled. Seeds make the `transformers` engine reproducible."""

    temperature: float = Field(default=1.0, ge=0, description="0 is greedy; stored log-probabilities are those at 1, whatever it is")
    top_p: float = Field(default=1.0, gt=0, le=1, description="share of the probability that is sampled from, the likeliest tokens first")
    top_k: int = Field(default=0, ge=0, le=1 << 31, description="tokens that are sampled from, the likeliest; 0: the whole vocabulary")
    max_new_tokens: int = Field(
        default=4096,
        gt=0,
        le=1 << 31,
        description="tokens of a response at most",
        json_schema_extra={"source": "arXiv 2604.13010 (OPD)"},
    )
    samples_per_prompt: int = Field(default=1, gt=0, lt=1 << 20, description="responses to each prompt")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed; with prompt and sample it gives that of each response")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=1 << 31)]] = Field(
        default_factory=list, description="ids that end a response besides those that the model's files, template and SFT answers name"
    )


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
