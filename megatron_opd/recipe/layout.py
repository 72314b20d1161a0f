"""How a model lies on the machine: the recipe's sections for parallel groups and FP8."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from megatron_opd.errors import ConfigError

# Slips of the finger: no run has more, and some would be counted through, or held in memory, before anything else finds them.
MOST_RANKS = 1 << 20
MOST = 1 << 31  # tokens, steps, prompts
LONGEST = 1e8  # seconds
Count = Annotated[int, Field(gt=0, le=MOST)]


def source(text: str) -> JsonDict:
    """Whose value a field's default is, as Field(json_schema_extra=source("arXiv 2604.13010")); a default of ours has no source."""
    return {"source": text}


class Section(BaseModel):
    """A part of a recipe: unknown fields are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ParallelConfig(Section):
    """Sizes of Megatron's parallel groups; data parallel is what is left of the world."""

    tp: int = Field(default=1, gt=0, le=MOST_RANKS, description="tensor parallel: ranks that share every matrix")
    pp: int = Field(default=1, gt=0, le=MOST_RANKS, description="pipeline parallel: ranks that share the layers")
    vpp: int = Field(default=1, gt=0, le=MOST_RANKS, description="interleaved pipeline: model chunks a rank (1: plain 1F1B)")
    cp: int = Field(default=1, gt=0, le=MOST_RANKS, description="context parallel: every sequence cut over this many ranks")
    ep: int = Field(
        default=1, gt=0, le=MOST_RANKS, description="expert parallel: a mixture's experts spread over this many of the tp * cp * dp ranks"
    )
    sequence_parallel: bool = Field(default=True, description="with tp > 1: split norms and residuals over the sequence")

    @model_validator(mode="after")
    def _interleaved_needs_a_pipeline(self) -> ParallelConfig:
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp={self.vpp} needs pp > 1: chunks of a pipeline that has one rank can't be interleaved")
        return self

    @property
    def min_ranks(self) -> int:
        """The number of ranks must be a multiple of this."""
        return self.pp * math.lcm(self.tp * self.cp, self.ep)

    def check_ranks(self, ranks: int) -> None:
        """Raise ConfigError unless `ranks` processes can make these groups."""
        if ranks % self.min_ranks:
            raise ConfigError(
                f"{ranks} ranks do not fit tp={self.tp} pp={self.pp} cp={self.cp} ep={self.ep}; start {self.min_ranks} ranks, or a multiple"
            )

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch must be a multiple of this."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)


class Fp8Config(Section):
    """Matrix products in FP8 by Transformer Engine; LM head, loss and router stay in bfloat16 or float32."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(description="how values are scaled; see docs/parallelism.md")
    format: Literal["auto", "hybrid", "e4m3"] = Field(
        default="auto", description="'hybrid': e4m3 forward, e5m2 gradients; 'auto': hybrid for delayed and tensorwise, e4m3 for the others"
    )
    bf16_first_layers: int = Field(default=0, ge=0, le=MOST, description="layers at the start that stay in bfloat16 (not with 'delayed')")
    bf16_last_layers: int = Field(default=0, ge=0, le=MOST, description="layers at the end that stay in bfloat16 (not with 'delayed')")
    parameters: bool = Field(
        default=False,
        description="keep matrices in FP8 alone, and gather them so after each step: less memory and traffic, no overlap with the forward pass",
    )

    @model_validator(mode="after")
    def _check(self) -> Fp8Config:
        if self.recipe == "delayed" and (self.bf16_first_layers or self.bf16_last_layers):
            raise ValueError("Megatron-Core keeps first and last layers in bfloat16 with tensorwise, blockwise or mxfp8, not with delayed")
        if self.recipe == "delayed" and self.parameters:
            raise ValueError(
                "parameters = true needs tensorwise, blockwise or mxfp8: the first scales of 'delayed' are 1, whatever the loaded weights are"
            )
        return self

    @property
    def token_multiple(self) -> int:
        """Rows of a matrix that an FP8 product takes must be a multiple of this (Megatron-Core's fp8_utils)."""
        return 32 if self.recipe == "mxfp8" else 16
