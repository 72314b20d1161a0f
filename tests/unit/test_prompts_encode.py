"""Prompt files and their encoding: faults named by file and line, and token ids exactly as the tokenizer and its template give them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_models import make_tokenizer

from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.inference import QUESTION, EncodingConfig
from megatron_opd.records import Prompt
from megatron_opd.serve.encode import describe_encoding, encode_prompt, encode_prompts, find_overlong

GOOD = b'{"prompt": "hello"}'


def write(tmp_path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(end.join(lines) + end)
    return path


def test_rows(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [{"prompt": "a", "answer": 7, "level": 3}, {"prompt": messages}, {"prompt": " \u2028é"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    identity, prompts = read_prompts(path)
    assert prompts == [Prompt(0, "a", "7", {"level": 3}), Prompt(1, messages), Prompt(2, " \u2028é")]
    assert (identity.name, identity.num_prompts) == ("p.jsonl", 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON in UTF-8: byte 0xff at column 1"),
        (b"[]", r"no field 'prompt' \(fields: list\)"),
        (b'{"query": "x", "answer": 1}', r"no field 'prompt' \(fields: query, answer\)"),
        (b'{"prompt": ""}', "'prompt' must be text or a list of {role, content} messages, not ''"),
        (b'{"prompt": null}', "must be text or a list .* not None"),
        (b'{"prompt": 5}', "must be text or a list .* not 5"),
        (b'{"prompt": []}', "must be text or a list"),
        (b'{"prompt": ["x"]}', "must be text or a list"),
        (b'{"prompt": [{"role": "user"}]}', r"prompt\[0\] has no text: a message must be"),
        (b'{"prompt": [{"role": "user", "content": null}]}', r"prompt\[0\] has no text: a message must be"),
        (b'{"prompt": "half \\ud83d"}', r"half a character \('\\ud83d'\)"),
        (b'{"prompt": [{"role": "user", "content": "\\udc00"}]}', "half a character"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str, end: bytes) -> None:
    """The line as an editor counts it, empty lines included."""
    path = write(tmp_path, GOOD, b"", b"   ", GOOD, line, GOOD, end=end)
    with pytest.raises(UserError, match=rf"prompts.jsonl:5: .*{message}"):
        read_prompts(path)


def test_half_a_character_in_a_field_that_no_model_gets(tmp_path: Path) -> None:
    _, prompts = read_prompts(write(tmp_path, b'{"prompt": "whole", "response": "half \\ud83d"}'))
    assert prompts[0].content == "whole"


def test_limit_and_identity(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}"}).encode() for i in range(5)]
    whole, prompts = read_prompts(write(tmp_path, *lines))
    first, head = read_prompts(write(tmp_path, *lines), limit=3)
    assert head == prompts[:3]
    assert (whole.num_prompts, first.num_prompts) == (5, 3)
    assert first.sha256 != whole.sha256
    # The head is the same whatever comes after it, empty lines and line ends included.
    assert read_prompts(write(tmp_path, b"", *lines, b"broken", end=b"\r\n"), limit=3)[0] == first
    assert read_prompts(write(tmp_path, *lines[1:]), limit=3)[0].sha256 != first.sha256
    with pytest.raises(UserError, match=r"5 prompts, but num_prompts asks for 6"):
        read_prompts(write(tmp_path, *lines), limit=6)


def test_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.parquet, \.arrow, \.jsonl, \.json files in it"):
        read_prompts(tmp_path / "empty")
    for path in (tmp_path / "none.jsonl", tmp_path / "prompts.jsonl" / "below"):
        write(tmp_path, GOOD)
        with pytest.raises(UserError, match=f"{path}: no such prompt file"):
            read_prompts(path)
    with pytest.raises(UserError, match="no prompts in it"):
        read_prompts(write(tmp_path, b"", b"  "))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


@pytest.fixture
def tokenizer(tokenizer_dir: Path):
    return load_tokenizer(tokenizer_dir)


def text_of(tokenizer, content, **options) -> str:
    ids = encode_prompt(tokenizer, Prompt(0, content), EncodingConfig(**options))
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    return tokenizer.decode(ids)


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        ("hi", {}, "hi"),
        ("hi", {"chat_template": "never"}, "hi"),
        ("hi", {"chat_template": "always"}, "<user>hi<assistant>"),
        ("hi", {"chat_template": "always", "system": "s"}, "<system>s<user>hi<assistant>"),
        (MESSAGES, {}, "<user>hi<assistant>"),
        (MESSAGES, {"system": "s"}, "<system>s<user>hi<assistant>"),
        (
            [*MESSAGES, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "so?"}],
            {},
            "<user>hi<assistant>yo<user>so?<assistant>",
        ),
        ("<eos>", {}, "<eos>"),
    ],
)
def test_text_and_template(tokenizer, content, options: dict, text: str) -> None:
    assert text_of(tokenizer, content, **options) == text
    assert MESSAGES == [{"role": "user", "content": "hi"}]


PUT = r"Question: {question} Answer in \boxed{} {now}."
AS_PUT = r"Question: hi Answer in \boxed{} {now}."


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        ("hi", {}, AS_PUT),
        ("hi", {"chat_template": "always", "system": "s"}, f"<system>s<user>{AS_PUT}<assistant>"),
        (
            [*MESSAGES, {"role": "assistant", "content": "yo"}, *MESSAGES],
            {},
            f"<user>hi<assistant>yo<user>{AS_PUT}<assistant>",
        ),
        ([*MESSAGES, {"role": "assistant", "content": "yo"}], {"assistant_last": "continue"}, f"<user>{AS_PUT}<assistant>yo"),
    ],
)
def test_how_a_question_is_put(tokenizer, content, options: dict, text: str) -> None:
    """Only the last question is, and other braces stay."""
    assert text_of(tokenizer, content, question=PUT, **options) == text
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@given(st.text(), st.text(), st.text())
def test_a_question_stands_as_it_is_in_the_text_around_it(before: str, after: str, question: str) -> None:
    assume(QUESTION not in before and QUESTION not in after)
    assert EncodingConfig(question=before + QUESTION + after).put(question) == before + question + after
    assert EncodingConfig().put(question) == question


def test_a_question_without_its_place_or_its_message(tokenizer) -> None:
    with pytest.raises(ValidationError, match=r"'Answer \{\}.' has no placeholder \{question\}, which the prompt is to stand for"):
        EncodingConfig(question="Answer {}.")
    with pytest.raises(UserError, match=r"prompt 0 has no user message, which encoding.question is for"):
        text_of(tokenizer, [{"role": "system", "content": "s"}], question=PUT)


def test_a_question_is_recorded_and_said(tokenizer) -> None:
    """So a store that was sampled with another one does not match."""
    config = EncodingConfig(question=PUT)
    assert config.recorded()["question"] == PUT
    assert "question" not in EncodingConfig().recorded()
    assert describe_encoding(tokenizer, [Prompt(0, MESSAGES)], config) == [f"questions are put to the model as {PUT!r}"]
    recipe = load_recipe("tiny", [f"rollout.encoding.question={PUT}"])
    assert recipe.rollout is not None
    assert recipe.rollout.encoding.question == PUT


def test_enable_thinking_reaches_the_template(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0].content }} {% if enable_thinking is defined %}{{ enable_thinking }}{% else %}none{% endif %}"
    assert [text_of(tokenizer, MESSAGES, enable_thinking=value) for value in (None, True, False)] == ["hi none", "hi True", "hi False"]


def test_special_tokens_come_once(tokenizer_dir: Path) -> None:
    """A tokenizer that puts a token before every text must not do so before the template's text, which has its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<extra> $A", special_tokens=[("<extra>", 2)])
    assert encode_prompt(tokenizer, Prompt(0, "hi"), EncodingConfig())[0] == 2
    assert 2 not in encode_prompt(tokenizer, Prompt(0, MESSAGES), EncodingConfig())


