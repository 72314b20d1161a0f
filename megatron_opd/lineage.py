"""Who made what: fingerprints of models and tokenizers, lineage files, and the teacher-consistency rule."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_opd.errors import LineageError, UserError
from megatron_opd.records import Lineage, ModelFingerprint, TokenizerFingerprint

LINEAGE_FILE = "opd_lineage.json"
CACHE_FILE = ".opd_fingerprint.json"
SHARD_INDEX, WHOLE_MODEL = "model.safetensors.index.json", "model.safetensors"
_BLOCK = 16 << 20


def fingerprint_model(directory: str | Path, *, name: str | None = None) -> ModelFingerprint:
    """Fingerprint a Hugging Face directory from its files alone.

    The weights' hash does not depend on how tensors are split into files. It is cached beside the weights, keyed by the
    files' sizes and modification times, where the directory can be written. Raises UserError for what is not a model.
    """
    directory = Path(directory)
    config = read_config(directory)
    return ModelFingerprint(
        name=name or directory.resolve().name,
        config_sha256=_sha256_json({key: value for key, value in config.items() if not key.startswith("_")}),
        weights_sha256=_weights_sha256(directory),
        vocab_size=config["vocab_size"],
        tokenizer=fingerprint_tokenizer(directory),
    )


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises UserError."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; a Hugging Face model directory is expected (config.json, *.safetensors, tokenizer)"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict) or "vocab_size" not in config:
        raise UserError(f"{path}: no 'vocab_size'; only text models are supported")
    if type(config["vocab_size"]) is not int:
        raise UserError(f"{path}: vocab_size is {config['vocab_size']!r}, not a whole number")
    return config


def fingerprint_tokenizer(directory: str | Path) -> TokenizerFingerprint:
    """Fingerprint a tokenizer by what it does (token table, special ids, chat template), not by its files' bytes."""
    return fingerprint_loaded_tokenizer(load_tokenizer(directory))


def fingerprint_loaded_tokenizer(tokenizer: Any) -> TokenizerFingerprint:
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    template = tokenizer.chat_template
    return TokenizerFingerprint(
        vocab_sha256=_sha256_json(vocab),
        num_tokens=len(vocab),
        eos_token_id=tokenizer.eos_token_id,
        chat_template_sha256=None if template is None else _sha256_json(template),
    )


def load_tokenizer(directory: str | Path) -> Any:
    """The directory's tokenizer, from local files only and without remote code. Raises UserError."""
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such directory; a Hugging Face model directory is expected")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # for a damaged file the tokenizers library raises the bare class
        raise UserError(f"{directory}: no tokenizer could be loaded: {error}") from None


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def tensor_index(directory: str | Path) -> dict[str, tuple[Path, int, int, str, list[int]]]:
    """name -> (file, first byte, byte after the last, safetensors dtype, shape) over all *.safetensors. Raises UserError."""
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors files; pickled weights (.bin, .pt) are not read")
    _check_shards(directory, {path.name for path in files})
    index: dict[str, tuple[Path, int, int, str, list[int]]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                header_len = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_len)) if 0 < header_len < 1 << 30 else None
            if not isinstance(header, dict):
                raise ValueError("no header")
            size = path.stat().st_size
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = (8 + header_len + offset for offset in entry["data_offsets"])
                if end > size:
                    raise ValueError(f"tensor {name} ends at byte {end} of {size}")
                if name in index:
                    both = f"{path} and {index[name][0].name} both hold tensor {name}"
                    raise UserError(
                        f"{both}: two copies of weights lie side by side (shards with their index, and a whole file?); move one away"
                    )
                index[name] = (path, start, end, entry["dtype"], entry["shape"])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); copy or convert it again") from None
    return index


def _check_shards(directory: Path, files: set[str]) -> None:
    """Raise UserError if the index of the shards, where there is one, names a file that is not there."""
    path = directory / SHARD_INDEX
    if not path.exists():
        return
    try:
        named = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of shards ({error}); copy it again") from None
    if missing := sorted(named - files):
        stale = " (or remove the index, if model.safetensors is the whole model)" if WHOLE_MODEL in files else ""
        raise UserError(
            f"{directory}: {', '.join(missing[:5])} ({len(missing)} of {len(named)} files that {path.name} names) missing; copy again{stale}"
        )


