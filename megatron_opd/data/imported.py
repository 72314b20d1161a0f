"""Responses that another program made: rows of a JSONL or Parquet file (or a dataset's folder), as it dumps them.

A row has a prompt and a response, each as token ids or as text. Where both are there the ids count. The spellings that are read:

    prompt ids      prompt_token_ids (vLLM), prompt_ids (TRL, verl)
    prompt text     as a prompt file has it: prompt, messages, conversations, problem, question, with system and tools
    response ids    response_token_ids, response_ids (verl), completion_ids (TRL), output_ids (SGLang), token_ids (vLLM)
    response text   response, completion (TRL), output (verl), or the assistant's message that ends messages or conversations
    log-probs       logprobs (TRL), response_logprobs (verl): a number a token; output_token_logprobs (SGLang): [logprob, id, text]
    finish          finish_reason: "stop", "length", or {"type": ...} (SGLang)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.data.messages import read_messages
from megatron_opd.data.prompt_files import Row, read_rows
from megatron_opd.data.prompts import parse_prompt, sampled_from
from megatron_opd.errors import StoreError, UserError
from megatron_opd.records import LOGP_EPSILON, LOGP_FLOOR, Finish, Prompt, PromptFile
from megatron_opd.safety.untrusted import check_characters
from megatron_opd.store_records import StoreManifest

PROMPT_IDS = ("prompt_token_ids", "prompt_ids")
RESPONSE_IDS = ("response_token_ids", "response_ids", "completion_ids", "output_ids", "token_ids")
RESPONSE_TEXT = ("response", "completion", "output")
LOGPROBS = ("logprobs", "response_logprobs", "output_token_logprobs")
FINISH = "finish_reason"
_CHATS = ("messages", "conversations")
_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH}
_LARGEST_ID = 1 << 31


@dataclass(frozen=True)
class ImportedRow:
    """A prompt (text or messages, or ids int32 [P]) and a response (text, or ids int32 [R]); `field` is where the response stands.

    logp float32 [R] and finish are None where the row does not give them.
    """

    where: str
    field: str
    prompt: Prompt | None
    prompt_ids: np.ndarray | None
    response: str | None
    response_ids: np.ndarray | None
    logp: np.ndarray | None
    finish: Finish | None


def read_responses(path: str | Path, *, limit: int | None = None, field: str | None = None) -> list[ImportedRow]:
    """Every row of a file, or the first `limit`; `field` names the response's field. Raises UserError naming file, row and field."""
    rows = [_parse(row, index, field) for index, row in enumerate(islice(read_rows(path), limit))]
    if not rows:
        raise UserError(f"{path}: no rows in it")
    if limit is not None and len(rows) < limit:
        raise UserError(f"{path}: {len(rows)} rows, but num_prompts asks for {limit}")
    return rows


def prompts_of(path: str | Path, rows: Sequence[ImportedRow]) -> PromptFile:
    """Identity of the prompts: that of a prompt file where they are text or messages."""
    return PromptFile(name=Path(path).name, sha256=hash_row_prompts(rows), num_prompts=len(rows))


def hash_row_prompts(rows: Iterable[ImportedRow]) -> str:
    """SHA-256 of prompts as `hash_prompts` makes it, of their ids where they are ids."""
    digest = hashlib.sha256()
    for row in rows:
        ids = None if row.prompt_ids is None else row.prompt_ids.tolist()
        digest.update((sampled_from(row.prompt) if row.prompt is not None else json.dumps({"prompt_token_ids": ids}).encode()) + b"\n")
    return digest.hexdigest()


def hash_responses(rows: Iterable[ImportedRow], *, log_probs: bool) -> str:
    """SHA-256 of the responses as the file gives them, with their log-probabilities where these are used."""
    digest = hashlib.sha256()
    for row in rows:
        said = row.response if row.response_ids is None else row.response_ids.tolist()
        digest.update(json.dumps([said, None if row.finish is None else row.finish.name]).encode() + b"\n")
        if log_probs and row.logp is not None:
            digest.update(row.logp.tobytes())
    return digest.hexdigest()


def import_record(provenance: dict[str, Any]) -> dict[str, Any] | None:
    """What the provenance of a manifest or an extension says of the file that it was imported from; None if it was not."""
    record = provenance.get("imported")
    return record if isinstance(record, dict) else None


def check_same_import(url: str, manifest: StoreManifest, rows: Sequence[ImportedRow], *, log_probs: bool) -> None:
    """Raise StoreError unless a store was imported from files that begin as these rows do, up to as many as there are.

    `log_probs`: whether the rows' log-probabilities are used.
    """
    made = [(manifest.provenance, manifest.prompts), *((entry.provenance, entry.prompts) for entry in manifest.extensions)]
    for provenance, prompts in made:
        if prompts.num_prompts > len(rows):
            break
        record = import_record(provenance) or {}  # a store that was sampled has another lineage, and was refused
        if record.get("log_probs") != named_log_probs(log_probs):
            raise StoreError(
                f"{url} has log-probabilities that were {record.get('log_probs')!r:.20}, now they would be {named_log_probs(log_probs)!r}; "
                "import in the same way, or into another store"
            )
        if record.get("sha256") != hash_responses(rows[: prompts.num_prompts], log_probs=log_probs):
            raise StoreError(
                f"{url} was imported from {record.get('file')!r:.100} with other responses to these prompts; import into another store"
            )


def named_log_probs(declared: bool) -> str:
    """Where log-probabilities of imported responses are from: the file, or a model that was asked."""
    return "declared" if declared else "computed"


