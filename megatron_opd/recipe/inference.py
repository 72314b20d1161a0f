"""How models answer: the recipe's sections for inference engines, their servers, and the encoding of prompts."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.layout import LONGEST, MOST, MOST_RANKS, Section
from megatron_opd.records import SamplingParams
from megatron_opd.safety.redact import NOT_KEPT, redact_address, referenced

QUESTION = "{question}"
DATE_FORMAT = "%d %b %Y"


class LaunchSizes(Section):
    """What of engine.launch differs for one of the models; what is not given is as there."""

    servers: int | None = Field(default=None, gt=0, le=MOST_RANKS, description="instead of engine.launch.servers")
    tp: int | None = Field(default=None, gt=0, le=MOST_RANKS, description="GPUs a copy, instead of engine.launch.tp")
    dp: int | None = Field(default=None, gt=0, le=MOST_RANKS, description="copies a server, instead of engine.launch.dp")
    options: list[str] | None = Field(default=None, description="instead of engine.launch.options")


class LaunchConfig(Section):
    """SGLang servers that a stage starts as its children and ends with itself; the model is the stage's."""

    servers: int = Field(default=1, gt=0, le=MOST_RANKS, description="servers to start")
    tp: int = Field(default=1, gt=0, le=MOST_RANKS, description="GPUs that share one copy of the model")
    dp: int = Field(default=1, gt=0, le=MOST_RANKS, description="copies of the model in one server")
    options: list[str] = Field(default_factory=list, description="further options of sglang.launch_server, a word each")
    command: list[str] = Field(default_factory=list, description="by default PYTHON -m sglang.launch_server with this Python")
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="further variables; HF_TOKEN = '$HF_TOKEN' takes a value from this process. Values are not recorded",
    )
    start_seconds: float = Field(default=1800.0, gt=0, le=LONGEST, description="seconds until a server must answer")
    restarts: int = Field(default=3, ge=0, le=MOST, description="times that a server that died is started again")

    teacher: LaunchSizes | None = Field(default=None, description="for the recipe's teacher")
    student: LaunchSizes | None = Field(default=None, description="for any other model")
    _options_of: str = PrivateAttr(default="engine.launch.options")

    @model_validator(mode="after")
    def _check_options(self) -> LaunchConfig:
        for launch in (self, self.serving("teacher"), self.serving("student")):
            if "--enable-dp-attention" in launch.options and launch.dp > 1:
                raise ValueError(
                    f"with --enable-dp-attention the copies share GPUs, and {launch._options_of.removesuffix('options')}dp counts copies with GPUs of their "
                    "own; leave it at 1, and give '--dp-size', 'N' among the options"
                )
        return self

    def serving(self, who: Literal["teacher", "student"]) -> LaunchConfig:
        """As it is for one of the models, with that model's section merged in."""
        section: LaunchSizes | None = getattr(self, who)
        update: dict[str, Any] = {} if section is None else section.model_dump(exclude_none=True)
        launch = self.model_copy(update=update | {"teacher": None, "student": None})
        if "options" in update:
            launch._options_of = f"engine.launch.{who}.options"
        return launch

    def variables(self) -> dict[str, str]:
        """`environment` with values such as $HF_TOKEN taken from this process. Raises ConfigError for what is not there."""
        filled = {}
        for name, value in self.environment.items():
            where = f"engine.launch.environment.{name}"
            source = referenced(value)
            if value == NOT_KEPT:
                raise ConfigError(
                    f"{where}: the value is not kept in a recipe that a run wrote; give it again, or write '${name}' to take it from the environment"
                )
            if source is not None and source not in os.environ:
                raise ConfigError(f"{where} is to be taken from the environment variable {source}, which is not set")
            filled[name] = value if source is None else os.environ[source]
        return filled

    def words(self) -> tuple[list[str], list[str]]:
        """`command` and `options`. Raises ConfigError where a recipe that a run wrote leaves a secret out."""
        for field, words in (("engine.launch.command", self.command), (self._options_of, self.options)):
            if any(NOT_KEPT in word for word in words):
                raise ConfigError(f"{field}: a word is {NOT_KEPT}, as secrets are in a recipe that a run wrote; give the field again")
        return self.command, self.options


