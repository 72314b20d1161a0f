"""Prompts to token ids, the one place where this happens; the ids are stored and never made again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.errors import UserError
from megatron_opd.hf.turns import confined_texts, render
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import Prompt
from megatron_opd.serve.rendered import Messages, check_printed


def uses_template(prompt: Prompt, config: EncodingConfig) -> bool:
    """Whether the prompt is rendered by the chat template."""
    return config.chat_template == "always" or (config.chat_template == "auto" and not isinstance(prompt.content, str))


def encode_prompt(tokenizer: Any, prompt: Prompt, config: EncodingConfig) -> np.ndarray:
    """Token ids int32 [P] of a prompt, ready for the model's answer. Raises UserError."""
    return encode_prompts(tokenizer, [prompt], config)[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], config: EncodingConfig) -> list[np.ndarray]:
    """Ids of every prompt, whatever their length. Raises UserError."""
    chats = [prompt for prompt in prompts if uses_template(prompt, config)]
    rendered = confined_texts(
        tokenizer, lambda prompt: _chat_text(tokenizer, prompt, config), chats, lambda prompt: f"prompt {prompt.index}"
    )
    encoded = []
    with contextlib.closing(rendered) as texts:
        for prompt in prompts:
            if uses_template(prompt, config):
                ids = tokenizer(next(texts), add_special_tokens=False)["input_ids"]  # the template prints the special tokens itself
            else:
                ids = _encode_text(tokenizer, prompt, config)
            if not ids:
                raise UserError(f"prompt {prompt.index} has no tokens: {prompt.content!r:.200}")
            encoded.append(np.asarray(ids, np.int32))
    return encoded


def find_overlong(encoded: Sequence[np.ndarray], prompts: Sequence[Prompt], config: EncodingConfig, *, max_tokens: int) -> list[int]:
    """Positions of the prompts over `max_tokens` (or encoding.max_prompt_tokens).

    Raises UserError if there are any, unless encoding.overlong_prompt is 'skip'.
    """
    limit = min(max_tokens, config.max_prompt_tokens or max_tokens)
    overlong = [number for number, ids in enumerate(encoded) if len(ids) > limit]
    if overlong and config.overlong_prompt == "error":
        longest = max(len(encoded[number]) for number in overlong)
        rows = ", ".join(str(prompts[number].index) for number in overlong[:5])
        raise UserError(
            f"{len(overlong)} prompt(s) are longer than the {limit} tokens that leave room for a response (rows {rows}; longest {longest}); "
            "shorten them, lower sampling.max_new_tokens, or set encoding.overlong_prompt='skip'"
        )
    return overlong


def describe_encoding(tokenizer: Any, prompts: Sequence[Prompt], config: EncodingConfig) -> list[str]:
    """What people may not expect of how these prompts reach the model, a line each."""
    lines = [] if config.question is None else [f"questions are put to the model as {config.question!r}"]
    if tokenizer.chat_template is None:
        return lines
    as_text = sum(not uses_template(prompt, config) for prompt in prompts)
    if as_text:
        lines.append(
            f"{as_text} of {len(prompts)} prompts are text and go to the model as they are, although it has a chat template; "
            "encoding.chat_template='always' makes a user's turn of each"
        )
    developers = sum(
        any(message["role"] == "developer" for message in prompt.content) for prompt in prompts if isinstance(prompt.content, list)
    )
    if developers and not _knows_developer(tokenizer):
        lines.append(
            f"{developers} of {len(prompts)} prompts have developer messages, which the chat template does not know: they become system messages"
        )
    return lines


def render_prompt(tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None, config: EncodingConfig) -> str:
    """The chat template's text, up to where the model writes on: in a turn of its own, or in a last message of the assistant's."""
    goes_on = messages[-1]["role"] == "assistant"
    return render(tokenizer, messages, config, tools=tools, add_generation_prompt=not goes_on, continue_final_message=goes_on)


