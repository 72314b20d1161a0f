"""The stores that a training reads: one, or several as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_opd.data.location import Location
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError
from megatron_opd.hf.lineage import same_model
from megatron_opd.records import Lineage, ModelFingerprint, Rollout, TeacherScores
from megatron_opd.safety.redact import public_address
from megatron_opd.store_records import PartManifest, ScoreManifest, StoreManifest

# What a mixture must have in common, as one student learns from all of it.
_ONE = ("sampler_role", "round", "stop_ids", "turn_end", "chat_templates", "prompt_suffix", "prompt_probe")
_ARRAYS = ("lengths", "prompt_lens", "prompt_indices", "sample_indices", "finishes")


def open_training_stores(
    store: str | Sequence[str], teacher: str | None = None, *, memory_bytes: int = 4 << 30, allow_stale: bool = False
) -> StoreReader:
    """Reader of the store or stores in a recipe's `store`, as `StoreReader`. A single store in a list is the store alone.

    Raises StoreError, also for stores that are no mixture for one student, naming both and the field.
    """
    urls = store_list(store)
    share = memory_bytes // len(urls)
    readers = [StoreReader(url, teacher=teacher, memory_bytes=share, allow_stale=allow_stale) for url in urls]
    return readers[0] if len(readers) == 1 else JoinedReader(readers)


def store_list(store: str | Sequence[str]) -> list[str]:
    """A recipe's `store` as a list."""
    return [store] if isinstance(store, str) else list(store)


def show_stores(store: str | Sequence[str]) -> str:
    """A recipe's `store` for people."""
    return ", ".join(map(public_address, store_list(store)))


def training_stores_exist(store: str | Sequence[str]) -> bool:
    """Whether there is a store at every address."""
    return all(Location(url).read_attributes("") is not None for url in store_list(store))


class _Places:
    """Stands where a single store has its Location: names all of them for people."""

    def __init__(self, readers: Sequence[StoreReader]):
        self.url = ", ".join(reader.location.url for reader in readers)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"several stores have no one location ({name}); go through reader.stores")


class JoinedReader(StoreReader):
    """Rollouts of the first store, then of the second, and so on, by one index; parts are numbered on from store to store.

    What can be asked of a mixture is asked of each store; `manifest` is the first's, with what was allowed for any of them.
    """

    def __init__(self, readers: Sequence[StoreReader]):
        self.stores = list(readers)
        self.teacher = readers[0].teacher
        self.location: Any = _Places(readers)
        self.refresh_views()

    def refresh(self) -> None:
        for reader in self.stores:
            reader.refresh()
        self.refresh_views()

    def refresh_views(self) -> None:
        """Put together what the stores hold now."""
        _check_mixture(self.stores)
        self.manifest = _merged(self.stores)
        self.store_id = " ".join(reader.store_id for reader in self.stores)
        counts = [reader.manifest.num_parts for reader in self.stores]
        self._first_part = np.cumsum([0, *counts]).tolist()
        self._first_rollout = np.cumsum([0, *map(len, self.stores)]).tolist()
        self.notes = [note for reader in self.stores for note in reader.notes]
        self.parts: dict[int, PartManifest] = {
            first + part: record for first, reader in self._with_first() for part, record in reader.parts.items()
        }
        self.part_ids = np.concatenate([reader.part_ids + first for first, reader in self._with_first()])
        for name in _ARRAYS:
            setattr(self, name, np.concatenate([getattr(reader, name) for reader in self.stores]))

    def _with_first(self) -> Iterator[tuple[int, StoreReader]]:
        """Number of each store's part 0, and the store."""
        yield from zip(self._first_part, self.stores, strict=False)

    def _store_of(self, number: int, firsts: list[int]) -> tuple[StoreReader, int]:
        """The store that a part or rollout is of, and its number there."""
        if not 0 <= number < firsts[-1]:
            raise IndexError(f"{number} of {firsts[-1]}")
        at = int(np.searchsorted(firsts, number, side="right")) - 1
        return self.stores[at], number - firsts[at]

    def missing_parts(self) -> list[int]:
        return [first + part for first, reader in self._with_first() for part in reader.missing_parts()]

    @property
    def num_parts(self) -> int:
        return self._first_part[-1]

    def teachers(self) -> list[str]:
        return sorted({name for reader in self.stores for name in reader.teachers()})

    def score_manifest(self, part: int, teacher: str) -> ScoreManifest | None:
        reader, own = self._store_of(part, self._first_part)
        return reader.score_manifest(own, teacher)

    def derived_fault(self, teacher: str) -> str | None:
        faults = ((reader, reader.derived_fault(teacher)) for reader in self.stores)
        return next((f"{reader.location.url}: {fault}" for reader, fault in faults if fault is not None), None)

    def unscored(self, part: int, teacher: str) -> dict[tuple[int, int], str]:
        reader, own = self._store_of(part, self._first_part)
        return reader.unscored(own, teacher)

    def check_complete(self, teacher: str | None = None) -> None:
        for reader in self.stores:
            reader.check_complete(teacher)

    def check_scored(self, teacher: str) -> None:
        for reader in self.stores:
            reader.check_scored(teacher)

    def rollout(self, index: int) -> Rollout:
        reader, own = self._store_of(index, self._first_rollout)
        return reader.rollout(own)

    def scores(self, index: int, teacher: str, *, topk: bool = False) -> TeacherScores:
        reader, own = self._store_of(index, self._first_rollout)
        return reader.scores(own, teacher, topk=topk)

    def part_rollouts(self, part: int) -> list[Rollout]:
        reader, own = self._store_of(part, self._first_part)
        return reader.part_rollouts(own)

    def check_sampled(self, part: int, teacher: str | None = None) -> None:
        reader, own = self._store_of(part, self._first_part)
        reader.check_sampled(own, teacher)

    def verify(self) -> list[str]:
        return [problem for reader in self.stores for problem in reader.verify()]


