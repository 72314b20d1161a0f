"""Tokenizers read text as tokenizer.json says, whatever class transformers makes of it; two of them are compared by what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from unit.store_parts import fake_fingerprint

from megatron_opd.data.vocabulary import Vocabulary
from megatron_opd.errors import LineageError, StoreError, UserError
from megatron_opd.hf.tokenizer import PROBE, check_rows, check_same_tokenizer, fingerprint_tokenizer, load_tokenizer
from megatron_opd.records import ModelFingerprint, TokenizerFingerprint


def directory(folder: Path, model_type: str = "qwen3", **fields: Any) -> Path:
    """A byte-level tokenizer beside a config of `model_type`; `fields` go into tokenizer_config.json."""
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    "declared",
    ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "Abacus", None],
)
def test_text_is_read_as_the_file_says(tmp_path: Path, model_type: str, declared: str | None) -> None:
    """Every byte has an id, and 5.x makes of these files classes that lose spaces (LlamaTokenizer) or compose accents (Qwen2Tokenizer)."""
    tokenizer = load_tokenizer(directory(tmp_path, model_type, tokenizer_class=declared))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in PROBE:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == own.encode(text, add_special_tokens=False).ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.eos_token_id, tokenizer.chat_template is not None) == (1, True)


def test_a_class_that_reads_otherwise_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = directory(tmp_path, tokenizer_class="Qwen2TokenizerFast")
    for _ in range(2):
        load_tokenizer(folder)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for said in (
        str(folder),
        "makes a Qwen2Tokenizer of it",
        "tokenizer_class = 'Qwen2TokenizerFast'",
        "tokenizers ",
        "as tokenizer.json says",
    ):
        assert said in out


def test_a_reading_that_nothing_mends_is_refused(tmp_path: Path) -> None:
    """A token that tokenizer_config.json adds and tokenizer.json doesn't have, in the plain class too."""
    token = {"content": "fox", "special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    folder = directory(tmp_path, tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder={"259": token})
    with pytest.raises(
        UserError, match=r"tokenizer_class = 'PreTrainedTokenizerFast' in .*, which reads 'The quick brown fox .*' otherwise than"
    ):
        load_tokenizer(folder)


def test_no_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"no tokenizer in it \(tokenizer.json\); copy the tokenizer files") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


MERGES = (("t", "h"), ("h", "e"), ("1", "2"))


def fingerprint(
    folder: Path,
    *,
    added: dict[str, bool] | None = None,
    merges: tuple[tuple[str, str], ...] = MERGES,
    split: Any = None,
    normal: Any = None,
) -> ModelFingerprint:
    """Of a model whose tokenizer has the bytes and three pairs; `added` tokens (special or not) come after them."""
    vocab = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {first + second: len(vocab) + number for number, (first, second) in enumerate(MERGES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normal is not None:
        tokenizer.normalizer = normal
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token, special in ({"<eos>": True} | (added or {})).items()]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(str(folder))
    return fake_fingerprint(folder.name).model_copy(update={"tokenizer": fingerprint_tokenizer(folder), "vocab_size": 300})


def test_one_tokenizer_is_the_other_with_more_added_tokens(tmp_path: Path) -> None:
    plain, more = fingerprint(tmp_path / "plain"), fingerprint(tmp_path / "more", added={"<think>": False, "<call>": True})
    assert check_same_tokenizer(plain, plain) == {}
    assert check_same_tokenizer(plain, more) == check_same_tokenizer(more, plain) == {260: "<think>", 261: "<call>"}
    other = fingerprint(tmp_path / "other", added={"<call>": True})
    with pytest.raises(LineageError, match=r"the ids of added tokens clash \('<call>', '<think>'\)"):
        check_same_tokenizer(more, other)
    known = Vocabulary("student s", 300, check_same_tokenizer(plain, more))
    known.check(np.array([0, 259, 299]), "here", "mend it")
    known.check(np.array([[-1, -1], [3, 4]]), "here", "mend it")
    known.check(np.array([], np.int32), "here", "mend it")
    with pytest.raises(
        StoreError, match=r"here: token id 260 \('<think>'\), which the tokenizer of one of the two models lacks .*; mend it"
    ):
        known.check(np.array([0, 260]), "here", "mend it")
    with pytest.raises(StoreError, match="here: token id 300, but student s has 300 embedding rows; mend it"):
        known.check(np.array([0, 300]), "here", "mend it")


@pytest.mark.parametrize(
    "change",
    [
        {"merges": MERGES[:2]},
        {"merges": MERGES[::-1]},
        {"normal": normalizers.NFC()},
        {"normal": normalizers.Lowercase()},
        {
            "split": pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        },
    ],
)
def test_the_same_table_and_another_reading(tmp_path: Path, change: dict[str, Any]) -> None:
    left, right = fingerprint(tmp_path / "left"), fingerprint(tmp_path / "right", **change)
    assert left.tokenizer.vocab_sha256 == right.tokenizer.vocab_sha256
    with pytest.raises(LineageError, match="they split text differently"):
        check_same_tokenizer(left, right)


def test_fingerprints_of_older_versions(tmp_path: Path) -> None:
    new = fingerprint(tmp_path / "new")
    old = TokenizerFingerprint.model_validate({"vocab_sha256": new.tokenizer.vocab_sha256, "num_tokens": 260})
    assert check_same_tokenizer(new, new.model_copy(update={"tokenizer": old})) == {}
    more = fingerprint(tmp_path / "more", added={"<think>": False})
    with pytest.raises(LineageError, match="their tables differ"):
        check_same_tokenizer(more, new.model_copy(update={"tokenizer": old}))


def test_an_embedding_with_fewer_rows_than_tokens(tmp_path: Path) -> None:
    model = fingerprint(tmp_path / "m")
    check_rows(model)
    with pytest.raises(LineageError, match=r"m: an embedding of 259 rows \(vocab_size\) for a tokenizer of 260 tokens"):
        check_rows(model.model_copy(update={"vocab_size": 259}))