def hash_tensors(directory: str | Path) -> dict[str, str]:
    """sha256 of each tensor's name, dtype, shape and bytes."""

    def one(item: tuple[str, tuple[Path, int, int, str, list[int]]]) -> tuple[str, str]:
        name, (path, start, end, dtype, shape) = item
        digest = hashlib.sha256(json.dumps([name, dtype, shape]).encode())
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                block = file.read(min(_BLOCK, end - start))
                if not block:
                    raise UserError(f"{path}: became shorter while it was read; is it still being written?")
                digest.update(block)
                start += len(block)
        return name, digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(pool.map(one, tensor_index(directory).items()))


def _weights_sha256(directory: Path) -> str:
    stamp = _stamp(directory)
    try:
        cached = json.loads((directory / CACHE_FILE).read_text())
        if cached["files"] == stamp:
            return cached["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return _remember(directory, stamp, hash_tensors(directory))


def remember_hashes(directory: Path, hashes: dict[str, str]) -> None:
    """Cache the weights' hash where those of the tensors (of `hash_tensors`) are known, so that nobody reads the files for it."""
    _remember(directory, _stamp(directory), hashes)


def _stamp(directory: Path) -> list[Any]:
    """What changes when the weights do: names, sizes and modification times."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(directory.glob("*.safetensors"))]


def _remember(directory: Path, stamp: list[Any], hashes: dict[str, str]) -> str:
    digest = _sha256_json(sorted(hashes.items()))
    with contextlib.suppress(OSError):  # a read-only model directory: the hash is made again next time
        write_json_atomic(directory / CACHE_FILE, {"files": stamp, "weights_sha256": digest})
    return digest


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename, so that the file appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def read_lineage(directory: str | Path) -> Lineage | None:
    """Lineage that travels with a model directory or checkpoint, None where there is none.

    Raises LineageError if the file was written for other weights than those beside it.
    """
    path = Path(directory) / LINEAGE_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        lineage = Lineage.model_validate(content["lineage"])
    except (ValueError, KeyError, TypeError) as error:
        raise LineageError(f"{path}: not a lineage file: {error}") from None
    written_for = content.get("weights_sha256")
    if written_for is not None and written_for != _weights_sha256(Path(directory)):
        raise LineageError(
            f"{path} was written for other weights ({written_for[:12]}); delete it and declare the SFT teacher (rollout.sft_teacher)"
        )
    return lineage


def write_lineage(directory: str | Path, lineage: Lineage, *, for_weights: bool) -> None:
    """Write a lineage file; `for_weights` binds it to the safetensors in the directory."""
    content: dict[str, Any] = {"lineage": lineage.model_dump()}
    if for_weights:
        content["weights_sha256"] = _weights_sha256(Path(directory))
    write_json_atomic(Path(directory) / LINEAGE_FILE, content)


def same_model(left: ModelFingerprint, right: ModelFingerprint) -> bool:
    """Equal weights and equal token table; names and config spelling may differ."""
    return left.weights_sha256 == right.weights_sha256 and left.tokenizer.vocab_sha256 == right.tokenizer.vocab_sha256


def check_same_tokenizer(student: ModelFingerprint, teacher: ModelFingerprint) -> None:
    """Raise LineageError unless both give every token the same id (embedding padding may differ)."""
    s, t = student.tokenizer, teacher.tokenizer
    if s.vocab_sha256 != t.vocab_sha256:
        raise LineageError(
            f"tokenizers differ: student {student.name} has {s.num_tokens} tokens (table {s.vocab_sha256[:12]}), "
            f"teacher {teacher.name} has {t.num_tokens} (table {t.vocab_sha256[:12]}); "
            "scores are by token id, so both need one tokenizer: choose a teacher of the student's family"
        )


def check_teacher(lineage: Lineage, teacher: ModelFingerprint, *, allow_mismatch: bool) -> str | None:
    """The teacher that scores must be the one whose answers the student was fine-tuned on (Lightning OPD, arXiv 2604.13010).

    Returns None, or with `allow_mismatch` the sentence that is recorded and printed. Raises LineageError.
    """
    if lineage.sft_teacher is None:
        problem = "the student's SFT teacher is not known"
        remedy = "declare it (rollout.sft_teacher=DIR, or --sft-teacher DIR) when you collect the rollouts"
    elif not same_model(lineage.sft_teacher, teacher):
        problem = f"the student was fine-tuned on answers of {lineage.sft_teacher.short()}, but {teacher.short()} scores"
        remedy = "score with the SFT teacher, or fine-tune the student on this teacher's answers"
    else:
        return None
    if not allow_mismatch:
        raise LineageError(f"{problem}; {remedy}. --allow-teacher-mismatch goes on all the same, and is recorded")
    return f"teacher mismatch allowed: {problem}"