@pytest.mark.parametrize(
    ("content", "options", "template", "message"),
    [
        (MESSAGES, {"chat_template": "never"}, None, r"prompt 4 is a list of messages, but encoding.chat_template is 'never'"),
        ("hi", {"system": "s"}, None, "encoding.system needs the chat template"),
        ("hi", {"enable_thinking": False}, None, "encoding.enable_thinking needs the chat template"),
        (MESSAGES, {}, "", r"prompt 4: the chat template does not print the content of message 0 \(user\), 'hi'"),
        ([{"role": "user", "content": ""}], {}, "", "prompt 4 has no tokens"),
        (MESSAGES, {}, "{{ raise_exception('no such role') }}", "prompt 4: the chat template of .* refuses it: no such role"),
        (MESSAGES, {}, "{% if %}", "prompt 4: the chat template of .* refuses it"),
    ],
)
def test_what_can_not_be_encoded(tokenizer, content, options: dict, template: str | None, message: str) -> None:
    if template is not None:
        tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        encode_prompt(tokenizer, Prompt(4, content), EncodingConfig(**options))


def test_no_chat_template(tokenizer) -> None:
    tokenizer.chat_template = None
    assert text_of(tokenizer, "hi") == "hi"
    for content, options in ((MESSAGES, {}), ("hi", {"chat_template": "always"})):
        with pytest.raises(UserError, match=r"the tokenizer has no chat template; .*encoding.chat_template='never'"):
            text_of(tokenizer, content, **options)


