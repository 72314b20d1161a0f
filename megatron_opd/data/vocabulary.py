"""Token ids that a model doesn't know: beyond the rows of its embedding, or of tokens that its tokenizer lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError


@dataclass(frozen=True)
class Vocabulary:
    """What model `name` knows: ids below `rows`, without those of `foreign` (id -> token), which another tokenizer has in addition."""

    name: str
    rows: int
    foreign: dict[int, str] = field(default_factory=dict)

    def check(self, ids: np.ndarray, where: str, remedy: str) -> None:
        """Raise StoreError naming an id of `ids` (any shape) that the model does not know."""
        if ids.size and (highest := int(ids.max())) >= self.rows:
            raise StoreError(f"{where}: token id {highest}, but {self.name} has {self.rows} embedding rows; {remedy}")
        if self.foreign and (found := ids[np.isin(ids, list(self.foreign))]).size:
            number = int(found[0])
            raise StoreError(
                f"{where}: token id {number} ({self.foreign[number]!r}), which the tokenizer of one of the two models lacks ({self.name}); {remedy}"
            )

    def check_store(self, reader: StoreReader, parts: Iterable[int], *, known_rows: int) -> None:
        """Check every token of `parts`, if there can be one that the model does not know; `known_rows` has the model that made them."""
        if self.rows >= known_rows and not self.foreign:
            return
        remedy = "use models of one tokenizer, or collect rollouts without this token"
        for part in parts:
            for rollout in reader.part_rollouts(part):
                where = f"{reader.location.url}, prompt {rollout.prompt_index}, sample {rollout.sample_index}"
                self.check(rollout.tokens, where, remedy)