def _parse(row: Row, index: int, field: str | None) -> ImportedRow:
    where, value = row.where, row.value
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object with a prompt and a response, not {value!r:.100}")
    prompt_ids = _token_ids(value, PROMPT_IDS, where)
    prompt = None if prompt_ids is not None else replace(parse_prompt(row, answers=False), index=index, meta={})
    name, response, response_ids = _response(value, field, where)
    logp = _log_probs(value, response_ids, where)
    return ImportedRow(where, name, prompt, prompt_ids, response, response_ids, logp, _finish(value.get(FINISH), where))


def _filled(value: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    """The one of these fields that the row fills, None without any. Raises UserError for two that differ."""
    there = [name for name in names if value.get(name) not in (None, "", [])]
    for other in there[1:]:
        if value[other] != value[there[0]]:
            raise UserError(f"{where}: {there[0]!r} and {other!r} say different things; keep one of them")
    return there[0] if there else None


def _token_ids(value: dict[str, Any], names: Sequence[str], where: str) -> np.ndarray | None:
    """int32 [T], None where no field is filled."""
    name = _filled(value, names, where)
    return None if name is None else _as_ids(value[name], name, where)


def _as_ids(ids: Any, name: str, where: str) -> np.ndarray:
    if not isinstance(ids, list) or not ids or any(type(token) is not int or not 0 <= token < _LARGEST_ID for token in ids):
        raise UserError(f"{where}: {name!r} must be a list of token ids, not {ids!r:.200}")
    return np.array(ids, np.int32)


def _response(value: dict[str, Any], field: str | None, where: str) -> tuple[str, str | None, np.ndarray | None]:
    """Field, text, ids; one of the last two is None. Raises UserError."""
    if field is not None and field not in value:
        raise UserError(f"{where}: no field {field!r}, which is to hold the response (fields: {', '.join(value):.300})")
    groups = ((field,),) if field is not None else (RESPONSE_IDS, RESPONSE_TEXT, _CHATS)
    name = next((found for group in groups if (found := _filled(value, group, where)) is not None), None)
    if name is not None and (name in RESPONSE_IDS or (field is not None and _holds_numbers(value[name]))):
        return name, None, _as_ids(value[name], name, where)
    if name is None:
        known = ", ".join((*RESPONSE_IDS, *RESPONSE_TEXT))
        hint = "; 'answer' is what a response is graded by: if it is the response here, give --response answer" if "answer" in value else ""
        raise UserError(f"{where}: no response ({field or known}, or messages that end with the assistant's){hint}")
    text = value[name]
    if not isinstance(text, str) or name in _CHATS:
        text = _last_message(text, name, where)
    if "\0" in text or not text:
        raise UserError(f"{where}: {name!r} must be the text of a response, not {text!r:.100}")
    check_characters(text, f"{where}: {name!r}")
    return name, text, None


def _holds_numbers(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(entry, dict) for entry in value)


def _last_message(entries: Any, name: str, where: str) -> str:
    """Text of the assistant's message at the end."""
    messages = read_messages(entries, name, where)
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["assistant"] or roles[-2:-1] == ["assistant"] or (name not in _CHATS and len(roles) > 1):
        raise UserError(
            f"{where}: {name!r} must end with one message of the assistant's, the response; its roles are {', '.join(roles)!r:.200}"
        )
    if extra := messages[-1].keys() - {"role", "content"}:
        raise UserError(
            f"{where}: the last message of {name!r} has {', '.join(sorted(extra))}; give the response as the model writes it, in a field 'response'"
        )
    return messages[-1]["content"]


def _log_probs(value: dict[str, Any], response_ids: np.ndarray | None, where: str) -> np.ndarray | None:
    """float32 [R]. Raises UserError for what are no log-probabilities of the response's tokens."""
    name = _filled(value, LOGPROBS, where)
    if name is None:
        return None
    entries = value[name]
    if response_ids is None:
        raise UserError(
            f"{where}: {name!r} needs the response's token ids ({', '.join(RESPONSE_IDS)}); of a text nobody knows to which tokens they belong"
        )
    if not isinstance(entries, list) or len(entries) != len(response_ids):
        got = f"{len(entries)}" if isinstance(entries, list) else f"{entries!r:.100}"
        raise UserError(
            f"{where}: {name!r} must be a list with a number for each of the {len(response_ids)} tokens of the response, not {got}"
        )
    numbers = []
    for entry, token in zip(entries, response_ids.tolist(), strict=True):
        if isinstance(entry, list | tuple) and len(entry) in (2, 3):
            if entry[1] != token:
                raise UserError(f"{where}: {name!r} has the token {entry[1]!r:.50} where the response has {token}")
            entry = entry[0]
        if not isinstance(entry, int | float) or isinstance(entry, bool) or not LOGP_FLOOR <= entry <= LOGP_EPSILON:
            raise UserError(
                f"{where}: {name!r} holds {entry!r:.100}, which is no log-probability; leave the field out, and they are computed"
            )
        numbers.append(entry)
    return np.array(numbers, np.float32)


def _finish(value: Any, where: str) -> Finish | None:
    name = value.get("type") if isinstance(value, dict) else value
    if name in (None, ""):
        return None
    if not isinstance(name, str) or name not in _FINISHES:
        raise UserError(
            f"{where}: {FINISH!r} must be 'stop' or 'length', not {value!r:.100}; other responses are not whole: leave such rows out"
        )
    return _FINISHES[name]
