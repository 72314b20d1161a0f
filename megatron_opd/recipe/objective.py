"""What distillation aims at: the recipe's sections for the loss and for the drift from the rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_opd.recipe.layout import MOST, Count, Section, source

# Options of one loss alone.
_OPTIONS = {"exopd_scale": "exopd", "constant_advantage": "constant", "jsd_beta": "jsd"}


class Horizon(Section):
    """How many response tokens count in the loss: `start` at the first optimizer step, `end` from `steps` steps later on, linear in between.

    Sources: training on prefixes, arXiv 2602.15260; a growing horizon, arXiv 2605.31490.
    """

    start: Count = Field(description="tokens of a response at the first step")
    end: Count = Field(description="tokens from `steps` steps after the first on")
    steps: Count = Field(description="optimizer steps from start to end")

    def at(self, step: int) -> int:
        """Tokens at a step (from 0), rounded towards `start`."""
        there = min(step, self.steps)
        return self.start + (abs(self.end - self.start) * there // self.steps) * (1 if self.end > self.start else -1)

    @property
    def longest(self) -> int:
        return max(self.start, self.end)


def _constant_horizon(value: Any) -> Any:
    return {"start": value, "end": value, "steps": 1} if type(value) is int else value


class LossConfig(Section):
    """The distillation loss: `opd`, `vopd`, `exopd` and `constant` weigh the sampled token; the others compare distributions at each position."""

    name: Literal["opd", "vopd", "exopd", "constant", "reverse_kl", "forward_kl", "jsd"] = Field(
        default="opd",
        description="what is minimised; docs/method.md has each with its source",
        json_schema_extra=source("arXiv 2604.13010"),
    )
    normalization: Literal["sequence", "token"] = Field(
        default="sequence",
        description="'sequence': token mean of each, then mean",
        json_schema_extra=source("arXiv 2604.13010 (its code)"),
    )
    advantage_clip: float | None = Field(default=None, gt=0, description="clip |A| at this many nats")
    importance_clip: float | None = Field(default=None, gt=0, description="weigh sampled tokens by pi_S / pi_ref, at most this")
    exopd_scale: float = Field(default=1.25, gt=0, description="exopd: weight of log pi_T - log pi_ref; 1 is opd")
    horizon: Annotated[Horizon | None, BeforeValidator(_constant_horizon)] = Field(
        default=None,
        description="only the first n tokens of a response count: n, or { start, end, steps }, linear over the optimizer steps",
    )
    constant_advantage: float = Field(default=-1.0, lt=0, description="constant: the advantage of every token, whatever the teacher says")
    jsd_beta: float = Field(default=0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    entropy_bonus: float = Field(default=0.0, ge=0, description="nats of loss taken off for a nat of entropy")

    @property
    def needs_topk(self) -> bool:
        """Whether the loss looks at the teacher's top-K candidates."""
        return self.name not in ("opd", "exopd", "constant")

    @property
    def is_divergence(self) -> bool:
        """Whether distributions are compared at each position, so that no token has an advantage."""
        return self.name in ("reverse_kl", "forward_kl", "jsd")

    @property
    def unclipped_importance(self) -> bool:
        """Whether tokens are weighed by pi_S / pi_ref while nothing bounds their advantage."""
        return self.importance_clip is not None and self.advantage_clip is None and self.name != "constant"

    @model_validator(mode="after")
    def _fits_the_loss(self) -> LossConfig:
        for option, loss in _OPTIONS.items():
            if self.name != loss and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} is for loss {loss!r} and does nothing for {self.name!r}; leave it out")
        if self.name == "constant" and self.advantage_clip is not None:
            raise ValueError("the advantage of loss 'constant' is constant_advantage, which advantage_clip does not change; leave it out")
        if self.is_divergence and (self.advantage_clip, self.importance_clip) != (None, None):
            raise ValueError(f"loss {self.name!r} has no advantage, so advantage_clip and importance_clip do nothing; leave them out")
        return self


class DriftConfig(Section):
    """When the student has moved too far from pi_ref, the policy that the rollouts were sampled from. Shares are of response tokens."""

    ratio: float = Field(default=2.0, gt=1, description="a token is off when pi_S / pi_ref is above this, or below its inverse")
    max_off_share: float | None = Field(
        default=None, gt=0, lt=1, description="share of tokens that may be off before new rollouts are advised"
    )
    min_effective_share: float | None = Field(
        default=None, gt=0, lt=1, description="effective sample size a token, below which new rollouts are advised"
    )
    patience: int = Field(default=3, gt=0, le=MOST, description="steps in a row beyond a limit before the advice")
    stop: bool = Field(default=False, description="with the advice, save and end the run")


class RoundsConfig(Section):
    """How often the student samples new rollouts during training: from offline (one round) to online."""

    count: int = Field(default=1, gt=0, le=MOST, description="rounds of rollout, score and train")
    steps: int | None = Field(default=None, gt=0, le=MOST, description="optimizer steps a round; by default train.steps / count")
    until: Literal["steps", "drift"] = Field(
        default="steps", description="'drift': a round also ends where train.drift would advise new rollouts"
    )
    prompts: Literal["slice", "all"] = Field(
        default="slice",
        description="'slice': each round has its own share of the prompts; 'all': every round all of them, with another seed",
    )
    optimizer: Literal["carry", "reset"] = Field(
        default="carry",
        description="'carry': moments and learning-rate schedule continue through all rounds; 'reset': both restart with each round",
    )
    keep_alive: bool = Field(
        default=False, description="one set of ranks and engines for all rounds, both models in memory together; for many short rounds"
    )

    def fault(self, steps: int | None, drift: DriftConfig) -> str | None:
        """What is wrong beside [train] with `steps` (of all rounds) and `drift`; None if nothing is."""
        if self.count == 1:
            if self.until == "drift":
                return "until = 'drift' is for several rounds (rounds.count); train.drift.stop = true ends a single one"
            return None if self.steps in (None, steps) else f"steps = {self.steps} is for several rounds (rounds.count); set train.steps"
        if self.steps is None and steps is None:
            return f"the learning-rate schedule of {self.count} rounds needs the number of steps; set rounds.steps, or train.steps for all of them"
        if self.steps is None and steps is not None and steps % self.count:
            return f"train.steps = {steps} can't be divided by rounds.count = {self.count}; take {-(-steps // self.count) * self.count}, or set rounds.steps"
        if self.steps is not None and steps not in (None, self.count * self.steps):
            return (
                f"{self.count} rounds of {self.steps} steps are {self.count * self.steps}, but train.steps = {steps}; leave one of them out"
            )
        if self.until == "drift" and drift.max_off_share is None and drift.min_effective_share is None:
            return "until = 'drift' needs a limit: set train.drift.max_off_share or train.drift.min_effective_share"
        return None
