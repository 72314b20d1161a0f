"""Rows of prompt files: every spelling of a conversation is read, what is not known is refused by file, row and field, and answers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.records import Prompt


def read_row(tmp_path: Path, row: Any) -> Prompt:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return read_prompts(path)[1][0]


def refused(tmp_path: Path, row: Any) -> str:
    with pytest.raises(UserError) as error:
        read_row(tmp_path, row)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/p.jsonl:1: ")
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/p.jsonl:1: ")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"conversations": [{"from": "Human", "value": "hi"}, {"from": "ChatGPT", "value": "yo"}]}, [user("hi")]),
        ({"conversations": [{"from": "USER", "value": "hi"}, {"from": "bard", "value": "yo"}, {"from": "prompter", "value": "a"}]},
         [user("hi"), {"role": "assistant", "content": "yo"}, user("a")]),
        ({"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
         [{"role": "assistant", "content": "Hello!"}, user("hi")]),
        ({"prompt": [{"role": "developer", "content": "in French"}, user("hi")]}, [{"role": "developer", "content": "in French"}, user("hi")]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}]}]}, [user("a b")]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": None, "cache_control": {"type": "x"}}]}]}, [user("a")]),
        ({"prompt": [{"role": "user", "from": "human", "content": "hi", "value": "hi", "name": "Ada", "weight": 0, "id": "x", "refusal": None}]},
         [{**user("hi"), "name": "Ada"}]),
        ({"conversations": [{"from": "human", "value": "1+2"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": [2]}}'},
                            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Three."}]},
         [user("1+2"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]),
        ({"messages": [user("1+2"), {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "index": 0,
                                     "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}]},
                       {"role": "tool", "tool_call_id": "c1", "content": "3"}]},
         [user("1+2"), {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
          {"role": "tool", "content": "3", "tool_call_id": "c1"}]),
        ({"messages": [user("1+2"), {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}},
                       {"role": "function", "name": "add", "content": "3"}]},
         [user("1+2"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3", "name": "add"}]),
        ({"prompt": [user("a"), {"role": "assistant", "content": "b", "reasoning": "r", "tool_calls": []}, user("c")]},
         [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}, user("c")]),
        ({"messages": json.dumps([user("hi"), {"role": "assistant", "content": "yo"}])}, [user("hi")]),
        ({"conversations": [{"from": "human", "value": "1+2"}, {"from": "function-call", "value": '[{"name": "add", "parameters": {"a": 1, "b": [2]}}]'},
                            {"from": "Function Response", "value": ""}]},
         [user("1+2"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": ""}]),
        # An answer that is left out may be of any kind.
        ({"messages": [user("hi"), {"role": "assistant", "content": None, "audio": {"id": "x"}}]}, [user("hi")]),
        ({"system": "Be brief.", "conversations": [{"from": "human", "value": "hi"}]}, [{"role": "system", "content": "Be brief."}, user("hi")]),
        ({"system": "Be brief.", "prompt": "hi"}, [{"role": "system", "content": "Be brief."}, user("hi")]),
        ({"system": "s", "prompt": [{"role": "system", "content": "s"}, user("hi")]}, [{"role": "system", "content": "s"}, user("hi")]),
        ({"system": "", "prompt": "hi"}, "hi"),
        ({"prompt": None, "problem": "p"}, "p"),
        ({"prompt": "", "messages": [], "question": "q"}, "q"),
        ({"prompt": "hi", "messages": [user("hi"), {"role": "assistant", "content": "yo"}]}, "hi"),
        ({"prompt": [user("Solve: p")], "problem": "p"}, [user("Solve: p")]),
        ({"prompt": "[1, 2]"}, "[1, 2]"),
        ({"prompt": '[{"role": "x"}] is what?'}, '[{"role": "x"}] is what?'),
    ],
)  # fmt: skip
def test_spellings(tmp_path: Path, row: dict[str, Any], content: Any) -> None:
    assert read_row(tmp_path, row).content == content


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "critic", "value": "hi"}]}, "conversations[0] has the role 'critic', which is not known; known are system"),
        ({"prompt": [user("a"), {"role": "user", "content": "b", "images": ["x.png"]}]}, "prompt[1]: nothing is known of the field 'images' of a user"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "prompt[0]: the content has a part of type 'image_url'"),
        ({"prompt": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "a part of type 'input_audio'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "x.png"}]}]}, "a text part with the fields text, image"),
        ({"prompt": [{"role": "user", "content": ["hi"]}]}, "a part of type \"'hi'\""),
        ({"prompt": [{"role": "user", "content": {"text": "hi"}}]}, "the content must be text or a list of text parts"),
        ({"prompt": [{"role": "user", "content": "a", "value": "b"}]}, "prompt[0] has different 'content' and 'value'; keep one"),
        ({"prompt": [{"role": "user", "content": "a", "reasoning_content": "r"}]}, "nothing is known of the field 'reasoning_content' of a user message"),
        ({"prompt": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "nothing is known of the field 'tool_calls' of a user message"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": "{"}]}, user("b")]}, "prompt[1]: arguments of 'add': not JSON"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": [1]}]}]}, "the arguments of 'add' must be an object"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}]}, "prompt[1]: a tool call must be {name, arguments}"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "", "tool_calls": [{**CALL, "result": "3"}]}]}, "prompt[1]: a tool call must be"),
        ({"prompt": [user("a"), {"role": "function_call", "content": "I call add."}]}, "prompt[1] (a tool call by its role): not JSON"),
        ({"prompt": "a", "messages": [user("b")]}, "'prompt' and 'messages' say different things; keep one"),
        ({"problem": "a", "question": "b"}, "'problem' and 'question' say different things"),
        ({"messages": "hi"}, "'messages' must be a list of messages or their JSON text: not JSON"),
        ({"prompt": user("hi")}, "'prompt' must be text or a list of {role, content} messages, not {'role'"),
        ({"prompt": json.dumps([user("hi")])}, "'prompt' is a text that holds a list of messages, as JSON or Python write it"),
        ({"prompt": str([user("hi")])}, "'prompt' is a text that holds a list of messages"),
        ({"problem": json.dumps([user("hi")], indent=1)}, "'problem' is a text that holds a list of messages"),
        ({"prompt": "hi", "system": ["s"]}, "'system' must be text"),
        ({"prompt": [{"role": "system", "content": "a"}, user("hi")], "system": "b"}, "'system' is 'b', but 'prompt' begins with the system message 'a'"),
        ({"prompt": "a\0b"}, "'prompt' or its tools hold a NUL character"),
        ({"prompt": "hi", "tools": [{"type": "function"}]}, "tools[0] must be the schema of a function with a name"),
        ({"prompt": "hi", "tools": "{"}, "'tools': not JSON"),
        ({"prompt": "hi", "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, "has both 'tools' and 'functions'"),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, "'conversations' must be text or a list of {role, content} messages that holds more than the answer"),
        ({"prompt": float("nan")}, "'prompt' must be text or a list of {role, content} messages, not nan"),
        ({"prompt": [user("a"), {"role": "function_call", "content": "[]"}, user("b")]}, "prompt[1] is a tool call by its role, and holds none"),
        ({"prompt": [user("a"), {"role": "assistant", "tool_calls": "[]"}, user("b")]}, "prompt[1] has no text: a message must be {role, content}"),
        ({"prompt": [user("<image>What is it?")], "images": [{"bytes": "x"}]}, "has 'images' ([{'bytes': 'x'}]), which is not understood and the model"),
        ({"prompt": "hi", "chat_template_kwargs": {"enable_thinking": False}}, "has 'chat_template_kwargs'"),
        ({"x" * 1000: 1}, "xxx); messages, conversations, problem, question, instruction would do as well"),
        ("just text", "no field 'prompt' (fields: str)"),
        (7, "no field 'prompt' (fields: int)"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    assert message in refused(tmp_path, row)


def test_tools_belong_to_the_prompt(tmp_path: Path) -> None:
    schema = {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}},
    }
    wrapped = [{"type": "function", "function": schema}]
    given = [wrapped, [schema], json.dumps([schema]), [json.dumps(schema)], schema, [{"type": "function", **schema}]]
    assert [read_row(tmp_path, {"prompt": "hi", "tools": tools}).tools for tools in given] == [wrapped] * len(given)
    assert read_row(tmp_path, {"prompt": "hi", "functions": [schema], "k": 1}) == Prompt(0, "hi", None, {"k": 1}, wrapped)
    assert [read_row(tmp_path, {"prompt": "hi", "tools": tools}).tools for tools in (None, [], "", "[]", "null")] == [None] * 5
    path = tmp_path / "p.jsonl"
    read_row(tmp_path, {"prompt": "hi", "tools": wrapped})
    with_tools = read_prompts(path)[0].sha256
    read_row(tmp_path, {"prompt": "hi"})
    assert read_prompts(path)[0].sha256 != with_tools


def test_parquet_fills_in_nulls_for_what_a_row_does_not_have(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                user("1+2"),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "3", "tool_call_id": "c"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}],
        },
        {
            "messages": [{"role": "user", "content": "hi", "name": "Ada"}],
            "tools": [{"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "string"}}}}}],
        },
        {"messages": [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}, user("c")]},
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.PARQUET")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_parquet, from_json = read_prompts(tmp_path / "p.PARQUET"), read_prompts(tmp_path / "p.jsonl")
    assert [(p.content, p.tools) for p in from_parquet[1]] == [(p.content, p.tools) for p in from_json[1]]
    assert from_parquet[0].sha256 == from_json[0].sha256
    assert from_parquet[1][1].content == [{**user("hi"), "name": "Ada"}]
    # Parts of one type for all, and a map in place of a struct.
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.binary())])
    column = pa.array(
        [[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]],
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))])),
    )
    pa.parquet.write_table(pa.table({"prompt": column}), tmp_path / "parts.parquet")
    as_map = pa.array([[[("role", "user"), ("content", "hi")]]], pa.list_(pa.map_(pa.string(), pa.string())))
    pa.parquet.write_table(pa.table({"prompt": as_map}), tmp_path / "map.parquet")
    for name in ("parts", "map"):
        assert read_prompts(tmp_path / f"{name}.parquet")[1][0].content == [user("hi")]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("7", "7"), (7, "7"), (["2"], "2"), ([2.50], "2.5"), ([], None), ([None], None), (None, None), ("", None), (" \n", None), (float("nan"), None),
        ("48/2 = <<48/2=24>>24\n#### 72", "72"), ("so 1,200\n#### 1,200 ", "1,200"), ("x #### -3.5", "-3.5"), ("#### Heading\ntext\nmore", "#### Heading\ntext\nmore"),
        ("nan", "nan"), ("None", "None"), (10**30, "1" + "0" * 30), (" 7 ", " 7 "),
    ],
)  # fmt: skip
def test_answers(tmp_path: Path, answer: Any, text: str | None) -> None:
    assert read_row(tmp_path, {"prompt": "q", "answer": answer}).answer == text
    assert read_row(tmp_path, {"prompt": "q", "reward_model": {"ground_truth": answer}}).answer == text


def test_numbers_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for written in ("2.0", "2", "0.10", "1e3", "1200000000000000000000.0", "-0.5"):
        for line in (f'{{"prompt": "q", "answer": {written}}}', f'[{{"prompt": "q", "answer": [{written}]}}]'):
            path.write_text(line)
            assert read_prompts(path)[1][0].answer == written
    table = pa.table({"prompt": ["a", "b", "c"], "answer": pa.array([2.0, None, 2.5], pa.float64())})
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    assert [prompt.answer for prompt in read_prompts(tmp_path / "p.parquet")[1]] == ["2", None, "2.5"]
    narrow = pa.array([0.1], pa.float32())
    for answer, text in (
        (pa.array([Decimal("2.50")]), "2.50"),
        (narrow, "0.1"),
        (pa.array([7], pa.uint64()), "7"),
        (pa.array([[2.0]]), "2"),
    ):
        moment = pa.array([1], pa.timestamp("ns"))  # as pandas writes them
        pa.parquet.write_table(pa.table({"prompt": ["a"], "answer": answer, "seen": moment}), tmp_path / "p.parquet")
        assert read_prompts(tmp_path / "p.parquet")[1][0].answer == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": ["2", "3"]}, "'answer' has 2 elements"),
        ({"answer": True}, "'answer' must be text or a number, not True; write the text that the model is to give"),
        ({"answer": {"value": 2}}, "'answer' must be text or a number, not {'value': 2}"),
        ({"answer": float("inf")}, "'answer' must be text or a number, not inf"),
        ({"answer": "some\n####"}, "'answer' has nothing behind its '####'"),
        ({"answer": "3", "reward_model": {"ground_truth": "4"}}, "answer '3' and reward_model.ground_truth '4' differ"),
        ({"reward_model": {"ground_truth": [1, 2]}}, "'reward_model.ground_truth' has 2 elements"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    """They are refused where answers are used; who samples does not look at them."""
    assert message in refused(tmp_path, {"prompt": "q", **row})
    assert read_prompts(tmp_path / "p.jsonl", answers=False)[1][0].answer is None


def test_an_answer_is_no_part_of_what_is_sampled(tmp_path: Path) -> None:
    read_row(tmp_path, {"prompt": "q"})
    identity = read_prompts(tmp_path / "p.jsonl")[0]
    # Stores made when the answer was hashed still match prompts that have none.
    assert identity.sha256 == hashlib.sha256(b'["q", null]\n').hexdigest()
    for row in ({"prompt": "q", "answer": "1"}, {"prompt": "q", "answer": ["1"]}, {"prompt": "q", "other": 1}):
        read_row(tmp_path, row)
        assert read_prompts(tmp_path / "p.jsonl")[0] == identity


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "f\xfcr"}\n', "p.jsonl:1: not JSON in UTF-8: byte 0xfc at column 14 (Latin-1?); convert it"),
        ('{"prompt": "für"}\n'.encode("utf-16"), "p.jsonl: is in UTF-16; convert it"),
        ('{"prompt": "für"}\n'.encode("utf-16-le"), "p.jsonl:1: not JSON"),
        (b'{"prompt": "a"}\n\0\0\0\0', "p.jsonl:2: not JSON: holds NUL bytes"),
        (b'{"prompt": "a", "prompt": "b"}', "p.jsonl:1: not JSON: the key 'prompt' is there twice"),
        (b'{"prompt": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' is there twice"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "p.jsonl:1: nested more than 100 levels deep"),
        (b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "p.jsonl:1: nested more than 100 levels deep"),
        (b'{"prompt": "a", "tools": "' + b"[" * 100_000 + b'"}', "p.jsonl:1: 'tools': nested more than 100 levels deep"),
        (b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}", "p.jsonl:1: not JSON: Exceeds the limit"),
        (b'[{"prompt": "a"}]', "no field 'prompt' (fields: list)"),
        (b'{"prompt": "a"} {"prompt": "b"}', "p.jsonl:1: not JSON: Extra data"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "p.jsonl: is compressed with gzip"),
        (b"", "p.jsonl: no prompts in it"),
        (b"\xef\xbb\xbf", "p.jsonl: no prompts in it"),
    ],
)  # fmt: skip
def test_files_that_are_not_json_lines(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_files_that_are(tmp_path: Path) -> None:
    for name, data in (
        ("bom.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n'),
        ("upper.JSONL", b'{"prompt": "a"}\n{"prompt": "b"}'),
        ("lines.json", b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("array.JSON", b'\xef\xbb\xbf [\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n'),
        ("no_suffix", b'{"prompt": "a"}\n{"prompt": "b"}'),
        ("braces.jsonl", json.dumps({"prompt": "a", "x": ["{"] * 200 + [[[]]]}).encode() + b'\n{"prompt": "b"}'),
    ):
        (tmp_path / name).write_bytes(data)
        assert [prompt.content for prompt in read_prompts(tmp_path / name)[1]] == ["a", "b"], name
    for name, data, message in (
        ("array.json", b'[{"prompt": "a"}, 7]', r"array.json, row 2: no field 'prompt' \(fields: int\)"),
        ("pretty.json", b'{\n  "prompt": "a"\n}', "pretty.json:1: not JSON"),
        ("p.jsonl.gz", b"", "p.jsonl.gz: compressed files are not read; unpack it"),
        (
            "table.CSV",
            b"prompt,answer\na,1\n",
            r"table.CSV: \.csv files are not read; a JSONL or Parquet file or a dataset's folder is expected",
        ),
        ("empty.parquet", b"", "empty.parquet: can't be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)
    pa.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no prompts in it"):
        read_prompts(tmp_path / "none.parquet")
    for path in ("nul\0.jsonl", "nul\0.parquet"):
        with pytest.raises(UserError, match=r"no name of a file"):
            read_prompts(path)


def test_prompts_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "für"}\n'.encode())
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_bytes('{"splits": ["für"]}'.encode())
    code = (
        "import sys; from megatron_opd.data.prompts import read_prompts; from megatron_opd.errors import UserError\n"
        "print(ascii(read_prompts(sys.argv[1])[1][0].content))\n"
        "try: read_prompts(sys.argv[2])\nexcept UserError as error: print(ascii(str(error))[-30:])"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "p.jsonl", saved], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert out.splitlines()[0] == "'f\\xfcr'"
    assert "saved/f\\xfcr" in out.splitlines()[1]
