"""Manifests of a store: read, checked, and what they say of the arrays beside them; the identity by which parts know their store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_opd.data.location import MAKE_AGAIN, Location
from megatron_opd.data.shards import ArrayFacts
from megatron_opd.errors import StoreError
from megatron_opd.records import PromptFile
from megatron_opd.safety.untrusted import one_line
from megatron_opd.store_records import EXTENDED_FORMAT, PartManifest, ScoreManifest, StoreManifest

FORMAT_VERSIONS = (1, EXTENDED_FORMAT)
# What may differ between two runs that add to the same store.
FREE_FIELDS = {"provenance", "engine"}
_Manifest = TypeVar("_Manifest", bound=BaseModel)


def part_group(part: int) -> str:
    return f"parts/{part:06d}"


def score_group(part: int, teacher: str) -> str:
    return f"{part_group(part)}/teacher/{teacher}"


def part_number(name: str) -> int | None:
    """The part whose folder has this name, None if none has."""
    return int(name) if len(name) == 6 and name.isascii() and name.isdecimal() else None


def read_manifest(location: Location) -> tuple[StoreManifest, str]:
    """Manifest and identity of the store at `location`, of its last extension if it has any. Raises StoreError."""
    attributes = location.read_attributes("")
    if attributes is None:
        raise StoreError(f"{location.url}: no store here; make one with 'megatron-opd rollout' (or 'generate')")
    if attributes.get("format_version") not in FORMAT_VERSIONS:
        version = one_line(str(attributes.get("format_version"))[:80])
        raise StoreError(f"{location.url}: store format {version}, this program reads {' and '.join(map(str, FORMAT_VERSIONS))}")
    manifest = parse_manifest(StoreManifest, attributes, location.url)
    identity = store_id(attributes)
    for number, extension in enumerate(manifest.extensions, start=1):
        then = extension_id(identity, extension.prompts, extension.samples_per_prompt)
        if (extension.extends, extension.store_id) != (identity, then):
            raise StoreError(
                f"{location.url}: extension {number} is of another store ({extension.extends} to {extension.store_id}; it would be {identity} to {then}); "
                "put zarr.json back from a copy"
            )
        identity = then
    return manifest, identity


def as_written(manifest: StoreManifest) -> dict[str, Any]:
    """Attributes of a store's root group. Without extensions they are what older versions read and write, and have the same identity."""
    return manifest.model_dump(exclude=None if manifest.extensions else {"extensions"})


def store_id(attributes: dict[str, Any]) -> str:
    """Hash of what a store's manifest, as it was written, says of the store's content as it was first made.

    It is the same for two workers that create the store, and after it was made again with the same settings; fields that later versions
    add to manifests don't change it.
    """
    content = {key: value for key, value in attributes.items() if key not in FREE_FIELDS | {"extensions"}}
    content |= {"format_version": 1, "prompts": {key: value for key, value in content["prompts"].items() if key != "name"}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def extension_id(before: str, prompts: PromptFile, samples_per_prompt: int) -> str:
    """Identity of a store from an extension on; `before` is that until then."""
    content = [before, prompts.sha256, prompts.num_prompts, samples_per_prompt]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def part_id(manifest: StoreManifest, identity: str, part: int) -> str:
    """Identity that part `part` of the store carries, and its scores: the store's as it was when the part came to it."""
    generation = manifest.segment(part).generation
    return identity if generation == len(manifest.extensions) else manifest.extensions[generation].extends


def parse_manifest(kind: type[_Manifest], attributes: dict[str, Any], where: str) -> _Manifest:
    """Raises StoreError, in one line."""
    try:
        return kind.model_validate(attributes)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in error.errors()]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise StoreError(f"{where}: manifest is not valid: {one_line('; '.join(faults[:3]))}{more}") from None


def read_part(location: Location, part: int, identity: str) -> tuple[PartManifest, dict[str, ArrayFacts]] | None:
    """Manifest of a part of the store with this identity, and its arrays; None if it is not sealed. Raises StoreError."""
    where, attributes = location.show(part_group(part)), location.read_attributes(part_group(part))
    if attributes is None:
        return None
    record = parse_manifest(PartManifest, attributes, where)
    if record.part != part:
        raise StoreError(f"{where}: holds part {record.part}; was the folder renamed?")
    _check_store(record.store_id, identity, where, "delete this part, and run the stage again to make it")
    n, T = record.num_rollouts, record.num_tokens
    shapes = {
        "tokens": ((T,), "int32"),
        "offsets": ((n + 1,), "int64"),
        "prompt_len": ((n,), "int32"),
        "prompt_index": ((n,), "int64"),
        "sample_index": ((n,), "int32"),
        "finish": ((n,), "uint8"),
        "student_logp": ((T,), "float32"),
    }
    return record, _facts(shapes, record.crc32c, where)


def read_scores(location: Location, part: PartManifest, teacher: str, identity: str) -> tuple[ScoreManifest, dict[str, ArrayFacts]] | None:
    """Manifest of a teacher's scores of a part, and their arrays; None if it did not score it.

    Raises StoreError, also if it scored other rollouts.
    """
    group = score_group(part.part, teacher)
    where, attributes = location.show(group), location.read_attributes(group)
    if attributes is None:
        return None
    record = parse_manifest(ScoreManifest, attributes, where)
    if record.part != part.part or record.part_crc32c != part.crc32c:
        raise StoreError(f"{where}: scores of other rollouts than part {part.part} now holds; delete and score again")
    _check_store(record.store_id, identity, where, "delete and score again")
    T, K = part.num_tokens, record.top_k
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"logp": ((T,), "float32")}
    if K:
        shapes |= {"topk_ids": ((T, K), "int32"), "topk_logp": ((T, K), "float32 float16")}
    return record, _facts(shapes, record.crc32c, where)


def source_id(parts: Mapping[int, PartManifest], scores: Mapping[int, ScoreManifest]) -> str:
    """Hash of all that derived scores are made of: rollouts, a teacher's scores of them, and what it left out or cut."""
    content = [
        [
            part,
            record.crc32c,
            scores[part].crc32c,
            scores[part].max_tokens,
            [[e.prompt_index, e.sample_index] for e in scores[part].excluded],
        ]
        for part, record in sorted(parts.items())
        if part in scores
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_store(recorded: str | None, identity: str, where: str, remedy: str) -> None:
    """Raise StoreError if a group says that it is of another store; those of older versions don't say."""
    if recorded not in (None, identity):
        raise StoreError(
            f"{where} is of another store, with other prompts, models or settings ({recorded}, this one is {identity}); {remedy}"
        )


def _facts(shapes: Mapping[str, tuple[tuple[int, ...], str]], sums: dict[str, int], where: str) -> dict[str, ArrayFacts]:
    if lacking := shapes.keys() - sums.keys():
        raise StoreError(f"{where}: no checksum of {', '.join(sorted(lacking))} in the manifest; {MAKE_AGAIN}")
    return {name: ArrayFacts(shape, tuple(dtypes.split()), sums[name]) for name, (shape, dtypes) in shapes.items()}
