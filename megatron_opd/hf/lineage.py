"""Who made what: fingerprints of models, lineage files, and the teacher-consistency rule."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from megatron_opd.errors import LineageError, UserError
from megatron_opd.hf.model_config import MODEL_TYPES, quantisation, read_config, spell_for_all
from megatron_opd.hf.tokenizer import fingerprint_tokenizer
from megatron_opd.hf.tokenizer import load_tokenizer as load_tokenizer
from megatron_opd.records import Lineage, ModelFingerprint
from megatron_opd.safety.durable import write_json
from megatron_opd.safety.untrusted import load_json, open_file, read_json, read_object

LINEAGE_FILE = "opd_lineage.json"
ORIGIN_FILE = "opd_converted.json"  # which checkpoint a model directory was converted from
CACHE_FILE = ".opd_fingerprint.json"  # beside the weights
RUN_CACHE_FILE = "fingerprints.json"  # in the run directory, for model directories that can't be written
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARD_INDEX, WHOLE_MODEL = "model.safetensors.index.json", "model.safetensors"
_BLOCK = 16 << 20
_MAX_HEADER = 100_000_000  # of the safetensors library
# Bits of an element; a type that is not here is not checked against its shape.
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
# Where hashes are kept: in this process, and for a directory that can't be written in the run's.
_known: dict[str, tuple[Any, str]] = {}
_run_directory: Path | None = None


class StoredTensor(NamedTuple):
    """Where a tensor lies: file, first byte, byte after the last, safetensors dtype, shape."""

    path: Path
    start: int
    end: int
    dtype: str
    shape: list[int]


def fingerprint_model(directory: str | Path, *, name: str | None = None) -> ModelFingerprint:
    """Fingerprint a Hugging Face directory from its files alone.

    The hash of the config does not depend on the spelling of RoPE, nor that of the weights on how tensors are split into files. The
    latter is computed again only if a file changed (`_stamp`). Raises UserError for what is not a model, or not one model to every engine.
    """
    directory = Path(directory)
    check_head(directory)
    config = spell_for_all(read_config(directory), f"{directory}/config.json")
    return ModelFingerprint(
        name=name or os.path.basename(os.path.realpath(directory)),
        config_sha256=_sha256_json({key: value for key, value in config.items() if not key.startswith("_")}),
        weights_sha256=_weights_sha256(directory),
        vocab_size=config["vocab_size"],
        tokenizer=fingerprint_tokenizer(directory),
    )


def keep_hashes_in(run_directory: str | Path) -> None:
    """Hashes of model directories that can't be written are kept in this directory from now on."""
    global _run_directory
    _run_directory = Path(run_directory)


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def tensor_index(directory: str | Path) -> dict[str, StoredTensor]:
    """name -> tensor over all *.safetensors. Raises UserError."""
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors files; pickled weights (.bin, .pt) are not read")
    _check_shards(directory, {path.name for path in files})
    index: dict[str, StoredTensor] = {}
    for path in files:
        try:
            found = _read_header(path)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({str(error).removeprefix(f'{path}: ')}); copy or convert it again"
            ) from None
        if both := sorted(found.keys() & index.keys()):
            raise UserError(
                f"{path} and {index[both[0]].path.name} both hold tensor {both[0]}: two copies of weights lie side by side "
                "(shards with their index, and a whole file?); move one away"
            )
        index |= found
    return index


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Raises ValueError, KeyError or TypeError for what is no safetensors file, or a part of one."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = 8 + int.from_bytes(file.read(8), "little")
        header = load_json(file.read(first - 8), "its header") if 8 < first <= min(size, _MAX_HEADER) else None
    if not isinstance(header, dict):
        raise ValueError("no header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"__metadata__ must be an object of texts, not {metadata!r:.100}")
    found = {}
    for name, entry in header.items():
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or not isinstance(offsets, list) or not isinstance(dtype, str):
            raise ValueError(f"tensor {name} has shape {shape!r:.100}, offsets {offsets!r:.100} and type {dtype!r:.100}")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in [*shape, *offsets]) or len(offsets) != 2:
            raise ValueError(f"tensor {name} has shape {shape!r:.100} and offsets {offsets!r:.100}")
        start, end = (first + offset for offset in offsets)
        if end > size or start > end:
            raise ValueError(f"tensor {name} ends at byte {end} of {size}")
        if dtype in _BITS and (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"tensor {name} of shape {shape!r:.100} and type {dtype} has {end - start} bytes")
        found[name] = StoredTensor(path, start, end, dtype, shape)
    reached = first
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != reached:
            raise ValueError(f"tensor {name} begins at byte {tensor.start}, but the one before it ends at {reached}")
        reached = tensor.end
    if reached != size:
        raise ValueError(f"its tensors end at byte {reached} of {size}")
    return found


