"""Prompts to token ids, the one place where this happens; the ids are stored and never made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.config import EncodingConfig
from megatron_opd.errors import UserError
from megatron_opd.records import Prompt
from megatron_opd.turns import render


def uses_template(prompt: Prompt, config: EncodingConfig) -> bool:
    """Whether the prompt is rendered by the chat template."""
    return config.chat_template == "always" or (config.chat_template == "auto" and not isinstance(prompt.content, str))


def encode_prompt(tokenizer: Any, prompt: Prompt, config: EncodingConfig) -> np.ndarray:
    """Token ids int32 [P] of a prompt, ready for the model's answer. Raises UserError."""
    if not uses_template(prompt, config):
        if not isinstance(prompt.content, str):
            raise UserError(f"prompt {prompt.index} is a list of messages, but encoding.chat_template is 'never'")
        if config.system is not None or config.enable_thinking is not None:
            raise UserError("encoding.system and encoding.enable_thinking need the chat template (encoding.chat_template='always')")
        ids = tokenizer(prompt.content)["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else list(prompt.content)
        if config.system is not None:
            messages = [{"role": "system", "content": config.system}, *messages]
        try:
            text = render(tokenizer, messages, config)
        except UserError as error:
            raise UserError(f"prompt {prompt.index}: {error}") from None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"prompt {prompt.index} has no tokens: {prompt.content!r}")
    return np.asarray(ids, np.int32)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], config: EncodingConfig, *, max_tokens: int
) -> tuple[list[np.ndarray], list[int]]:
    """Ids of every prompt, and the indices of those over `max_tokens` (or encoding.max_prompt_tokens).

    Raises UserError for over-long prompts unless encoding.overlong_prompt is 'skip'.
    """
    limit = min(max_tokens, config.max_prompt_tokens or max_tokens)
    encoded = [encode_prompt(tokenizer, prompt, config) for prompt in prompts]
    overlong = [number for number, ids in enumerate(encoded) if len(ids) > limit]
    if overlong and config.overlong_prompt == "error":
        longest = max(len(encoded[number]) for number in overlong)
        rows = ", ".join(str(prompts[number].index) for number in overlong[:5])
        raise UserError(
            f"{len(overlong)} prompt(s) are longer than the {limit} tokens that leave room for a response (rows {rows}; longest {longest}); "
            "shorten them, lower sampling.max_new_tokens, or set encoding.overlong_prompt='skip'"
        )
    return encoded, overlong
