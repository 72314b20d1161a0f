"""Log-probabilities of a student of now on the rollouts that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.serve.engine import ScoreRequest
from megatron_opd.show.items import Item


def add_student(items: Sequence[Item], directory: str, reader: StoreReader) -> list[Item]:
    """`items` with the log-probabilities of the Hugging Face model in `directory`, by the transformers engine. Raises UserError."""
    from megatron_opd.serve.transformers_engine import TransformersEngine

    engine = TransformersEngine(EngineConfig(kind="transformers"), directory)
    ours, theirs = engine.fingerprint.tokenizer.vocab_sha256, reader.manifest.sampler.tokenizer.vocab_sha256
    if ours != theirs:
        raise UserError(
            f"--student {directory}: its table of tokens ({ours[:12]}) is not that of the store's sampler ({theirs[:12]}); give a student of this run"
        )
    there = [at for at, item in enumerate(items) if len(item.tokens)]
    scores = engine.score([ScoreRequest(items[at].tokens, items[at].prompt_len) for at in there])
    found = list(items)
    for at, score in zip(there, scores, strict=True):
        found[at] = replace(items[at], student_logp=score.logp)
    return found
