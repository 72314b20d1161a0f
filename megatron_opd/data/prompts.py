"""Prompts: JSONL, Parquet, and Hugging Face dataset folders (as downloaded, or as `save_to_disk` writes them).

A row is {"prompt": text or chat messages, "answer": optional, ...}, or has the layout of a known dataset: `messages`, `conversations`
({from, value}, as OpenThoughts3) or `problem`/`question` in place of the prompt, `reward_model.ground_truth` (as DAPO-Math-17k) in
place of the answer. What a model answered at the end of `messages` or `conversations` is left out. `system` (text) and `tools` of a
row belong to its prompt.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_opd.data.messages import Message, read_messages, read_tools, texts_of
from megatron_opd.data.prompt_files import Row, read_rows
from megatron_opd.errors import UserError
from megatron_opd.records import Prompt, PromptFile
from megatron_opd.untrusted import check_characters

# Fields of a group say the same, or the row is refused; the second group is what the first is often made of, and is read without it.
_PROMPT_FIELDS = (("prompt", "messages", "conversations"), ("problem", "question"))
_ALL_PROMPT_FIELDS = tuple(name for group in _PROMPT_FIELDS for name in group)
_WITH_ANSWER = ("messages", "conversations")
_OF_THE_PROMPT = ("tools", "functions", "system")
# A row that fills one of these says more to a model than its text, and would be another prompt without it.
_NOT_UNDERSTOOD = ("images", "image", "videos", "video", "audios", "audio", "documents", "chat_template_kwargs")
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{\s*[\"'](role|from|content|value)[\"']\s*:")
_EXACT_FLOAT = 2.0**53


def read_prompts(
    path: str | Path, *, limit: int | None = None, unique: bool = False, answers: bool = True
) -> tuple[PromptFile, list[Prompt]]:
    """Identity of a prompt file or folder, and its prompts: the first `limit`, with `unique` each but once.

    The hash covers what is sampled from (content and tools) of the prompts that are used, so that it is the same in any format, and
    neither a file that grows at its end nor a mended answer invalidates a store. Without `answers` they are not looked at.
    Raises UserError naming file, row and field.
    """
    path = Path(path)
    prompts = (parse_prompt(row, answers=answers) for row in read_rows(path))
    if unique:
        prompts = _drop_repeats(prompts)
    kept = [replace(prompt, index=index) for index, prompt in enumerate(islice(prompts, limit))]
    if limit is not None and len(kept) < limit:
        raise UserError(f"{path}: {len(kept)} prompts, but num_prompts asks for {limit}")
    if not kept:
        raise UserError(f"{path}: no prompts in it")
    return PromptFile(name=path.name, sha256=hash_prompts(kept), num_prompts=len(kept)), kept


def hash_prompts(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of what is sampled from: what a `PromptFile` of these prompts has."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(sampled_from(prompt) + b"\n")
    return digest.hexdigest()


def sampled_from(prompt: Prompt) -> bytes:
    """What the samples of a prompt depend on. The null stands where stores of old had the answer: those without any still match."""
    return json.dumps([prompt.content, None, *([prompt.tools] if prompt.tools else [])]).encode()


def _drop_repeats(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen = set()
    for prompt in prompts:
        key = hashlib.sha256(sampled_from(prompt)).digest()
        if key not in seen:
            seen.add(key)
            yield prompt


def parse_prompt(row: Row, *, answers: bool) -> Prompt:
    """The prompt of a row; its index is given later. Raises UserError."""
    where, value = row.where, row.value
    there = [name for name in _ALL_PROMPT_FIELDS if name in value] if isinstance(value, dict) else []
    if not there:
        fields = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: no field 'prompt' (fields: {fields:.300}); {', '.join(_ALL_PROMPT_FIELDS[1:])} would do as well")
    fields = {name: value[name] for name in (*there, *_OF_THE_PROMPT) if name in value}
    if row.as_written is None:
        fields = _without_nulls(fields)
    name, content = _content(fields, there, where)
    for other in _NOT_UNDERSTOOD:
        if not _is_missing(value.get(other)) and value[other] != {}:
            raise UserError(
                f"{where}: has {other!r} ({value[other]!r:.80}), which is not understood and the model would not get; leave such rows out"
            )
    tools = read_tools(fields, where)
    for text in texts_of([content, tools]):
        if "\0" in text:
            raise UserError(f"{where}: {name!r} or its tools hold a NUL character, which is no text; remove it")
        check_characters(text, f"{where}: {name!r}")
    meta = {key: item for key, item in value.items() if key not in (name, "answer", *_WITH_ANSWER, *_OF_THE_PROMPT)}
    return Prompt(0, content, _answer(row) if answers else None, meta, tools)


def _content(fields: dict[str, Any], there: list[str], where: str) -> tuple[str, str | list[Message]]:
    """Field and content of a prompt, with the row's `system`. Raises UserError."""
    for group in _PROMPT_FIELDS:
        filled = {name: fields[name] for name in group if name in there and not _is_missing(fields.get(name))}
        if filled:
            found = {name: _read_content(value, name, where) for name, value in filled.items()}
            name, content = next(iter(found.items()))
            for other, said in found.items():
                if _as_messages(said) != _as_messages(content):
                    raise UserError(f"{where}: {name!r} and {other!r} say different things; keep one of them")
            break
    else:
        name = there[0]
        raise UserError(f"{where}: {name!r} must be text or a list of {{role, content}} messages, not {fields.get(name)!r:.200}")
    system = fields.get("system")
    if _is_missing(system):
        return name, content
    if not isinstance(system, str):
        raise UserError(f"{where}: 'system' must be text, not {system!r:.200}")
    messages = _as_messages(content)
    first = messages[0]
    if first["role"] in ("system", "developer"):
        if first["content"] != system:
            raise UserError(f"{where}: 'system' is {system!r:.100}, but {name!r} begins with the system message {first['content']!r:.100}")
        return name, messages
    return name, [{"role": "system", "content": system}, *messages]


