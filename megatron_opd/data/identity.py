"""Who the rollouts and scores of a store are: short hashes by which a training knows them again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from megatron_opd.data.order import cut_lengths
from megatron_opd.data.store import StoreReader
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.store_records import PartManifest, ScoreManifest


def rollouts_id(reader: StoreReader) -> str:
    """Hash of the rollouts that a reader gives, and of their order."""
    kept = np.stack([reader.part_ids, reader.prompt_indices, reader.sample_indices.astype(np.int64)])  # not those that have no scores
    return _hash([sums_of(reader.parts), hashlib.sha256(kept.tobytes()).hexdigest()])


def lengths_id(reader: StoreReader, config: TrainerConfig) -> str:
    """Hash of how long training reads the rollouts at most; a teacher that took but their beginnings cuts them, too."""
    return _hash(cut_lengths(reader, config).tolist())


def scores_id(reader: StoreReader) -> str:
    """Hash of the scores of the reader's teacher."""
    records = {part: record for part in reader.parts if reader.teacher and (record := reader.score_manifest(part, reader.teacher))}
    return scores_hash(records)


def scores_hash(records: dict[int, ScoreManifest]) -> str:
    """The same, of the manifests of a teacher's scores by part."""
    return _hash(sums_of(records))


def sums_of(records: dict[int, PartManifest] | dict[int, ScoreManifest]) -> list[Any]:
    """Checksums of the arrays of each part, or of its scores."""
    return [[part, record.crc32c] for part, record in sorted(records.items())]


def content_of(reader: StoreReader) -> str:
    """Hash of the checksums of a store's arrays, with those of its reader's teacher: how older checkpoints know their store."""
    sums = []
    for part in sorted(reader.parts):
        record = reader.score_manifest(part, reader.teacher) if reader.teacher else None
        sums.append([part, reader.parts[part].crc32c, record.crc32c if record else {}])
    return _hash(sums)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
