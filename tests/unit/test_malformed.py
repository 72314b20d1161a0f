"""What others wrote and is malformed ends every command with code 2 and an error, in bounded time: no traceback, no wait, no control character."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHATML, make_instruct, make_model

from megatron_opd.cli import main
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import LINEAGE_FILE, SHARD_INDEX, load_tokenizer, read_lineage, tensor_index
from megatron_opd.hf.turns import own_stop_ids, render
from megatron_opd.recipe.inference import EncodingConfig, EngineConfig
from megatron_opd.records import Prompt
from megatron_opd.safety import confined
from megatron_opd.safety.confined import run_confined
from megatron_opd.serve.encode import encode_prompts
from megatron_opd.serve.transformers_engine import TransformersEngine

DEEP = "[" * 100_000
MINIMAL = 'name = "mine"\nrun_dir = "run"\n[models]\nteacher = "teacher"\nstudent = "student"\n'


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that must end with 2; one line, with those that belong to it indented."""
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as error:  # argparse
        code = error.code
    printed = capsys.readouterr()
    assert code == 2, printed
    message = printed.err.partition("error: ")[2]
    assert message
    assert all(line.startswith("  ") for line in message.rstrip().split("\n")[1:])
    assert not any(ord(character) < 32 for character in (printed.out + printed.err).replace("\n", ""))
    assert max(map(len, message.split("\n"))) < 2500
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "[train]\nlr = " + DEEP, "nested more than"),
        (MINIMAL + "[train]\nlr = " + "{a=" * 5000 + "1" + "}" * 5000, "nested more than"),
        (MINIMAL + "[" + ".".join("a" * 5000) + "]\n", "nested more than"),
        (MINIMAL.replace('"run"', '"r\\u0000n"'), "NUL"),
        (MINIMAL.replace('"run"', '"' + "r" * 5000 + '"'), "File name too long"),
        (MINIMAL.replace('"mine"', '"\\u001b[31m"'), r"\\x1b\[31m"),
        (MINIMAL + "[train]\nseed = 0x" + "f" * 6000, "more than 300 digits"),
        (MINIMAL + "[train]\nseed = " + "9" * 5000, "digits"),
        (MINIMAL + "[train]\nlr = 1e400", "train.lr"),
        (MINIMAL + "[train.parallel]\ntp = 10000000000", "train.parallel.tp"),
        (MINIMAL + "[train.parallel.x]\ny = 1", "no such field"),
        ('name = "mine"\nmodels = [1]', "models"),
        ("\xff", "byte|not TOML"),
    ],
)
def test_recipes(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(text, "latin-1")
    message = refused(capsys, "progress", "mine.toml")
    assert re.search(said, message), message


@pytest.mark.parametrize(
    "words",
    [
        [f"train.lr={DEEP}"],
        [f"train.lr={'[' * 20}"],
        ["train.lr=" + "{a=" * 9000],
        [".".join("a" * 9000) + "=1"],
        ["run_dir=a\0b"],
        ['run_dir="a\\u0000b"'],
        ["run_dir=\udce9"],
        ["train.lr=0x" + "f" * 6000],
        ["train.lr=" + "9" * 5000],
        ["generate.sampling.samples_per_prompt=1000000000"],
        ["generate.sampling.temperature=1e-320"],
        ["engine.timeout=1e300"],
        ["train.global_batch=1000000000000000"],
        ["eval.held_out.num_prompts=" + "1" + "0" * 30],
        ["--stage", "\x1b[31m"],
        ["\x1b[31m"],
    ],
)
def test_overrides_and_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "progress", "tiny", *words)