def _check_shards(directory: Path, files: set[str]) -> None:
    """Raise UserError if the index of the shards, where there is one, names a file that is not there."""
    path = directory / SHARD_INDEX
    if not path.exists():
        return
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(
            f"{path}: not an index of shards: weight_map must name the file of each tensor, not {weight_map!r:.100}; copy it again"
        )
    named = set(weight_map.values())
    if missing := sorted(named - files):
        stale = " (or remove the index, if model.safetensors is the whole model)" if WHOLE_MODEL in files else ""
        raise UserError(
            f"{directory}: {', '.join(missing[:5])} ({len(missing)} of {len(named)} files that {path.name} names) missing; copy again{stale}"
        )


def _blocks(tensor: StoredTensor) -> Iterator[bytes]:
    """The tensor's bytes, a block at a time. Raises UserError."""
    with open_file(tensor.path) as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise UserError(f"{tensor.path}: became shorter while it was read; is it still being written?")
            left -= len(block)
            yield block


def hash_tensors(directory: str | Path) -> dict[str, str]:
    """sha256 of each tensor's name, dtype, shape and bytes."""

    def one(item: tuple[str, StoredTensor]) -> tuple[str, str]:
        name, tensor = item
        digest = hashlib.sha256(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for block in _blocks(tensor):
            digest.update(block)
        return name, digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(pool.map(one, tensor_index(directory).items()))


def same_bits(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors have one type, shape and bytes."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and all(
        a == b for a, b in zip(_blocks(left), _blocks(right), strict=True)
    )


def check_head(directory: Path) -> None:
    """Raise UserError if the LM head in the files is not what `tie_word_embeddings` says: engines follow the one or the other.

    A copy of the embedding, bit for bit, is no contradiction. Of unknown architectures and quantised weights nothing is said.
    """
    config, index, where = read_config(directory), tensor_index(directory), f"{directory}/config.json"
    _check_amount(config, index, where)
    if config.get("architectures") not in [[name] for name in MODEL_TYPES] or quantisation(directory) is not None:
        return
    tied = bool(config.get("tie_word_embeddings"))
    if tied and {EMBEDDING, HEAD} <= index.keys() and not same_bits(index[HEAD], index[EMBEDDING]):
        raise UserError(
            f"{where}: tie_word_embeddings = true, but {index[HEAD].path.name} has an {HEAD} that is not the embedding; set the field to false "
            "if the head belongs to the model, or remove the tensor"
        )
    if not tied and EMBEDDING in index and HEAD not in index:
        raise UserError(
            f"{where}: tie_word_embeddings = false (or not set), but no file has an {HEAD}; set the field to true if the embedding is the head, "
            "or copy the missing weights"
        )


def _check_amount(config: dict[str, Any], index: dict[str, StoredTensor], where: str) -> None:
    """Raise UserError if config.json asks for more than the files can hold: engines would make room for it before they look."""
    bits = 8 * sum(tensor.end - tensor.start for tensor in index.values())
    for fields, there, unit in (
        (("vocab_size", "hidden_size"), bits, "bits"),
        (("intermediate_size", "hidden_size"), bits, "bits"),
        (("num_hidden_layers",), len(index), "tensors"),
    ):
        values = [value for name in fields if isinstance(value := config.get(name), int)]
        if len(values) == len(fields) and math.prod(values) > there:
            said = " and ".join(f"{name} = {value}" for name, value in zip(fields, values, strict=True))
            raise UserError(f"{where}: {said}, but all the weights have {there} {unit}; does it belong to these weights?")


def _weights_sha256(directory: Path) -> str:
    """One hash of all tensors, whatever files they lie in; computed again only if a file changed (`_stamp`). Raises UserError."""
    stamp = _stamp(directory)
    if (digest := _cached_sha256(directory, stamp)) is not None:
        return digest
    known, digest = _known.get(os.path.realpath(directory), (None, ""))
    return _remember(directory, stamp, digest if known == stamp else _hash_all(hash_tensors(directory)))


def check_weights(directory: str | Path, model: ModelFingerprint) -> None:
    """Read every byte of the weights, and raise LineageError if they are not `model`'s.

    A fingerprint is made anew where a file's size or times say so; whatever changes bytes and keeps these (a disk, somebody) is found here.
    """
    place = Path(directory)
    found = _hash_all(hash_tensors(place))
    if found != model.weights_sha256:
        raise LineageError(
            f"{place}: the weights are {found[:12]}, but were {model.weights_sha256[:12]} when they were last read, and the files' sizes and times are as "
            f"then: a damaged disk, or somebody who hides a change; copy the model again, or, if it is to be this one, remove {place / CACHE_FILE} (RUN_DIR/{RUN_CACHE_FILE} where the model's folder can't be written)"
        )


def known_weights(directory: str | Path) -> str | None:
    """The weights' hash where it was made before and no file has changed since; reads no weights."""
    folder = Path(directory)
    return _cached_sha256(folder, _stamp(folder)) if folder.is_dir() else None


def _cached_sha256(directory: Path, stamp: list[Any]) -> str | None:
    place = os.path.realpath(directory)
    for cached in (_read_cache(directory / CACHE_FILE), _read_cache(_run_cache()).get(place)):
        if isinstance(cached, dict) and cached.get("files") == stamp and isinstance(digest := cached.get("weights_sha256"), str):
            _known[place] = stamp, digest
            return digest
    return None


def remember_hashes(directory: Path, hashes: dict[str, str]) -> None:
    """Cache the weights' hash where those of the tensors (of `hash_tensors`) are known, so that nobody reads the files for it."""
    _remember(directory, _stamp(directory), _hash_all(hashes))


def _hash_all(hashes: dict[str, str]) -> str:
    return _sha256_json(sorted(hashes.items()))


def _stamp(directory: Path) -> list[Any]:
    """What changes when the weights do. The time of the last change of the inode can't be set back, that of the content can."""
    facts = [(path.name, path.stat()) for path in sorted(directory.glob("*.safetensors"))]
    return [[name, fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns] for name, fact in facts]


def _remember(directory: Path, stamp: list[Any], digest: str) -> str:
    place = os.path.realpath(directory)
    _known[place] = stamp, digest
    entry = {"files": stamp, "weights_sha256": digest}
    try:
        write_json(directory / CACHE_FILE, entry)
    except OSError:
        if (cache := _run_cache()) is not None:
            with contextlib.suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_json(cache, _read_cache(cache) | {place: entry})
    return digest


def _run_cache() -> Path | None:
    return None if _run_directory is None else _run_directory / RUN_CACHE_FILE


def _read_cache(path: Path | None) -> dict[str, Any]:
    """A cache that can't be read is none."""
    try:
        content = {} if path is None else read_json(path)
    except (OSError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def read_lineage(directory: str | Path) -> Lineage | None:
    """Lineage that travels with a model directory or checkpoint, None where there is none.

    Raises LineageError if the file was written for other weights than those beside it.
    """
    path = Path(directory) / LINEAGE_FILE
    if not path.exists():
        return None
    try:
        content = read_object(path)
        lineage = Lineage.model_validate(content["lineage"])
    except (ValueError, KeyError) as error:
        raise LineageError(f"{path}: not a lineage file: {' '.join(str(error).split()).removeprefix(f'{path}: ')}; copy it again") from None
    written_for = content.get("weights_sha256")
    if written_for is not None and not isinstance(written_for, str):
        raise LineageError(f"{path}: not a lineage file: weights_sha256 is {written_for!r:.100}; copy it again")
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
    write_json(Path(directory) / LINEAGE_FILE, content)


def same_model(left: ModelFingerprint, right: ModelFingerprint) -> bool:
    """Equal weights and equal token table; names and config spelling may differ."""
    return left.weights_sha256 == right.weights_sha256 and left.tokenizer.vocab_sha256 == right.tokenizer.vocab_sha256


def teacher_problem(lineage: Lineage, teacher: ModelFingerprint) -> tuple[str, str] | None:
    """Why `teacher` can't be taken for the one whose answers the student was fine-tuned on, and the remedy; None if it is that one."""
    if lineage.sft_teacher is None:
        remedy = "declare it (rollout.sft_teacher=DIR, or --sft-teacher DIR) when you collect the rollouts"
        return "the student's SFT teacher is not known", remedy
    if not same_model(lineage.sft_teacher, teacher):
        problem = f"the student was fine-tuned on answers of {lineage.sft_teacher.short()}, but {teacher.short()} scores"
        return problem, "score with the SFT teacher, or fine-tune the student on this teacher's answers"
    return None


def check_teacher(lineage: Lineage, teacher: ModelFingerprint, *, allow_mismatch: bool, off_policy: bool = False) -> str | None:
    """The teacher that scores must be the one whose answers the student was fine-tuned on (Lightning OPD, arXiv 2604.13010).

    `off_policy`: the student did not sample the responses; then neither a declaration for them nor residualized scores are of it. Returns None, or with `allow_mismatch` the sentence that is recorded and printed. Raises LineageError.
    """
    if (found := teacher_problem(lineage, teacher)) is None:
        return None
    problem, remedy = found
    if not off_policy:
        remedy += ", or train on scores derived by 'residualize' (score.derived, train.teacher)"
    elif lineage.sft_teacher is None:
        remedy = "collect rollouts of this student, with rollout.sft_teacher=DIR"
    if not allow_mismatch:
        raise LineageError(f"{problem}; {remedy}. --allow-teacher-mismatch goes on all the same, and is recorded")
    return f"teacher mismatch allowed: {problem}"