class EngineConfig(Section):
    """What runs inference for generate, rollout, score and eval."""

    kind: Literal["auto", "transformers", "sglang"] = Field(
        default="auto", description="'transformers': in this process; 'sglang': servers; 'auto': servers where urls or launch is given"
    )
    urls: list[str] = Field(default_factory=list, description="running SGLang servers; 'auto' uses them when given")
    launch: LaunchConfig | None = Field(default=None, description="start SGLang servers for the stage")
    device: str = Field(default="auto", description="transformers: a device of PyTorch; 'auto': a GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the model; 'auto': transformers takes bfloat16 on a GPU and float32 on a CPU, SGLang its own default",
    )
    batch_tokens: int = Field(default=16384, gt=0, le=MOST, description="transformers: tokens (with padding) a forward pass")
    batch_sequences: int = Field(default=256, gt=0, le=MOST, description="transformers: sequences generated together")
    tokens_under_way: int = Field(
        default=1 << 19,
        gt=0,
        le=MOST,
        description="sglang: tokens of the requests that a server, or each copy in one of engine.launch, has at once",
    )
    timeout: float = Field(default=300.0, gt=0, le=LONGEST, description="sglang: seconds for a request, to which come those for its length")
    slowest_decode: float = Field(default=2.0, ge=1e-3, description="sglang: tokens/s; a response may take its length at this speed")
    slowest_prefill: float = Field(default=200.0, ge=1e-3, description="sglang: tokens/s; reading a sequence may take as long")
    retries: int = Field(default=4, ge=0, le=MOST, description="sglang: repeats of a request that failed for a passing reason")
    patience: float = Field(default=600.0, ge=0, le=LONGEST, description="sglang: seconds to wait for a server at engine.urls that is away")
    context_length: int | None = Field(
        default=None, gt=0, le=MOST, description="tokens of the longest sequence; from the model's config when not given"
    )

    @model_validator(mode="after")
    def _check_urls(self) -> EngineConfig:
        for url in self.urls:
            _check_url(url)
        return self

    def serving(self, who: Literal["teacher", "student"]) -> EngineConfig:
        """As it is for one of the models: `launch` with that model's section merged in."""
        return self if self.launch is None else self.model_copy(update={"launch": self.launch.serving(who)})


def _check_url(url: str) -> None:
    """Raise ValueError, without what may be secret, for what is not the address of a server."""
    shown = redact_address(url)
    try:
        parsed = urlsplit(url)
        _ = parsed.port
        (parsed.hostname or "").encode("idna")
    except ValueError:
        raise ValueError(f"urls: {shown!r} is not an address such as http://127.0.0.1:30000") from None
    if parsed.username is not None or parsed.password is not None or parsed.query or parsed.fragment:
        raise ValueError(f"urls: the address of {shown!r} holds a user, a password or a query, which would end up in logs; give it without")
    if parsed.scheme not in ("http", "https") or not parsed.hostname or not url.isprintable() or " " in url:
        raise ValueError(f"urls: {shown!r} is not an address such as http://127.0.0.1:30000")


class EncodingConfig(Section):
    """How prompts become token ids, once; the ids are stored."""

    chat_template: Literal["auto", "always", "never"] = Field(
        default="auto", description="'auto': chat messages by the template, text as it is"
    )
    system: str | None = Field(default=None, description="a system message before each prompt that the chat template writes")
    question: str | None = Field(
        default=None,
        description="how a question is put: a text with the placeholder {question}, for which the prompt's text, or its last user message, stands",
    )
    enable_thinking: bool | None = Field(default=None, description="for templates that know it")
    date_string: str | None = Field(
        default=None, description="the date that a template prints, as '26 Jul 2024' (the default); never that of the day"
    )
    overlong_prompt: Literal["error", "skip"] = Field(default="error", description="a prompt that leaves no room for a response")
    max_prompt_tokens: int | None = Field(default=None, gt=0, le=MOST, description="tokens; longer prompts are overlong, too")
    assistant_last: Literal["refuse", "continue"] = Field(
        default="refuse", description="a prompt that ends in an assistant message: 'continue' has the model write on in that turn"
    )
    row_system: Literal["refuse", "keep", "replace"] = Field(
        default="refuse", description="a row's own system message where `system` is given: 'keep' the row's, or 'replace' it"
    )

    def recorded(self) -> dict[str, Any]:
        """What a store keeps of it. What would have been refused changed no prompt, and is not part of it."""
        return {key: value for key, value in self.model_dump(exclude_none=True).items() if value != "refuse"}

    @field_validator("question")
    @classmethod
    def _check_question(cls, text: str | None) -> str | None:
        if text is not None and QUESTION not in text:
            raise ValueError(f"{text!r:.80} has no placeholder {QUESTION}, which the prompt is to stand for")
        return text

    def put(self, question: str) -> str:
        """A question as it is put to the model. Other braces of `question` (LaTeX) stay as they are."""
        return question if self.question is None else self.question.replace(QUESTION, question)

    @field_validator("date_string")
    @classmethod
    def _check_date(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                datetime.strptime(date, DATE_FORMAT)
            except ValueError:
                raise ValueError("a date such as '26 Jul 2024' is expected") from None
        return date


def _check_sampling(sampling: SamplingParams) -> SamplingParams:
    """Not a field's bound, as older stores may have been sampled so."""
    if sampling.temperature != 0 and not 0.01 <= sampling.temperature <= 100:
        raise ValueError(f"temperature = {sampling.temperature:g} must be 0 (greedy), or between 0.01 and 100")
    return sampling


Sampling = Annotated[SamplingParams, AfterValidator(_check_sampling)]  # of a recipe's stage
