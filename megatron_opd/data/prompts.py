"""Prompts: JSONL, Parquet, and Hugging Face dataset folders (as downloaded, or as `save_to_disk` writes them).

A row is {"prompt": text or chat messages, "answer": optional, ...}, or has the layout of a known dataset: `messages`, `conversations`
({from, value}, as OpenThoughts3) or `problem`/`question` in place of the prompt, `reward_model.ground_truth` (as DAPO-Math-17k) in
place of the answer. What a model answered at the end of `messages` or `conversations` is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.records import Prompt, PromptFile

_PROMPT_FIELDS = ("prompt", "messages", "conversations", "problem", "question")
_WITH_ANSWER = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
_SUFFIXES = (".parquet", ".arrow", ".jsonl")
_BATCH_ROWS = 1024
Row = tuple[str, Any]  # where it stands, for messages; its content


def read_prompts(path: str | Path, *, limit: int | None = None, unique: bool = False) -> tuple[PromptFile, list[Prompt]]:
    """Identity of a prompt file or folder, and its prompts: the first `limit`, with `unique` each but once.

    The hash covers prompts and answers that are used, so that it is the same in any format, and a file that grows at its end does not
    invalidate a store of its head. Raises UserError naming file, row and field.
    """
    path = Path(path)
    prompts = _parse_rows(_rows(path))
    if unique:
        prompts = _drop_repeats(prompts)
    kept = [Prompt(index, p.content, p.answer, p.meta) for index, p in enumerate(islice(prompts, limit))]
    if limit is not None and len(kept) < limit:
        raise UserError(f"{path}: {len(kept)} prompts, but num_prompts asks for {limit}")
    if not kept:
        raise UserError(f"{path}: no prompts in it")
    digest = hashlib.sha256()
    for prompt in kept:
        digest.update(json.dumps([prompt.content, prompt.answer]).encode() + b"\n")
    return PromptFile(name=path.name, sha256=digest.hexdigest(), num_prompts=len(kept)), kept


def _drop_repeats(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen = set()
    for prompt in prompts:
        key = hashlib.sha256(json.dumps(prompt.content).encode()).digest()
        if key not in seen:
            seen.add(key)
            yield prompt


def _rows(path: Path) -> Iterator[Row]:
    """Rows of a file or folder. Raises UserError."""
    if path.is_dir():
        for file in _files(path):
            yield from _rows(file)
    elif path.suffix in (".parquet", ".arrow"):
        yield from _arrow_rows(path)
    else:
        yield from _json_rows(path)


def _files(folder: Path) -> list[Path]:
    """Data files of a dataset folder, in order of their names; those of the split `train` where there are several. Raises UserError."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; give the folder of one: {folder / (splits or ['train'])[0]}")
    if (folder / "state.json").exists():  # written by save_to_disk, which says which files and in which order
        return [folder / entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    for suffix in _SUFFIXES:
        files = sorted(file for file in folder.rglob(f"*{suffix}") if not file.name.startswith("."))
        if files:
            return [file for file in files if "train" in file.name] or files
    raise UserError(f"{folder}: no {', '.join(_SUFFIXES)} files in it; a JSONL or Parquet file or a dataset's folder is expected")


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such prompt file; a JSONL or Parquet file or a dataset's folder is expected") from None


def _arrow_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import ipc, parquet

    try:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches(_BATCH_ROWS)
        else:
            batches = ipc.open_stream(pa.memory_map(str(path)))  # save_to_disk writes streams
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: can't be read: {str(error).splitlines()[0]}") from None


def _parse_rows(rows: Iterable[Row]) -> Iterator[Prompt]:
    for where, row in rows:
        if isinstance(row, bytes):
            try:
                row = json.loads(row)
            except ValueError as error:
                raise UserError(f"{where}: not JSON: {error}") from None
        yield _parse(row, where)


def _parse(row: Any, where: str) -> Prompt:
    """The prompt of a row; its index is given later. Raises UserError."""
    there = [name for name in _PROMPT_FIELDS if name in row] if isinstance(row, dict) else []
    if not there:
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no field 'prompt' (fields: {fields}); {', '.join(_PROMPT_FIELDS[1:])} would do as well")
    name = next((name for name in there if row[name] is not None), there[0])
    content = row[name]
    if isinstance(content, list):
        content = _messages(content, name, where)
        while name in _WITH_ANSWER and content and content[-1]["role"] == "assistant":
            content.pop()
    if not content or not isinstance(content, str | list):
        raise UserError(f"{where}: {name!r} must be text or a list of {{role, content}} messages, not {row[name]!r:.200}")
    try:
        "".join([content] if isinstance(content, str) else [message["content"] for message in content]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name!r} holds half a character ({error.object[error.start]!a}); tokenizers refuse it") from None
    answer = row.get("answer")
    reward = row.get("reward_model")
    if answer is None and isinstance(reward, dict):
        answer = reward.get("ground_truth")
    meta = {key: value for key, value in row.items() if key not in (name, "answer", *_WITH_ANSWER)}
    return Prompt(0, content, None if answer is None else str(answer), meta)


def _messages(entries: list[Any], name: str, where: str) -> list[dict[str, str]]:
    """[{role, content}, ...] of chat messages in either spelling. Raises UserError."""
    messages = []
    for entry in entries:
        role = content = None
        if isinstance(entry, dict):
            role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: {name!r} must be text or a list of {{role, content}} messages, but holds {entry!r:.200}")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages
