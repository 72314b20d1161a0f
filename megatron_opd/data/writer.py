"""Writes a store: parts whole and sealed, teachers' scores beside them. Layout: docs/store-format.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.data.joining import join_store
from megatron_opd.data.location import FILL, Location, checksum
from megatron_opd.data.manifests import part_group, part_id, read_manifest, score_group
from megatron_opd.errors import StoreError
from megatron_opd.records import Finish, Rollout, TeacherScores
from megatron_opd.store_records import Excluded, PartManifest, ScoreManifest, StoreManifest


def create_store(url: str, manifest: StoreManifest) -> Location:
    """Create a store, or join one that was created with the same settings. Raises StoreError naming what differs."""
    join_store(url, manifest)
    return Location(url)


def write_part(
    location: Location, part: int, rollouts: Sequence[Rollout], excluded: Sequence[Excluded], provenance: dict[str, Any]
) -> None:
    """Write and seal part `part`; rollouts must be of the part's prompts, each (prompt, sample) once, none missing."""
    manifest, identity = read_manifest(location)
    if not 0 <= part < manifest.num_parts:
        raise StoreError(f"{location.url}: part {part} of {manifest.num_parts}")
    expected = set(manifest.pairs(part))
    given = [(r.prompt_index, r.sample_index) for r in rollouts] + [(e.prompt_index, e.sample_index) for e in excluded]
    if len(given) != len(set(given)) or set(given) != expected:
        odd = sorted(set(given) ^ expected)[:5]
        raise StoreError(
            f"{location.show(part_group(part))}: {len(given)} rollouts and exclusions for {len(expected)} expected; at odds: {odd}"
        )
    for rollout in rollouts:
        where = f"prompt {rollout.prompt_index}, sample {rollout.sample_index}"
        if int(rollout.tokens.max()) >= manifest.vocab_size:
            raise StoreError(f"{where}: token id {int(rollout.tokens.max())} in a vocabulary of {manifest.vocab_size}")
        if manifest.stop_ids:
            try:
                rollout.check_ending(manifest.stop_ids)
            except ValueError as error:
                raise StoreError(f"{where}: {error}") from None
    rollouts = sorted(rollouts, key=lambda r: (r.prompt_index, r.sample_index))
    arrays = {
        "tokens": _concat([r.tokens for r in rollouts], np.int32),
        "offsets": np.cumsum([0, *(len(r.tokens) for r in rollouts)], dtype=np.int64),
        "prompt_len": np.array([r.prompt_len for r in rollouts], np.int32),
        "prompt_index": np.array([r.prompt_index for r in rollouts], np.int64),
        "sample_index": np.array([r.sample_index for r in rollouts], np.int32),
        "finish": np.array([r.finish for r in rollouts], np.uint8),
        "student_logp": _concat([r.student_logp for r in rollouts], np.float32),
    }
    record = PartManifest(
        part=part,
        store_id=part_id(manifest, identity, part),
        num_rollouts=len(rollouts),
        num_tokens=len(arrays["tokens"]),
        num_response_tokens=sum(r.response_len for r in rollouts),
        excluded=list(excluded),
        endings=Counter(int(r.tokens[-1]) for r in rollouts if r.finish is Finish.STOP),
        crc32c={name: checksum(array) for name, array in arrays.items()},
        provenance=provenance,
    )
    location.write_sealed_group(part_group(part), arrays, record.model_dump())


def write_scores(
    location: Location,
    teacher: str,
    manifest: ScoreManifest,
    rollouts: Sequence[Rollout],
    scores: Sequence[TeacherScores | None],
    *,
    topk_dtype: str = "float32",
) -> None:
    """Write and seal teacher `teacher`'s scores of a part; its `crc32c` and `store_id` are filled in here.

    `rollouts` are all rollouts of the part in the store's order. Scores are None for those in `manifest.excluded`, and of the first
    `manifest.max_tokens` tokens. Raises StoreError for scores that are missing or not theirs.
    """
    if len(rollouts) != len(scores) or checksum(_concat([r.tokens for r in rollouts], np.int32)) != manifest.part_crc32c["tokens"]:
        raise StoreError(
            f"{location.show(part_group(manifest.part))}: {len(scores)} scores of {len(rollouts)} rollouts, which are not all of the part's in their order"
        )
    excluded = {(entry.prompt_index, entry.sample_index) for entry in manifest.excluded}
    for rollout, score in zip(rollouts, scores, strict=True):
        try:
            if (score is None) != ((rollout.prompt_index, rollout.sample_index) in excluded):
                raise ValueError("no scores, and not excluded" if score is None else "excluded, but scored")
            if score is not None:
                score.check_against(rollout.cut(manifest.max_tokens))
                _check_topk(score, manifest)
        except ValueError as error:
            raise StoreError(f"part {manifest.part}, prompt {rollout.prompt_index}, sample {rollout.sample_index}: {error}") from None
    lengths = [len(rollout.tokens) for rollout in rollouts]
    arrays = {"logp": _aligned([None if s is None else s.logp for s in scores], lengths, np.float32)}
    if manifest.top_k:
        shape = (manifest.top_k,)
        arrays["topk_ids"] = _aligned([None if s is None else s.topk_ids for s in scores], lengths, np.int32, shape)
        arrays["topk_logp"] = _aligned([None if s is None else s.topk_logp for s in scores], lengths, np.dtype(topk_dtype), shape)
    sums = {name: checksum(array) for name, array in arrays.items()}
    sealed = manifest.model_copy(update={"store_id": part_id(*read_manifest(location), manifest.part), "crc32c": sums})
    parent = f"{part_group(manifest.part)}/teacher"
    location.make_group(parent)
    location.remove_leftovers(parent)
    location.write_sealed_group(score_group(manifest.part, teacher), arrays, sealed.model_dump())


def _check_topk(score: TeacherScores, manifest: ScoreManifest) -> None:
    """Raise ValueError unless `score` has the candidates that the manifest promises."""
    if not manifest.top_k:
        return
    if score.topk_ids is None:
        raise ValueError("top-k scores were asked for and the engine gave none")
    if score.topk_ids.shape[1] != manifest.top_k:
        raise ValueError(f"{score.topk_ids.shape[1]} candidates a position, {manifest.top_k} were asked for")
    if int(score.topk_ids.max()) >= manifest.teacher.vocab_size:
        raise ValueError(f"candidate {int(score.topk_ids.max())} in a vocabulary of {manifest.teacher.vocab_size}")


def _concat(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def _aligned(arrays: Sequence[np.ndarray | None], lengths: Sequence[int], dtype: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Arrays back to back, each over as many rows as `lengths` says; the fill value where there is none."""
    result = np.full((sum(lengths), *shape), FILL[np.dtype(dtype).kind], dtype)
    for array, end, length in zip(arrays, np.cumsum(lengths), lengths, strict=True):
        if array is not None:
            result[end - length : end - length + len(array)] = array
    return result
