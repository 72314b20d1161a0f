"""Tokenizers: loaded and compared with what their own file says, fingerprinted, and two of them compared by token id."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_opd.errors import LineageError, UserError
from megatron_opd.hf.model_config import read_plainly
from megatron_opd.records import ModelFingerprint, TokenizerFingerprint
from megatron_opd.safety.untrusted import open_file, read_json

# Any of these makes a tokenizer; transformers' message about a directory without one is about something else.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*", "spiece.model", "*.tiktoken", "tekken.json")
# What readings of one tokenizer.json have been seen to differ in: spaces, lines, digits, accents (composed or not), scripts, emoji, code.
PROBE = (
    "The quick brown fox jumps over the lazy dog.",
    " a leading space, two  spaces,   three, and one at the end ",
    "lines\nand\n\nempty lines\r\n\ttabs\t\tand  spaces",
    "0 12 345 6789 1234567890 3.14159 -1e-7 50% $18.90",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m stra\u00dfe \ufb01ne",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \U0001f469\u200d\U0001f52c \U0001f1e9\U0001f1ea \u221a2 \u2264 \u03c0 \u00bd",
    "def f(x):\n    return {'a': [x**2, x // 3]}  # it's don't I'LL\n",
    "\\boxed{\\frac{1}{2}} A b C UPPER lower_case CamelCase",
)
_READ_BY_LIBRARIES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_NAMES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "config",
    "generation_config",
    "chat_template",
    "spiece",
    "sentencepiece",
)
_LARGEST_FILE = 1 << 29  # bytes; tokenizers of 256,000 tokens take about 40 MiB
_said: set[Path] = set()  # directories whose tokenizer needed a word
_fingerprints: dict[tuple[Any, ...], TokenizerFingerprint] = {}  # by directory and its files' sizes and times
_MOST_ADDED = 1000  # added tokens that a fingerprint lists; with more, two tables are compared as wholes


def load_tokenizer(directory: str | Path) -> Any:
    """The directory's tokenizer, from local files only and without remote code; it reads and writes text as tokenizer.json says.

    Versions of transformers choose their own class by `tokenizer_class` and the model's type. Some of these classes put rules of their
    own in the place of the file's (Qwen2Tokenizer of 5.x in every model of type qwen2), some add tokens (those of 4.x), and some versions
    don't know the name. Then the plain class, which takes tokenizer.json as it is, is used, and that is printed. Raises UserError.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; a Hugging Face model directory is expected")
    if not any(next(directory.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise UserError(f"{directory}: no tokenizer in it (tokenizer.json); copy the tokenizer files of the model that it was made from")
    _check_files(directory)
    own: Any = None
    tokenizer: Any = None
    try:
        own = _own_reading(directory)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        fault = _misreading(tokenizer, own, directory)
    except (
        BaseException
    ) as error:  # for a damaged file the tokenizers library raises the bare class, and PanicException, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        fault = f"no tokenizer could be loaded: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    if fault is None and (own is None or tokenizer.get_vocab() == own.get_vocab()):
        return tokenizer
    plain: Any = None
    if own is not None:
        with contextlib.suppress(Exception):
            candidate = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
            if _misreading(candidate, own, directory) is None and (fault is not None or candidate.get_vocab() == own.get_vocab()):
                plain = candidate
    if plain is None:
        if fault is None:  # tokens that a file beside tokenizer.json adds
            return tokenizer
        raise UserError(f"{directory}: {fault}")
    if directory not in _said:
        _said.add(directory)
        fault = fault or f"{_describe(tokenizer, directory)} adds tokens that are not in tokenizer.json"
        print(f"{directory}: {fault}; it is read as tokenizer.json says", flush=True)
    return plain


def _check_files(directory: Path) -> None:
    """Raise UserError for files that libraries, which read them in their own way, would wait for, or take all memory for."""
    if (directory / "config.json").exists():
        read_plainly(directory / "config.json")  # AutoTokenizer looks into it
    for path in directory.iterdir():
        if path.suffix in _READ_BY_LIBRARIES and path.name.startswith(_NAMES) and path.exists():
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_FILE:
                raise UserError(
                    f"{path}: {size >> 20} MiB, but no tokenizer's file has more than {_LARGEST_FILE >> 20}; move it out of the folder, or copy it again"
                )


def _own_reading(directory: Path) -> Any:
    """tokenizer.json, read by the library that it is the format of; None if there is none."""
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    own = tokenizers.Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    return own


def _misreading(tokenizer: Any, own: Any, directory: Path) -> str | None:
    """What `tokenizer` encodes or decodes otherwise than `own`; None if nothing."""
    if own is None:
        return None
    for text in PROBE:
        wanted, found = own.encode(text, add_special_tokens=False).ids, encode_plain(tokenizer, text)
        back = tokenizer.decode(found, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if found != wanted or back != own.decode(wanted, skip_special_tokens=False):
            return f"{_describe(tokenizer, directory)} reads {text!r} otherwise than tokenizer.json"
    return None


def _describe(tokenizer: Any, directory: Path) -> str:
    import tokenizers
    import transformers

    return (
        f"transformers {transformers.__version__} makes a {type(tokenizer).__name__} of it (tokenizer_class = {tokenizer_class(directory)!r} in "
        f"tokenizer_config.json, tokenizers {tokenizers.__version__}), which"
    )


def tokenizer_class(directory: Path) -> str | None:
    """What tokenizer_config.json declares."""
    try:
        content = read_json(directory / "tokenizer_config.json")
    except (OSError, UserError):
        return None
    return content.get("tokenizer_class") if isinstance(content, dict) else None


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without the special tokens that the tokenizer would put around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def fingerprint_tokenizer(directory: str | Path) -> TokenizerFingerprint:
    """Fingerprint a tokenizer by what it does (token table, special ids, chat template, reading), not by its files' bytes.

    Seconds for a large one; a process does it once for the same files.
    """
    folder = Path(directory)
    facts = [(path.name, path.stat()) for path in sorted(folder.glob("*")) if path.suffix != ".safetensors"] if folder.is_dir() else []
    key = (os.path.realpath(folder), *((name, fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns) for name, fact in facts))
    if key not in _fingerprints:
        _fingerprints[key] = fingerprint_loaded_tokenizer(load_tokenizer(folder))
    return _fingerprints[key]


def fingerprint_loaded_tokenizer(tokenizer: Any) -> TokenizerFingerprint:
    vocab, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    template = tokenizer.chat_template
    return TokenizerFingerprint(
        vocab_sha256=_hash_table(vocab),
        num_tokens=len(vocab),
        eos_token_id=tokenizer.eos_token_id,
        chat_template_sha256=None if template is None else _sha256(template),
        base_sha256=_hash_table({token: number for token, number in vocab.items() if token not in added}),
        added={token: added[token] for token in sorted(added)} if len(added) <= _MOST_ADDED else None,
        reading_sha256=_sha256([_merges(tokenizer), [encode_plain(tokenizer, text) for text in PROBE]]),
    )


def _merges(tokenizer: Any) -> list[str]:
    """The merges of a BPE model in their order, whatever their spelling in JSON; none for other models."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]


def _hash_table(vocab: dict[str, int]) -> str:
    return _sha256(sorted(vocab.items(), key=lambda item: (item[1], item[0])))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def check_same_tokenizer(student: ModelFingerprint, teacher: ModelFingerprint) -> dict[int, str]:
    """`compare_tokenizers` of two models."""
    return compare_tokenizers(student.name, student.tokenizer, teacher.name, teacher.tokenizer)


def compare_tokenizers(student: str, s: TokenizerFingerprint, teacher: str, t: TokenizerFingerprint) -> dict[int, str]:
    """Raise LineageError unless both read text alike and give every token that both have the same id (embedding padding may differ).

    Returns the tokens that one of them alone has, by id: added tokens, which must not occur in the data.
    """
    if s.reading_sha256 != t.reading_sha256 and None not in (s.reading_sha256, t.reading_sha256):
        why = "they split text differently (merges, normaliser or pre-tokenizer)"
    elif s.vocab_sha256 == t.vocab_sha256:
        return {}
    elif s.added is None or t.added is None or s.base_sha256 != t.base_sha256:
        why = "their tables differ"
    else:
        clashes = _clashes(s.added, t.added)
        if not clashes:
            return {number: token for token, number in set(s.added.items()) ^ set(t.added.items())}
        why = f"the ids of added tokens clash ({', '.join(map(repr, clashes[:3]))})"
    raise LineageError(
        f"tokenizers differ: student {student} has {s.num_tokens} tokens (table {s.vocab_sha256[:12]}), "
        f"teacher {teacher} has {t.num_tokens} (table {t.vocab_sha256[:12]}), and {why}; "
        "scores are by token id, so both need one tokenizer: choose a teacher of the student's family"
    )


def check_rows(model: ModelFingerprint) -> None:
    """Raise LineageError if the embedding has no row for some token."""
    if model.tokenizer.num_tokens > model.vocab_size:
        raise LineageError(
            f"{model.name}: an embedding of {model.vocab_size} rows (vocab_size) for a tokenizer of {model.tokenizer.num_tokens} tokens; "
            "do the tokenizer's files belong to this model?"
        )


def _clashes(left: dict[str, int], right: dict[str, int]) -> list[str]:
    """Added tokens that have two ids, or whose id is another token's."""
    tokens = {number: token for token, number in right.items()}
    return [token for token, number in sorted(left.items()) if right.get(token, number) != number or tokens.get(number, token) != token]
