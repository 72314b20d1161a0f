"""Rows that other programs dump are read as they say, in every spelling, or refused by file, row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_opd.data.imported import hash_responses, prompts_of, read_responses
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.records import Finish

IDS: dict[str, Any] = {"prompt_token_ids": [5, 6], "response_token_ids": [7, 8, 1]}
TEXT: dict[str, Any] = {"prompt": "a", "response": "b"}
QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("prompt", ["prompt_token_ids", "prompt_ids"])
@pytest.mark.parametrize("response", ["response_token_ids", "response_ids", "completion_ids", "output_ids", "token_ids"])
@pytest.mark.parametrize("logprobs", ["logprobs", "response_logprobs", "output_token_logprobs", None])
def test_token_ids_in_every_spelling(tmp_path: Path, prompt: str, response: str, logprobs: str | None) -> None:
    row: dict[str, Any] = {prompt: [5, 6], response: [7, 8, 1], "prompt": "not looked at"}
    if logprobs is not None:
        numbers = [-0.5, -1, 0.0]
        triples = [[number, token, None] for number, token in zip(numbers, row[response], strict=True)]
        row[logprobs] = triples if logprobs.startswith("output") else numbers
    (found,) = read_responses(write(tmp_path / "x.jsonl", row))
    assert (found.prompt, found.response, found.finish, found.field) == (None, None, None, response)
    assert found.prompt_ids is not None
    assert found.response_ids is not None
    assert (found.prompt_ids.tolist(), found.response_ids.tolist()) == ([5, 6], [7, 8, 1])
    assert found.response_ids.dtype == np.int32
    assert (found.logp is None) if logprobs is None else (found.logp is not None and found.logp.tolist() == [-0.5, -1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "content", "response"),
    [
        (TEXT, "a", "b"),
        ({"question": "a", "completion": "b", "answer": "72"}, "a", "b"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, [QUESTION], "a"),
        ({"messages": [QUESTION, ANSWER]}, [QUESTION], "a"),
        ({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}, [QUESTION, ANSWER, QUESTION], "a"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, None, "a"),
        ({"messages": [QUESTION, ANSWER], "output": "b"}, [QUESTION], "b"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_texts_and_messages(tmp_path: Path, row: dict[str, Any], content: Any, response: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([row]), path)
    else:
        write(path, row)
    (found,) = read_responses(path)
    assert found.prompt is not None
    assert found.response == response
    assert content is None or found.prompt.content == content
    same, _ = read_prompts(path, answers=False)
    assert prompts_of(path, [found]) == same, "the prompts' identity is that of a prompt file"


@pytest.mark.parametrize(
    ("said", "finish"), [("stop", Finish.STOP), ("length", Finish.LENGTH), ({"type": "stop", "matched": 1}, Finish.STOP), (None, None)]
)
def test_why_it_ended(tmp_path: Path, said: Any, finish: Finish | None) -> None:
    (found,) = read_responses(write(tmp_path / "x.jsonl", IDS | {"finish_reason": said}))
    assert found.finish == finish


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ([1], "must be an object"),
        ({"prompt": "a"}, "no response"),
        ({"prompt": "a", "answer": "72"}, "'answer' is what a response is graded by"),
        ({"response": "b"}, "no field 'prompt'"),
        ({"prompt": "a", "response": 5}, "'response' must be"),
        ({"prompt": "a", "response": "b\0"}, "'response' must be the text"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "'response' and 'completion' say different things"),
        (IDS | {"prompt_ids": [5]}, "'prompt_token_ids' and 'prompt_ids' say different things"),
        (IDS | {"prompt_token_ids": [5, -1]}, "'prompt_token_ids' must be a list of token ids"),
        (IDS | {"prompt_token_ids": [5, 1.0]}, "'prompt_token_ids' must be a list of token ids"),
        (IDS | {"prompt_token_ids": [True]}, "'prompt_token_ids' must be a list of token ids"),
        (IDS | {"response_token_ids": [2**31]}, "'response_token_ids' must be a list of token ids"),
        (IDS | {"response_token_ids": "7 8"}, "'response_token_ids' must be a list of token ids"),
        (IDS | {"logprobs": [-1.0]}, "a number for each of the 3 tokens of the response, not 1"),
        (IDS | {"logprobs": {"a": 1}}, "'logprobs' must be a list"),
        (IDS | {"logprobs": [-1.0, None, -1.0]}, "'logprobs' holds None"),
        (IDS | {"logprobs": [-1.0, float("nan"), -1.0]}, "'logprobs' holds nan"),
        (IDS | {"logprobs": [-1.0, 0.5, -1.0]}, "'logprobs' holds 0.5"),
        (IDS | {"logprobs": [-1.0, -1e30, -1.0]}, "'logprobs' holds -1e\\+30"),
        (IDS | {"output_token_logprobs": [[-1.0, 7, None], [-1.0, 9, None], [-1.0, 1, None]]}, "has the token 9 where the response has 8"),
        (TEXT | {"logprobs": [-1.0]}, "needs the response's token ids"),
        (IDS | {"finish_reason": "abort"}, "'finish_reason' must be 'stop' or 'length', not 'abort'"),
        ({"messages": [QUESTION]}, "must end with one message of the assistant's"),
        ({"messages": [QUESTION, ANSWER, ANSWER]}, "must end with one message of the assistant's"),
        ({"messages": [QUESTION, ANSWER | {"reasoning": "r"}]}, "has reasoning_content; give the response as the model writes it"),
        ({"prompt": "a", "response": "b", "images": ["x"]}, "'images'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, row: Any, named: str) -> None:
    path = write(tmp_path / "x.jsonl", IDS, row)
    with pytest.raises(UserError, match=rf"x\.jsonl:2: .*{named}"):
        read_responses(path)


def test_a_field_of_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": [7, 8]})
    text, ids = read_responses(path, field="answer")
    assert text.response == "b"
    assert ids.response_ids is not None
    assert ids.response_ids.tolist() == [7, 8]
    with pytest.raises(UserError, match=r"x\.jsonl:1: no field 'reply'"):
        read_responses(path, field="reply")


def test_the_hash_covers_what_is_used(tmp_path: Path) -> None:
    with_logp = IDS | {"logprobs": [-1.0, -1.0, -1.0]}
    kinds: list[dict[str, Any]] = [IDS, TEXT, IDS | {"finish_reason": "stop"}, IDS | {"response_token_ids": [7, 1]}, with_logp]
    kinds.append(with_logp | {"logprobs": [-1.0, -1.0, -2.0]})
    hashes = [hash_responses(read_responses(write(tmp_path / "x.jsonl", row)), log_probs=True) for row in kinds]
    assert len(set(hashes)) == len(kinds)
    rows = read_responses(write(tmp_path / "x.jsonl", with_logp, IDS))
    assert hash_responses(rows[:1], log_probs=False) == hashes[0]
    with pytest.raises(UserError, match="2 rows, but num_prompts asks for 3"):
        read_responses(tmp_path / "x.jsonl", limit=3)
    with pytest.raises(UserError, match="no rows"):
        read_responses(write(tmp_path / "y.jsonl"))