def _read_content(value: Any, name: str, where: str) -> str | list[Message]:
    if isinstance(value, list) or name in _WITH_ANSWER:
        messages = read_messages(value, name, where, with_answer=name in _WITH_ANSWER)
        if not messages:
            raise UserError(f"{where}: {name!r} must be text or a list of {{role, content}} messages that holds more than the answer")
        return messages
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text or a list of {{role, content}} messages, not {value!r:.200}")
    if _LIST_OF_OBJECTS.match(value) and _holds_messages(value):
        raise UserError(f"{where}: {name!r} is a text that holds a list of messages, as JSON or Python write it; write them as a list")
    return value


def _holds_messages(text: str) -> bool:
    for parse in (json.loads, ast.literal_eval):
        try:
            entries = parse(text)
            return all({"role", "from"} & entry.keys() and {"content", "value"} & entry.keys() for entry in entries)
        except (ValueError, SyntaxError, AttributeError, TypeError, RecursionError, MemoryError):
            continue
    return False


def _as_messages(content: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def _is_missing(value: Any) -> bool:
    return value is None or value in ("", []) or (isinstance(value, float) and math.isnan(value))


def _without_nulls(value: Any) -> Any:
    """Arrow's values without what it fills in for keys that a row does not have; a map becomes a dict."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        value = dict(value)
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _answer(row: Row) -> str | None:
    """The answer of a row as text; None where there is none. Raises UserError."""
    found = _answers_in(row.value)
    if row.as_written is not None and any(isinstance(value, float | list) for value in found.values()):
        found = _answers_in(row.as_written())
    texts = {name: text for name, value in found.items() if (text := _answer_text(value, name, row.where)) is not None}
    if len(set(texts.values())) > 1:
        raise UserError(f"{row.where}: {' and '.join(f'{name} {text!r:.60}' for name, text in texts.items())} differ; keep one of them")
    return next(iter(texts.values()), None)


def _answers_in(value: dict[str, Any]) -> dict[str, Any]:
    reward = value.get("reward_model")
    return {"answer": value.get("answer")} | ({"reward_model.ground_truth": reward.get("ground_truth")} if isinstance(reward, dict) else {})


def _answer_text(value: Any, name: str, where: str) -> str | None:
    """An answer as text: of a list its one element, numbers as they are written, of GSM8K's worked solutions what stands behind '####'."""
    if isinstance(value, list):
        if len(value) > 1:
            raise UserError(f"{where}: {name!r} has {len(value)} elements ({value!r:.100}); an answer is one text, so give the row one")
        value = value[0] if value else None
    if _is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_FLOAT:
        value = int(value)  # JSON's decimals come as text; Arrow makes floats of whole numbers where one of the column is missing
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal) or (isinstance(value, float) and math.isinf(value)):
        raise UserError(f"{where}: {name!r} must be text or a number, not {value!r:.100}; write the text that the model is to give")
    text = str(value)
    _, marker, behind = text.rpartition("####")
    if marker and "\n" not in behind.strip():
        text = behind.strip()
        if not text:
            raise UserError(f"{where}: {name!r} has nothing behind its '####'")
    return text if text.strip() else None
