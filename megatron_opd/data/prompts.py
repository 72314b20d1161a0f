"""Prompt files: JSONL rows {"prompt": text or chat messages, "answer": optional, ...}; other fields are kept as meta."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.records import Prompt, PromptFile


def read_prompts(path: str | Path, *, limit: int | None = None) -> tuple[PromptFile, list[Prompt]]:
    """The file's identity and its prompts, the first `limit` of them. Raises UserError naming file, line and field.

    The hash covers the rows that are used, so that a file that grows at its end does not invalidate a store of its head.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such prompt file; a JSONL file with a 'prompt' field in each row is expected") from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()][:limit]
    if limit is not None and len(rows) < limit:
        raise UserError(f"{path}: {len(rows)} prompts, but num_prompts asks for {limit}")
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    prompts = [_parse(line, f"{path}:{number}", index) for index, (number, line) in enumerate(rows)]
    digest = hashlib.sha256(b"\n".join(line for _, line in rows)).hexdigest()
    return PromptFile(name=path.name, sha256=digest, num_prompts=len(prompts)), prompts


def _parse(line: bytes, where: str, index: int) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f"{where}: no field 'prompt' (fields: {', '.join(row) if isinstance(row, dict) else type(row).__name__})")
    content = row.pop("prompt")
    if isinstance(content, list):
        if not content or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content
        ):
            raise UserError(f"{where}: 'prompt' must be text or a list of {{role, content}} messages")
        content = [{"role": message["role"], "content": message["content"]} for message in content]
    elif not isinstance(content, str) or not content:
        raise UserError(f"{where}: 'prompt' must be text or a list of {{role, content}} messages, not {content!r}")
    try:
        "".join([content] if isinstance(content, str) else [message["content"] for message in content]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: 'prompt' holds half a character ({error.object[error.start]!a}); tokenizers refuse it") from None
    answer: Any = row.pop("answer", None)
    return Prompt(index=index, content=content, answer=None if answer is None else str(answer), meta=row)
