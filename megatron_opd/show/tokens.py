"""Token ids as text that can be shown one token at a time.

A token of a byte-level tokenizer may hold a part of a character. The token that completes the character shows it, those before show
their bytes, as `<e4>`. What a console or a page would take for something else than text is shown by its escape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, NamedTuple

from megatron_opd.safety.untrusted import printable

Kind = Literal["text", "special", "bytes", "id"]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's


class Piece(NamedTuple):
    """What is shown of one token. "special": a token that was added to the table; "bytes": a part of a character; "id": no text is known."""

    text: str
    kind: Kind


class TokenTexts:
    """Texts of the tokens of a tokenizer of transformers; without one every token is shown by its id."""

    def __init__(self, tokenizer: Any = None):
        self._tokenizer = tokenizer
        self._added = {} if tokenizer is None else {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._decoders = _decoders(tokenizer)
        self._bytes: dict[int, bytes | None] = {}
        self._alone: dict[int, Piece | None] = {}  # None: its bytes are no whole characters

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def pieces(self, ids: Iterable[int]) -> list[Piece]:
        """A piece for each of `ids`."""
        found: list[Piece] = []
        broken: list[int] = []
        for number in ids:
            piece = self._piece(number)
            if piece is None:
                broken.append(number)
                continue
            found += self._put_together(broken)
            broken = []
            found.append(piece)
        return found + self._put_together(broken)

    def piece(self, number: int) -> Piece:
        """Of one token alone."""
        return self.pieces([number])[0]

    def raw(self, ids: Iterable[int]) -> bytes:
        """The text in UTF-8, special tokens included; tokens without text are left out."""
        return b"".join(self._bytes_of(number) or b"" for number in ids)

    def _piece(self, number: int) -> Piece | None:
        if number not in self._alone:
            self._alone[number] = self._make(number)
        return self._alone[number]

    def _make(self, number: int) -> Piece | None:
        content = self._bytes_of(number)
        if content is None:
            return Piece(str(number), "id")
        if number in self._added:
            return Piece(printable(self._added[number]), "special")
        try:
            return Piece(printable(content.decode()), "text")
        except UnicodeDecodeError:
            return None

    def _bytes_of(self, number: int) -> bytes | None:
        if number not in self._bytes:
            self._bytes[number] = self._read(number)
        return self._bytes[number]

    def _read(self, number: int) -> bytes | None:
        """None for an id that is not in the table (padding rows of the embedding) and for all of them without a tokenizer."""
        if number in self._added:
            return self._added[number].encode(errors="surrogatepass")
        token = None if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(number)
        if not isinstance(token, str):
            return None
        if "ByteFallback" in self._decoders and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if "ByteLevel" in self._decoders:
            table = _byte_letters()
            if all(letter in table for letter in token):
                return bytes(table[letter] for letter in token)
        elif self._decoders & {"Metaspace", "Replace"} or self._decoders == {"slow"}:
            token = token.replace(_SPACE, " ")
        return token.encode(errors="surrogatepass")

    def _put_together(self, ids: list[int]) -> list[Piece]:
        """Pieces of tokens in a row none of which is whole characters."""
        contents = [self._bytes_of(number) or b"" for number in ids]
        owners = [at for at, content in enumerate(contents) for _ in content]
        texts, whole, position = [""] * len(ids), [False] * len(ids), 0
        joined = b"".join(contents)
        for letter in joined.decode(errors="surrogateescape"):
            broken = "\udc80" <= letter <= "\udcff"  # a byte that is of no character
            size = 1 if broken else len(letter.encode())
            last = owners[position + size - 1]
            for at in range(position, position + size):
                if broken or owners[at] != last:
                    texts[owners[at]] += f"<{joined[at]:02x}>"
            if not broken:
                texts[last] += printable(letter)
                whole[last] = True
            position += size
        return [Piece(text, "text" if has_letter else "bytes") for text, has_letter in zip(texts, whole, strict=True)]


def _decoders(tokenizer: Any) -> frozenset[str]:
    """Names of the steps that make text of tokens, as tokenizer.json has them; {"slow"} for a tokenizer that is none of that library's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset({"slow"})
    steps, found = [json.loads(backend.to_str()).get("decoder")], set()
    while steps:
        if step := steps.pop():
            found.add(step["type"])
            steps += step.get("decoders", [])
    return frozenset(found)


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level tables (GPT-2's rule): printable bytes for themselves, others from 256 on, in order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}