def _encode_text(tokenizer: Any, prompt: Prompt, config: EncodingConfig) -> list[int]:
    """Ids of a text, with what the tokenizer puts before each text, once, and without what it puts behind it (a prompt goes on)."""
    if not isinstance(prompt.content, str):
        raise UserError(f"prompt {prompt.index} is a list of messages, but encoding.chat_template is 'never'")
    if lost := [name for name in ("system", "enable_thinking", "date_string") if getattr(config, name) is not None]:
        raise UserError(f"encoding.{lost[0]} needs the chat template (encoding.chat_template='always')")
    if prompt.tools:
        raise UserError(f"prompt {prompt.index} has tools, which only a chat template prints; set encoding.chat_template='always'")
    text = config.put(prompt.content)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    starts = [start for start in range(len(full) - len(ids) + 1) if full[start : start + len(ids)] == ids]
    if not starts:
        raise UserError(
            f"prompt {prompt.index}: {tokenizer.name_or_path} encodes the text differently with special tokens than without; fix its files"
        )
    before = full[: starts[0]]
    return ids if ids[: len(before)] == before else before + ids


def _chat_text(tokenizer: Any, prompt: Prompt, config: EncodingConfig) -> str:
    where = f"prompt {prompt.index}"
    messages = _messages_of(tokenizer, prompt, config)
    try:
        text = render_prompt(tokenizer, messages, prompt.tools, config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    check_printed(lambda changed, tools: render_prompt(tokenizer, changed, tools, config), messages, prompt.tools, text, where)
    if messages[-1]["role"] == "assistant":
        _check_continued(text, messages[-1]["content"], where)
    return text


def _check_continued(text: str, begun: str, where: str) -> None:
    """Raise UserError unless `text` ends with the answer that the model is to go on with, as it is."""
    if not text.endswith(begun.lstrip()):
        raise UserError(
            f"{where}: the chat template does not end with the assistant's last message {begun[-80:]!r}; "
            "white space at its end is what templates strip: remove it, or the message"
        )
    if "<think>" in begun.rpartition("</think>")[2] and text.removesuffix(begun.lstrip()).rstrip().endswith("</think>"):
        raise UserError(
            f"{where}: the chat template closes the reasoning before the assistant's last message, which begins some: {begun[:80]!r}"
        )


def _messages_of(tokenizer: Any, prompt: Prompt, config: EncodingConfig) -> Messages:
    """The messages that the template gets. Raises UserError."""
    where = f"prompt {prompt.index}"
    messages = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else list(prompt.content)
    last = messages[-1]
    if last["role"] == "assistant":
        if config.assistant_last == "refuse":
            raise UserError(
                f"{where} ends in an assistant message ({last['content']!r:.80}); encoding.assistant_last='continue' has the model write on in it, "
                "or remove it"
            )
        if "tool_calls" in last:
            raise UserError(
                f"{where} ends in a tool call of the assistant's, which nothing can go on from; remove it, or add the tool's result"
            )
    if config.question is not None:
        place = next((number for number in reversed(range(len(messages))) if messages[number]["role"] == "user"), None)
        if place is None:
            raise UserError(f"{where} has no user message, which encoding.question is for; leave that out, or the prompt")
        messages[place] = {**messages[place], "content": config.put(messages[place]["content"])}
    if not _knows_developer(tokenizer):
        messages = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    if config.system is not None:
        own = messages[0] if messages[0]["role"] in ("system", "developer") else None
        if own is not None and own["content"] != config.system and config.row_system == "refuse":
            raise UserError(
                f"{where} has the system message {own['content']!r:.80}, and encoding.system is {config.system!r:.80}; "
                "encoding.row_system='keep' takes the row's, 'replace' takes encoding.system"
            )
        if own is None:
            messages = [{"role": "system", "content": config.system}, *messages]
        elif config.row_system == "replace":
            messages = [{**own, "content": config.system}, *messages[1:]]
    return messages


def _knows_developer(tokenizer: Any) -> bool:
    """Whether the chat template says the role by name; one that does not would print nothing, or a role the model has never seen."""
    return "developer" in str(tokenizer.chat_template)
