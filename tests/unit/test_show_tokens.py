"""Token ids as text, one token at a time: characters that tokens share, special tokens, hostile text, tokens of SentencePiece's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import IM_END, make_chat_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_opd.hf.tokenizer import load_tokenizer
from megatron_opd.show.tokens import Piece, TokenTexts


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_chat_tokenizer(folder, eos="<|im_end|>")
    return load_tokenizer(folder)


def ids_of(tokenizer: Any, text: bytes) -> list[int]:
    """Ids of single bytes; the table is sorted by the letters that stand for them."""
    from megatron_opd.show.tokens import _byte_letters

    letters = {byte: letter for letter, byte in _byte_letters().items()}
    return [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in text]


def test_a_character_of_several_tokens_is_shown_at_its_last(bytewise: Any) -> None:
    texts = TokenTexts(bytewise)
    pieces = texts.pieces(ids_of(bytewise, "aé你".encode()))
    assert pieces == [
        Piece("a", "text"),
        Piece("<c3>", "bytes"),
        Piece("é", "text"),
        Piece("<e4>", "bytes"),
        Piece("<bd>", "bytes"),
        Piece("你", "text"),
    ]


def test_bytes_of_no_character(bytewise: Any) -> None:
    texts = TokenTexts(bytewise)
    assert [piece.text for piece in texts.pieces(ids_of(bytewise, b"\xff\xe4\xbda"))] == ["<ff>", "<e4>", "<bd>", "a"]
    assert [piece.text for piece in texts.pieces(ids_of(bytewise, "你".encode()[:2]))] == ["<e4>", "<bd>"]  # cut by length
    assert texts.piece(ids_of(bytewise, b"\xe4")[0]) == Piece("<e4>", "bytes")


def test_special_tokens_and_unknown_ids(bytewise: Any) -> None:
    texts = TokenTexts(bytewise)
    assert texts.pieces([IM_END, 271]) == [Piece("<|im_end|>", "special"), Piece("271", "id")]
    assert texts.raw([IM_END, 271, *ids_of(bytewise, b"a")]) == b"<|im_end|>a"
    # Bytes before and behind a special token make no character.
    first, *rest = ids_of(bytewise, "é".encode())
    assert [piece.text for piece in texts.pieces([first, IM_END, *rest])] == ["<c3>", "<|im_end|>", "<a9>"]


def test_what_could_move_the_cursor_is_shown(bytewise: Any) -> None:
    texts = TokenTexts(bytewise)
    hostile = "\x1b[31m\0\u202e\u2028"
    shown = "".join(piece.text for piece in texts.pieces(ids_of(bytewise, hostile.encode())) if piece.kind == "text")
    assert shown == r"\x1b[31m\x00\u202e\u2028"


def test_without_a_tokenizer() -> None:
    texts = TokenTexts()
    assert not texts.known
    assert texts.pieces([5, 7]) == [Piece("5", "id"), Piece("7", "id")]
    assert texts.raw([5, 7]) == b""


def test_sentencepiece_with_byte_fallback() -> None:
    vocab = {"<unk>": 0, "\u2581Hello": 1, "\u2581a": 2, "<0xE4>": 3, "<0xBD>": 4, "<0xA0>": 5, "b": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    pieces = texts.pieces([1, 2, 3, 4, 5, 6, 7])
    assert [piece.text for piece in pieces] == [" Hello", " a", "<e4>", "<bd>", "\u4f60", "b", "<think>"]
    assert pieces[-1].kind == "special"


def test_text_is_what_the_tokenizer_decodes(bytewise: Any, tmp_path: Path) -> None:
    text = "The answer: 12 \u2264 \u03c0\u00b2, \U0001f469\u200d\U0001f52c\n\tcaf\u00e9"
    ids = bytewise.encode(text, add_special_tokens=False)
    assert TokenTexts(bytewise).raw(ids).decode() == text == bytewise.decode(ids)