def test_overlong_prompts(tokenizer) -> None:
    prompts = [Prompt(10 + i, "x" * length) for i, length in enumerate((3, 8, 2, 12, 7))]
    skip = EncodingConfig(overlong_prompt="skip")
    encoded = encode_prompts(tokenizer, prompts, skip)
    assert [len(ids) for ids in encoded] == [3, 8, 2, 12, 7]
    assert find_overlong(encoded, prompts, skip, max_tokens=7) == [1, 3]
    with pytest.raises(
        UserError, match=r"2 prompt\(s\) are longer than the 7 tokens .* \(rows 11, 13; longest 12\); .*overlong_prompt='skip'"
    ):
        find_overlong(encoded, prompts, EncodingConfig(), max_tokens=7)
    assert find_overlong(encoded, prompts, EncodingConfig(), max_tokens=12) == []
    for most, wanted in ((2, [0, 1, 3, 4]), (100, [1, 3])):
        limited = EncodingConfig(overlong_prompt="skip", max_prompt_tokens=most)
        assert find_overlong(encoded, prompts, limited, max_tokens=7) == wanted


def make_adding_tokenizer(directory: Path, single: str):
    """A byte-level tokenizer with <s> (3) and </s> (1) that writes `single` around texts."""
    from tokenizers.processors import TemplateProcessing

    make_tokenizer(directory, extra_token="<s>")
    tokenizer = load_tokenizer(directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("<eos>", 1)])
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(directory)
    return load_tokenizer(directory)


BOS, EOS = 2, 1


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A <eos>", "$A <eos>", "$A"])
def test_a_prompt_begins_once_and_does_not_end(tmp_path: Path, single: str) -> None:
    """What the tokenizer puts behind a text would end the prompt's turn; what stands before it already is not put there again."""
    tokenizer = make_adding_tokenizer(tmp_path, single)
    assert (tokenizer("hi")["input_ids"][-1] == EOS) == single.endswith("<eos>")
    first = [BOS] if single.startswith("<s>") else []
    letters = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, Prompt(0, "hi"), EncodingConfig()).tolist() == first + letters
    assert encode_prompt(tokenizer, Prompt(0, "<s>hi"), EncodingConfig()).tolist() == [BOS, *letters]
    assert encode_prompt(tokenizer, Prompt(0, "<s>"), EncodingConfig()).tolist() == [BOS]
    # What the text itself says stays, also its end and what stands within.
    assert encode_prompt(tokenizer, Prompt(0, "hi<eos>"), EncodingConfig()).tolist() == [*first, *letters, EOS]
    assert encode_prompt(tokenizer, Prompt(0, "hi<s>hi"), EncodingConfig()).tolist() == [*first, *letters, BOS, *letters]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_prompt(tokenizer, Prompt(0, [{"role": "user", "content": "hi"}]), EncodingConfig()).tolist() == [BOS, *letters]


def test_a_tokenizer_that_puts_several_tokens_before_a_text(tmp_path: Path) -> None:
    tokenizer = make_adding_tokenizer(tmp_path, "<s> <eos> $A <eos>")
    letters = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, Prompt(0, "hi"), EncodingConfig()).tolist() == [BOS, EOS, *letters]
    assert encode_prompt(tokenizer, Prompt(0, "<s><eos>hi"), EncodingConfig()).tolist() == [BOS, EOS, *letters]


def test_llama_tokenizers_that_add_bos_and_eos(tmp_path: Path) -> None:
    """A SentencePiece-style tokenizer: a space before each text, tokens added by add_bos_token and add_eos_token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaTokenizerFast

    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "\u2581", "h", "i", "a", "\u2581hi"])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Replace("\u2581", " ")
    tokenizer = LlamaTokenizerFast(
        tokenizer_object=backend, add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    full = tokenizer("hi")["input_ids"]
    assert (full[0], full[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert encode_prompt(tokenizer, Prompt(0, "hi"), EncodingConfig()).tolist() == full[:-1]
    once = encode_prompt(tokenizer, Prompt(0, "<s>hi"), EncodingConfig()).tolist()
    assert (once.count(tokenizer.bos_token_id), once.count(tokenizer.eos_token_id), once[0]) == (1, 0, tokenizer.bos_token_id)