def _check_mixture(readers: Sequence[StoreReader]) -> None:
    """Raise StoreError unless all stores are of one sampler, one format of prompts and endings, and scored by one teacher."""
    first = readers[0]
    _check_once(readers)
    for other in readers[1:]:
        for field in _ONE:
            _compare(first, other, field, getattr(first.manifest, field), getattr(other.manifest, field))
        _compare_models(first, other, "sampler", first.manifest.sampler, other.manifest.sampler)
        if first.manifest.sampler_role == "student":
            for field in ("base", "sft_teacher", "opd_teacher"):
                models = [getattr(reader.manifest.lineage, field) for reader in (first, other)]
                _compare_models(first, other, f"lineage.{field}", *models)
            for field in ("opd_scores", "sft", "rounds"):
                _compare(first, other, f"lineage.{field}", getattr(first.manifest.lineage, field), getattr(other.manifest.lineage, field))
        if first.teacher is not None:
            records = [_first_scores(reader, first.teacher) for reader in (first, other)]
            if records[0] is not None and records[1] is not None:  # a store that is not scored is refused by name later
                _compare_models(first, other, f"teacher {first.teacher!r}", records[0].teacher, records[1].teacher)
                _compare(first, other, f"top_k of teacher {first.teacher!r}", records[0].top_k, records[1].top_k)
                derivations = [None if record is None or record.derived is None else record.derived.derivation for record in records]
                _compare(first, other, f"how the scores of {first.teacher!r} were derived", *derivations)


def _check_once(readers: Sequence[StoreReader]) -> None:
    """Raise StoreError for a part that is in two of the stores: its rollouts would count twice."""
    seen: dict[tuple[Any, ...], tuple[int, int]] = {}
    for number, reader in enumerate(readers):
        for part, record in reader.parts.items():
            if record.num_rollouts:
                other, there = seen.setdefault(tuple(sorted(record.crc32c.items())), (number, part))
                if other != number:
                    raise StoreError(
                        f"{readers[other].location.url} and {reader.location.url} hold the same rollouts (part {there} of the first is part {part} "
                        "of the second); leave one of them out"
                    )


def _first_scores(reader: StoreReader, teacher: str) -> ScoreManifest | None:
    return next((record for part in reader.parts if (record := reader.score_manifest(part, teacher)) is not None), None)


def _compare(first: StoreReader, other: StoreReader, field: str, there: Any, here: Any) -> None:
    if field == "stop_ids":
        there, here = sorted(there), sorted(here)
    if there != here:
        raise _mixed(first, other, field, f"{there!r:.200}", f"{here!r:.200}")


def _compare_models(
    first: StoreReader, other: StoreReader, field: str, there: ModelFingerprint | None, here: ModelFingerprint | None
) -> None:
    if there is None and here is None:
        return
    if there is None or here is None or not same_model(there, here):
        raise _mixed(first, other, field, *("not known" if model is None else model.short() for model in (there, here)))


def _mixed(first: StoreReader, other: StoreReader, field: str, there: str, here: str) -> StoreError:
    return StoreError(
        f"{first.location.url} and {other.location.url} can't be trained on together: {field} is {there} in the first and {here} in the second; "
        "leave one of them out, or make it again to match"
    )


def _merged(readers: Sequence[StoreReader]) -> StoreManifest:
    manifests = [reader.manifest for reader in readers]
    lineage = manifests[0].lineage
    overrides = list(dict.fromkeys(text for manifest in manifests for text in manifest.lineage.overrides))
    declared = any(manifest.lineage.sft_teacher_declared for manifest in manifests)
    merged: Lineage = lineage.model_copy(update={"overrides": overrides, "sft_teacher_declared": declared})
    return manifests[0].model_copy(update={"lineage": merged})
