"""The prompt format of a store against that of the SFT answers, and against the teacher's own."""

from __future__ import annotations

from typing import Any

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import LineageError
from megatron_opd.hf.turns import check_prompt_format, generation_prompt, tokens_as_text
from megatron_opd.recipe.inference import EncodingConfig


def check_stored_format(reader: StoreReader) -> None:
    """Raise LineageError unless a store's prompts are written as those of its sampler's SFT answers, by their encoded ends.

    Nothing is compared where the SFT answers are not known, or where another format was allowed when the store was made.
    """
    manifest, sft = reader.manifest, reader.manifest.lineage.sft
    if sft is None or manifest.allow_template_mismatch:
        return
    problem = check_prompt_format(sft, manifest, reader.location.url)
    if problem is None and sft.prompt_suffix and manifest.encoding.get("assistant_last", "refuse") == "refuse":
        for part in reader.parts:
            rows = reader.part_rows(part)
            if rows.start == rows.stop:
                continue
            tokens, end = reader.rollout(rows.start).tokens, int(reader.prompt_lens[rows.start])
            found = tokens[max(0, end - len(sft.prompt_suffix)) : end].tolist()
            if found != sft.prompt_suffix:
                problem = (
                    f"{reader.location.url}, part {part}: prompts end with {found}, those of the SFT answers ended with {sft.prompt_suffix}"
                )
                break
    if problem is not None:
        raise LineageError(
            f"{problem}; sample again in the format of the SFT answers, or with rollout.allow_template_mismatch=true (recorded)"
        )


def teacher_writes_otherwise(reader: StoreReader, tokenizer: Any) -> str | None:
    """What differs, in a sentence, if the teacher's own chat template would end the store's prompts in another way."""
    manifest = reader.manifest
    if not manifest.prompt_suffix or tokenizer.chat_template is None:
        return None
    own = generation_prompt(tokenizer, EncodingConfig(**manifest.encoding))
    if own == manifest.prompt_suffix:
        return None
    stored = tokens_as_text(tokenizer, manifest.prompt_suffix)
    return f"{reader.location.url}: prompts end with {stored}; by the teacher's own chat template they would end with {tokens_as_text(tokenizer, own)}"