@pytest.mark.parametrize("command", [["progress"], ["inspect"], ["show"], ["report"], ["convert", "to-mcore"], ["convert", "to-hf"]])
@pytest.mark.parametrize("name", ["a\0b", "r" * 5000, "\udce9", "/dev/zero", "{fifo}", "{loop}"])
def test_paths_of_no_file(command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    target = [str(tmp_path / "target")] * (command[0] == "convert")
    refused(capsys, *command, name.format(fifo=tmp_path / "fifo", loop=tmp_path / "loop"), *target)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_instruct(tmp_path_factory.mktemp("whole") / "teacher", layers=1)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, str) else json.dumps(header)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + raw[8 + length :])


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def shift(header: dict[str, Any], by: int) -> None:
    header[NORM]["data_offsets"] = [offset + by for offset in header[NORM]["data_offsets"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: "[]",
        lambda h: DEEP,
        lambda h: json.dumps(h)[:-1] + f', "{NORM}": {json.dumps(h[NORM])}}}',
        lambda h: h.update({"__metadata__": 5}),
        lambda h: h.update({NORM: [1]}),
        lambda h: h.pop(NORM),  # its bytes belong to nobody
        lambda h: h[NORM].pop("dtype"),
        lambda h: h[NORM].update(dtype=5),
        lambda h: h[NORM].update(shape=[10**18, 10**18]),
        lambda h: h[NORM].update(shape=[-1]),
        lambda h: h[NORM].update(shape=5),
        lambda h: h[NORM].update(shape=[True, 32]),
        lambda h: h[NORM].update(data_offsets=[0, 10**30]),
        lambda h: h[NORM].update(data_offsets=[0]),
        lambda h: h[NORM].update(data_offsets="ab"),
        lambda h: h[NORM].update(data_offsets=[0, 128]),  # on another's bytes
        lambda h: shift(h, 4),
        lambda h: shift(h, -4),
    ],
)
def test_headers_of_weights(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    assert tensor_index(model)
    rewrite_header(model, change)
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file \(.+\); copy or convert it again") as caught:
        tensor_index(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 8, (1 << 63).to_bytes(8, "little") + b"{}", bytes(8), b"\x02" + bytes(7) + b"{}x"]
)
def test_weights_that_are_none(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        tensor_index(model)


@pytest.mark.parametrize("text", ["[]", "5", DEEP, "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../x"}}'])
def test_shard_indices(model: Path, text: str) -> None:
    (model / SHARD_INDEX).write_text(text)
    with pytest.raises(UserError, match=str(model)):
        tensor_index(model)


@pytest.mark.parametrize("text", ["[]", DEEP, "{}", '{"lineage": 5}', '{"lineage": {}, "weights_sha256": 5}', '{"lineage": {"base": [1]}}'])
def test_lineage_files(model: Path, text: str) -> None:
    (model / LINEAGE_FILE).write_text(text)
    with pytest.raises(UserError, match=LINEAGE_FILE) as caught:
        read_lineage(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "no model has more than 10000"),
        ("num_hidden_layers", 9999, "all the weights have"),
        ("vocab_size", 10**8, "all the weights have"),
        ("hidden_size", 2**31 - 1, "all the weights have"),
        ("vocab_size", 10**30, "no model has more than"),
        ("vocab_size", "272", "vocab_size is '272'"),
        ("max_position_embeddings", 10**400, "300 digits"),
        ("max_position_embeddings", -1, "max_position_embeddings"),
        ("rope_theta", 1e400, "rope_theta"),
    ],
)
def test_sizes_of_a_config(model: Path, field: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything makes room for them: engines would for what they read."""
    config = json.loads((model / "config.json").read_text())
    text = json.dumps({**config, field: value} | ({"rope_parameters": None} if field == "rope_theta" else {}))
    (model / "config.json").write_text(text)
    assert said in refused(capsys, "convert", "to-mcore", str(model), str(tmp_path / "out"))
    with pytest.raises(UserError, match=re.escape(said)):
        TransformersEngine(EngineConfig(kind="transformers"), model)


@pytest.mark.parametrize("value", ["5", '"2"', "[[1]]", "true", "-1", "1" + "0" * 30, "{}", "[1.0]"])
def test_stop_ids_that_are_none(model: Path, value: str) -> None:
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    if value == "5":
        assert 5 in own_stop_ids(model)
        return
    with pytest.raises(UserError, match="no valid end-of-turn ids"):
        own_stop_ids(model)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_files_of_a_tokenizer_that_are_none(model: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=rf"{name}: not a file"):
        load_tokenizer(model)
    (model / name).unlink()
    if name != "chat_template.jinja":
        (model / name).write_text(DEEP)
        with pytest.raises(UserError) as caught:
            own_stop_ids(model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 0.3 s"),
        ("{{ 9**(9**(9**9)) }}", "it takes more than 0.3 s"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        (
            "{% set n = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "MemoryError|more than 0.3 s",
        ),
        ("{{ 'a' * 10**7 }}", "a text of 10000000 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ lipsum.__globals__['os'] }}", "unsafe|undefined"),
        ("{{ a.b.c }}", "undefined"),
        ("{{ raise_exception('one\nline') }}", "refuses it: one"),
        ("{% if %}", "Expected an expression"),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "refuses it|ended with code"),
        ("{{ '\\ud800' }}", "half a character"),
    ],
)
def test_chat_templates(whole: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.3)
    tokenizer = load_tokenizer(whole)
    tokenizer.chat_template = template
    for _ in range(2):  # the second time without running what had to be ended
        with pytest.raises(UserError, match=said) as caught:
            render(tokenizer, [{"role": "user", "content": "hi"}], EncodingConfig())
        assert "\n" not in str(caught.value)


def test_a_template_that_loops_at_one_prompt(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.3)
    tokenizer = load_tokenizer(whole)
    tokenizer.chat_template = "{% if 'loop' in messages[0].content %}{% set n = messages|length + 8 %}{{ n**(n**n) }}{% endif %}" + CHATML
    prompts = [Prompt(number, [{"role": "user", "content": text}]) for number, text in enumerate(("a", "b", "loop", "c"))]
    assert len(encode_prompts(tokenizer, prompts[:2], EncodingConfig())) == 2
    with pytest.raises(UserError, match=r"was ended at prompt 2: it takes more than 0\.3 s"):
        encode_prompts(tokenizer, prompts, EncodingConfig())


def test_what_runs_confined() -> None:
    def crash(item: int) -> str:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return str(item)

    assert list(run_confined(str, range(1000), str)) == [str(number) for number in range(1000)]
    results = run_confined(crash, [0, 1], lambda item: f"item {item}")
    assert next(results) == "0"
    with pytest.raises(UserError, match="item 1: its process ended with code -9"):
        next(results)
    assert next(run_confined(lambda item: next(run_confined(str, [item], str)), [7], str)) == "7"


def test_special_files_among_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = make_model(tmp_path / "student", layers=1)
    for number, name in enumerate(("p.jsonl", "p.json", "p.parquet", "p.arrow", "dataset_dict.json", "state.json")):
        folder = tmp_path / str(number)
        folder.mkdir()
        os.mkfifo(folder / name)
        settings = [f"models.teacher={student}", f"models.student={student}", f"generate.prompts={folder}", f"run_dir={tmp_path / 'run'}"]
        refused(capsys, "generate", "tiny", *settings)


def test_special_files_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval" / "maths").mkdir(parents=True)
    (tmp_path / "opd").mkdir()
    for name in ("eval/maths/opd.json", "opd/metrics.jsonl", "stages.jsonl"):
        os.mkfifo(tmp_path / name)
    refused(capsys, "report", str(tmp_path))
