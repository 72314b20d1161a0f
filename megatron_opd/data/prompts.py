"""Prompts: JSONL, Parquet, and Hugging Face dataset folders (as downloaded, or as `save_to_disk` writes them).

A row is {"prompt": text or chat messages, "answer": optional, ...}, or has the layout of a known dataset: `messages`, `conversations`
({from, value}, as OpenThoughts3), `problem`/`question` or `instruction` in place of the prompt, `reward_model.ground_truth` (as
DAPO-Math-17k) in place of the answer. What a model answered at the end of `messages` or `conversations` is left out. `system` (text) and
`tools` of a row belong to its prompt. Rows of benchmarks are read as published (`data.benchmarks`).
"""

from __future__ import annotations

import ast
import hashlib
import heapq
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.data.benchmarks import TEST_COLUMNS, boxed_alone, compose_task, day_of_row, in_lower_case
from megatron_opd.data.messages import Message, read_messages, read_tools, texts_of
from megatron_opd.data.prompt_files import Row, Split, find_files, read_rows
from megatron_opd.errors import UserError
from megatron_opd.records import Prompt, PromptFile
from megatron_opd.safety.untrusted import check_characters

T = TypeVar("T")

# Fields of a group say the same, or the row is refused; a group is what those before it are often made of, and is read without them.
_PROMPT_FIELDS = (("prompt", "messages", "conversations"), ("problem", "question"), ("instruction",))
_ALL_PROMPT_FIELDS = tuple(name for group in _PROMPT_FIELDS for name in group)
_WITH_ANSWER = ("messages", "conversations")
_OF_THE_PROMPT = ("tools", "functions", "system")
# A row that fills one of these says more to a model than its text, and would be another prompt without it.
_NOT_UNDERSTOOD = ("images", "image", "videos", "video", "audios", "audio", "documents", "chat_template_kwargs")
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{\s*[\"'](role|from|content|value)[\"']\s*:")
_EXACT_FLOAT = 2.0**53


def read_prompts(
    path: str | Path,
    *,
    limit: int | None = None,
    subset_seed: int | None = None,
    share: tuple[int, int] | None = None,
    unique: bool = False,
    answers: bool = True,
    split: Split = "train",
    dates: tuple[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[PromptFile, list[Prompt]]:
    """Identity of a prompt file or folder (of several splits: `find_files`), and its prompts: those of `dates` (ISO days, the first and the
    last that belong to it), with `unique` each but once; of them the first `limit` or, with `subset_seed`, the first in an order drawn by it
    (`drawn_key`); of them with `share` (i, n) the i-th of n equal shares, which are disjoint, in order, and together all.

    The hash covers what is sampled from (content and tools) of the prompts that are used, so that it is the same in any format, and a
    mended answer does not invalidate a store; nor does a file that grows at its end, unless `subset_seed` draws from all of it. Without `answers` they are not looked at, and tests of
    programs are not kept. `say` gets a line on what was taken and what was left. Raises UserError naming file, row and field.
    """
    path = Path(path)
    rows, window = read_rows(path, split), None
    if dates is not None:
        window = _Window(date.fromisoformat(dates[0]), date.fromisoformat(dates[1]))
        rows = window.choose(rows)

    def parse(row: Row) -> Prompt:
        return parse_prompt(row, answers=answers)

    if subset_seed is None or limit is None:
        prompts = map(parse, rows)
        found = islice(_drop_repeats(prompts) if unique else prompts, limit)
    elif unique:
        found = _draw(_drop_repeats(map(parse, rows)), limit, subset_seed, _as_it_is)
    else:
        found = _draw(rows, limit, subset_seed, parse)
    kept = [replace(prompt, index=index) for index, prompt in enumerate(found)]
    seen = "" if window is None else f" ({window.describe()})"
    if limit is not None and len(kept) < limit:
        raise UserError(f"{path}: {len(kept)} prompts, but num_prompts asks for {limit}{seen}")
    if not kept:
        raise UserError(f"{path}: no prompts in it{seen}")
    if share is not None:
        kept = [replace(prompt, index=index) for index, prompt in enumerate(kept[share_range(len(kept), *share)])]
        if not kept:
            raise UserError(
                f"{path}: fewer prompts than the {share[1]} shares (rounds) that they are divided into; take fewer rounds, or more prompts"
            )
    if say is not None:
        drawn = "" if subset_seed is None else f"; drawn from the whole of it by seed {subset_seed}"
        say(f"prompts of {find_files(path, split).note}{drawn}" + ("" if window is None else f"; {window.describe()}"))
    return PromptFile(name=path.name, sha256=hash_prompts(kept), num_prompts=len(kept)), kept


@dataclass
class _Window:
    """Rows of the days from `first` to `last`, and counts of those that were looked at."""

    first: date
    last: date
    inside: int = 0
    rows: int = 0
    days: tuple[date, date] | None = None  # of all rows

    def choose(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            day = day_of_row(row.value if isinstance(row.value, dict) else {}, row.where)
            self.rows += 1
            self.days = (day, day) if self.days is None else (min(day, self.days[0]), max(day, self.days[1]))
            if self.first <= day <= self.last:
                self.inside += 1
                yield row

    def describe(self) -> str:
        said = f"{self.inside} of {self.rows} rows are of {self.first} to {self.last}"
        return said if self.days is None else f"{said}, and all of {self.days[0]} to {self.days[1]}"


def hash_prompts(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of what is sampled from: what a `PromptFile` of these prompts has."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(sampled_from(prompt) + b"\n")
    return digest.hexdigest()


def share_range(count: int, number: int, shares: int) -> slice:
    """Which of `count` prompts are share `number` (from 1) of `shares`: sizes differ by at most one."""
    return slice(count * (number - 1) // shares, count * number // shares)


def sampled_from(prompt: Prompt) -> bytes:
    """What the samples of a prompt depend on. The null stands where stores of old had the answer: those without any still match."""
    return json.dumps([prompt.content, None, *([prompt.tools] if prompt.tools else [])]).encode()


def drawn_key(seed: int, place: int) -> bytes:
    """By what prompts are ordered before the first of them are drawn; `place` counts, from 0, what could be drawn, in the file's order.

    So a larger subset of a seed begins with the smaller one, and each prompt is as likely to be in it.
    """
    return hashlib.sha256(f"{seed}:{place}".encode()).digest()


def _draw(items: Iterable[T], count: int, seed: int, make: Callable[[T], Prompt]) -> list[Prompt]:
    """Prompts of the `count` items of least `drawn_key`, by rising key. Holds no more than these; what is made of others is dropped again."""
    kept: list[tuple[int, int, Prompt]] = []  # a heap: its first is the next to be dropped
    for place, item in enumerate(items):
        key = -int.from_bytes(drawn_key(seed, place))
        if len(kept) < count:
            heapq.heappush(kept, (key, place, make(item)))
        elif key > kept[0][0]:
            heapq.heapreplace(kept, (key, place, make(item)))
    return [prompt for _, _, prompt in sorted(kept, reverse=True)]


def _as_it_is(prompt: Prompt) -> Prompt:
    return prompt


def _drop_repeats(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen = set()
    for prompt in prompts:
        key = hashlib.sha256(sampled_from(prompt)).digest()
        if key not in seen:
            seen.add(key)
            yield prompt


def parse_prompt(row: Row, *, answers: bool) -> Prompt:
    """The prompt of a row; its index is given later. Raises UserError."""
    row = in_lower_case(row, _ALL_PROMPT_FIELDS)
    where, value = row.where, row.value
    task = compose_task(value, where) if isinstance(value, dict) else None
    asked = value if task is None else value | {"prompt": task}
    there = [name for name in _ALL_PROMPT_FIELDS if name in asked] if isinstance(value, dict) else []
    if not there:
        fields = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: no field 'prompt' (fields: {fields:.300}); {', '.join(_ALL_PROMPT_FIELDS[1:])} would do as well")
    fields = {name: asked[name] for name in (*there, *_OF_THE_PROMPT) if name in asked}
    if row.as_written is None:
        fields = _without_nulls(fields)
    name, content = _content(fields, there, where)
    for other in _NOT_UNDERSTOOD:
        if not _is_missing(value.get(other)) and value[other] != {}:
            raise UserError(
                f"{where}: has {other!r} ({value[other]!r:.80}), which is not understood and the model would not get; leave such rows out"
            )
    if name == "instruction" and not _is_missing(value.get("input")):
        raise UserError(f"{where}: 'instruction' has an 'input' ({value['input']!r:.80}) beside it; put both into one field 'prompt'")
    tools = read_tools(fields, where)
    for text in texts_of([content, tools]):
        if "\0" in text:
            raise UserError(f"{where}: {name!r} or its tools hold a NUL character, which is no text; remove it")
        check_characters(text, f"{where}: {name!r}")
    left = {"answer", *_WITH_ANSWER, *_OF_THE_PROMPT} | (set() if answers else set(TEST_COLUMNS)) | ({name} if task is None else set())
    meta = {key: item for key, item in value.items() if key not in left}
    return Prompt(0, content, _answer(row) if answers else None, meta, tools, where)


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
    found = {"answer": value.get("answer")} | (
        {"reward_model.ground_truth": reward.get("ground_truth")} if isinstance(reward, dict) else {}
    )
    return {"solution": boxed_alone(value.get("solution"))} if all(map(_is_missing, found.values())) else found


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
