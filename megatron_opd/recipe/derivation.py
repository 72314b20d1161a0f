"""Teachers that are made of another's scores: the recipe's sections [score.derived.NAME]."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_opd.recipe.layout import Section, source
from megatron_opd.records import Derivation

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # no dot: it would be another section
_VERSIONS = {"residualize": 1, "shuffle": 1}  # raised when a method computes something else
# Fields that each method has.
_SETTINGS = {"residualize": ("folds", "position_bins", "surprisal_bins", "smoothing", "seed"), "shuffle": ("seed",)}
METHODS = tuple(_SETTINGS)


class DerivedConfig(Section):
    """A teacher whose scores are made of those of score.teacher, once the whole store has them; no model is needed.

    'residualize' takes off what recurs of log pi_T - log pi_ref (Lightning OPD 2.0, arXiv 2607.28449); its bins and smoothing are not
    published, and ours. 'shuffle' is a control.
    """

    method: Literal["residualize", "shuffle"] = Field(
        description="'residualize': without what recurs, for a teacher that is not the SFT teacher; 'shuffle': permuted between tokens"
    )
    folds: int = Field(
        default=5,
        ge=2,
        le=100,
        description="residualize: parts of the prompts; what is taken off one is fitted on the others",
        json_schema_extra=source("arXiv 2607.28449"),
    )
    position_bins: int = Field(default=10, gt=0, le=1000, description="residualize: bins of the position in the response, as a share of it")
    surprisal_bins: int = Field(default=10, gt=0, le=1000, description="residualize: bins of -log pi_ref, from 0.01 to 10 nats")
    smoothing: float = Field(
        default=5.0, ge=0, le=1e9, description="residualize: each group's mean counts the global mean as so many tokens of its own"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of the folds, or of the permutation")

    @model_validator(mode="after")
    def _fits_the_method(self) -> DerivedConfig:
        fields = type(self).model_fields
        void = [name for name in fields if name not in ("method", *_SETTINGS[self.method]) and getattr(self, name) != fields[name].default]
        if void:
            raise ValueError(f"method {self.method!r} has no {', '.join(void)}; leave {'it' if len(void) == 1 else 'them'} out")
        return self

    def derivation(self, source: str) -> Derivation:
        """What is recorded of scores that are made of those of teacher `source`."""
        settings = {name: getattr(self, name) for name in _SETTINGS[self.method]}
        return Derivation(method=self.method, source=source, settings=settings, version=_VERSIONS[self.method])


def check_names(section: Any) -> Any:
    """The table as read, without teachers that are switched off. Raises ValueError for what can't be a teacher's name."""
    if not isinstance(section, dict):
        raise ValueError("tables [score.derived.NAME] are expected")
    for name in section:
        if not _NAME.fullmatch(name):
            raise ValueError(f"derived.{name}: this can't be the name of a teacher: letters, digits, - and _ are expected")
    return {name: value for name, value in section.items() if value is not None}
