"""What every inference engine does: sample responses to token ids, and score token ids. Text never passes through here.

Legend: P prompt tokens, R response tokens, T = P + R, K candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.errors import EngineError
from megatron_opd.records import Finish, ModelFingerprint, SamplingParams, TeacherScores

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class GenerateRequest:
    """A prompt (int32 [P]) to answer once; (prompt_index, sample_index) name it and seed it."""

    prompt: np.ndarray
    prompt_index: int
    sample_index: int


@dataclass(frozen=True)
class Generated:
    """tokens int32 [R], end-of-turn token kept; logp float32 [R] of the sampler at temperature 1 over the whole vocabulary."""

    tokens: np.ndarray
    logp: np.ndarray
    finish: Finish


@dataclass(frozen=True)
class ScoreRequest:
    """tokens int32 [T]; positions from `start` on are scored."""

    tokens: np.ndarray
    start: int


@dataclass(frozen=True)
class Failed:
    """A request that the engine could not do right, however often it was repeated."""

    reason: str


class Engine(ABC):
    """An inference engine for one model. `progress` is called with the number of tokens finished since its last call."""

    fingerprint: ModelFingerprint
    context_length: int
    num_gpus: int = 0

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name, version and numeric settings, for manifests."""

    @abstractmethod
    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingParams, progress: Progress | None = None) -> list[Generated]:
        """One response a request, in order. Raises EngineError, also for a single request that fails."""

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest], top_k: int = 0, progress: Progress | None = None) -> list[TeacherScores]:
        """Log-probabilities at temperature 1, aligned with tokens (NaN, id -1 before `start`), in order. Raises EngineError."""

    def generate_parts(
        self, parts: Iterable[Sequence[GenerateRequest]], sampling: SamplingParams, progress: Progress | None = None
    ) -> Iterator[tuple[int, Sequence[Generated | Failed]]]:
        """(number of the part, its outcomes in order) as parts are finished, in any order; `parts` is read as there is room.

        Raises EngineError for what is no single request's fault.
        """
        for number, requests in enumerate(parts):
            yield number, self.generate(requests, sampling, progress)

    def score_parts(
        self, parts: Iterable[Sequence[ScoreRequest]], top_k: int = 0, progress: Progress | None = None
    ) -> Iterator[tuple[int, Sequence[TeacherScores | Failed]]]:
        """As `generate_parts`."""
        for number, requests in enumerate(parts):
            yield number, self.score(requests, top_k, progress)

    @abstractmethod
    def load(self, model: str | Path) -> None:
        """Go on with the weights of another directory of the same architecture; `fingerprint` is then of it. Raises UserError."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds; servers that it started end."""


def all_stop_ids(sampling: SamplingParams, own: Iterable[int]) -> list[int]:
    """Ids that end a response: those asked for, and those of the model's own files, which a server obeys unasked."""
    return list(dict.fromkeys([*sampling.stop_token_ids, *own]))


def check_requests(requests: Sequence[GenerateRequest] | Sequence[ScoreRequest], *, vocab_size: int, context_length: int) -> None:
    """Refuse, before anything is sent, what an engine would choke on. Raises EngineError naming the request."""
    for number, request in enumerate(requests):
        tokens = request.prompt if isinstance(request, GenerateRequest) else request.tokens
        if len(tokens) == 0:
            raise EngineError(f"request {number}: no tokens")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise EngineError(
                f"request {number}: token id {low if low < 0 else high} in a vocabulary of {vocab_size}; was the text encoded with another tokenizer?"
            )
        if len(tokens) > context_length:
            raise EngineError(f"request {number}: {len(tokens)} tokens, the engine takes {context_length}")
        if isinstance(request, ScoreRequest) and not 0 < request.start < len(tokens):
            raise EngineError(f"request {number}: scoring from position {request.start} of {len(tokens)} tokens")


SERVE_QUANTISED = "serve it with SGLang (--url or --launch, also for 'check'), or use the model's unquantised weights"
