"""The rollout store: parts written whole and sealed, teachers added beside them, read by global rollout index.

Legend: n rollouts of a part, T tokens of a part (or a rollout), K teacher candidates. Layout: docs/store-format.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from megatron_opd.data.cache import ArrayCache
from megatron_opd.data.location import FILL, Location, checksum
from megatron_opd.errors import StoreError
from megatron_opd.records import Excluded, Finish, PartManifest, Rollout, ScoreManifest, StoreManifest, TeacherScores

FORMAT_VERSION = 1
_SMALL_ARRAYS = ("offsets", "prompt_len", "prompt_index", "sample_index", "finish")
_Manifest = TypeVar("_Manifest", StoreManifest, PartManifest, ScoreManifest)
_MAKE_AGAIN = "delete this group and make it again"
# What may differ between two runs that add to the same store.
_FREE_FIELDS = {"provenance", "engine"}


def part_group(part: int) -> str:
    return f"parts/{part:06d}"


def score_group(part: int, teacher: str) -> str:
    return f"{part_group(part)}/teacher/{teacher}"


def read_manifest(location: Location) -> StoreManifest:
    """Manifest of the store at `location`. Raises StoreError."""
    attributes = location.read_attributes("")
    if attributes is None:
        raise StoreError(f"{location.url}: no store here; make one with 'megatron-opd rollout' (or 'generate')")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise StoreError(f"{location.url}: store format {attributes.get('format_version')}, this program reads {FORMAT_VERSION}")
    return _parse(StoreManifest, attributes, location.url)


def _parse(kind: type[_Manifest], attributes: dict[str, Any] | None, where: str, arrays: Sequence[str] = ()) -> _Manifest:
    """A manifest, with a checksum of each of `arrays`. Raises StoreError."""
    try:
        record = kind.model_validate(attributes)
    except ValidationError as error:
        raise StoreError(f"{where}: manifest is not valid: {error}") from None
    if lacking := set(arrays) - set(getattr(record, "crc32c", {})):
        raise StoreError(f"{where}: no checksum of {', '.join(sorted(lacking))} in the manifest; {_MAKE_AGAIN}")
    return record


def create_store(url: str, manifest: StoreManifest) -> Location:
    """Create a store, or join one that was created with the same settings. Raises StoreError naming what differs."""
    location = Location(url)
    location.write_attributes("", manifest.model_dump(), exclusive=True)
    existing = read_manifest(location).model_dump()
    wanted = manifest.model_dump()
    if wanted["prompts"]["sha256"] == existing["prompts"]["sha256"]:
        wanted["prompts"]["name"] = existing["prompts"]["name"]  # the same file under another name
    for key in wanted:
        if key not in _FREE_FIELDS and existing[key] != wanted[key]:
            raise StoreError(
                f"{url} was made with other settings: {key} is {_brief(existing[key], wanted[key])} there, "
                f"{_brief(wanted[key], existing[key])} now; use the same settings, or another store path"
            )
    location.write_attributes("parts", None)
    location.remove_leftovers("parts")
    return location


def _brief(value: Any, other: Any) -> str:
    """The part of `value` that differs from `other`."""
    if isinstance(value, dict) and isinstance(other, dict):
        return "{" + ", ".join(f"{key}: {_brief(value[key], other.get(key))}" for key in value if value[key] != other.get(key)) + "}"
    return str(value)


def write_part(
    location: Location, part: int, rollouts: Sequence[Rollout], excluded: Sequence[Excluded], provenance: dict[str, Any]
) -> None:
    """Write and seal part `part`; rollouts must be of the part's prompts, each (prompt, sample) once, none missing."""
    manifest = read_manifest(location)
    if not 0 <= part < manifest.num_parts:
        raise StoreError(f"{location.url}: part {part} of {manifest.num_parts}")
    expected = {(p, s) for p in manifest.prompt_range(part) for s in range(manifest.sampling.samples_per_prompt)}
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
    """Write and seal teacher `teacher`'s scores of a part; `manifest.crc32c` is filled in here.

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
    sealed = manifest.model_copy(update={"crc32c": {name: checksum(array) for name, array in arrays.items()}})
    parent = f"{part_group(manifest.part)}/teacher"
    location.write_attributes(parent, None)
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


class StoreReader:
    """Rollouts and scores by global index over the sealed parts.

    What fits `memory_bytes` is read whole and kept; a larger store is read in blocks that an LRU keeps. `refresh()` sees parts
    sealed since. Anything missing, unsealed or damaged raises StoreError naming it. With `teacher`, rollouts that it could not score
    are left out, and those that it scored in part are cut there.
    """

    def __init__(self, url: str, *, teacher: str | None = None, memory_bytes: int = 4 << 30):
        self.location = Location(url)
        self.teacher = teacher
        self.manifest = read_manifest(self.location)
        self._cache = ArrayCache(self.location, memory_bytes)
        self._score_manifests: dict[tuple[int, str], ScoreManifest] = {}
        self.parts: dict[int, PartManifest] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for parts that were sealed since."""
        small: dict[str, list[np.ndarray]] = {name: [] for name in _SMALL_ARRAYS}
        parts = {part: self._part_manifest(part) for part in self._sealed_parts()}
        for part, record in parts.items():
            for name in _SMALL_ARRAYS:
                small[name].append(self._cache.whole(part_group(part), name, record.crc32c[name]))
            counts = (len(small["offsets"][-1]) - 1, int(small["offsets"][-1][-1]))
            if counts != (record.num_rollouts, record.num_tokens):
                raise StoreError(
                    f"{self.location.show(part_group(part))}: {counts[0]} rollouts of {counts[1]} tokens, "
                    f"but the manifest says {record.num_rollouts} of {record.num_tokens}; {_MAKE_AGAIN}"
                )
        self._score_manifests.clear()
        self.parts = parts
        self._num_tokens = sum(record.num_tokens for record in parts.values())
        self.part_ids = np.repeat(np.array(list(parts), np.int64), [record.num_rollouts for record in parts.values()])
        self.starts = _concat([offsets[:-1] for offsets in small["offsets"]], np.int64)
        self.lengths = _concat([np.diff(offsets) for offsets in small["offsets"]], np.int64)
        self.prompt_lens = _concat(small["prompt_len"], np.int32)
        self.prompt_indices = _concat(small["prompt_index"], np.int64)
        self.sample_indices = _concat(small["sample_index"], np.int32)
        self.finishes = _concat(small["finish"], np.uint8)
        if self.teacher is not None:
            self._keep_scored(self.teacher)

    def _keep_scored(self, teacher: str) -> None:
        """Leave out what `teacher` could not score. Parts that it has not scored at all stay: `check_scored` names them."""
        keep = np.ones(len(self.lengths), bool)
        for part in self.parts:
            record = self.score_manifest(part, teacher)
            if record is None or (not record.excluded and record.max_tokens is None):
                continue
            rows = np.flatnonzero(self.part_ids == part)
            keep[rows] = [self._exclusion(record, int(index)) is None for index in rows]
            if record.max_tokens is not None:
                self.finishes[rows] = np.where(self.lengths[rows] > record.max_tokens, Finish.LENGTH, self.finishes[rows])
                self.lengths[rows] = np.minimum(self.lengths[rows], record.max_tokens)
        for name in ("part_ids", "starts", "lengths", "prompt_lens", "prompt_indices", "sample_indices", "finishes"):
            setattr(self, name, getattr(self, name)[keep])

    def _exclusion(self, record: ScoreManifest, index: int) -> str | None:
        """Why rollout `index` has no scores."""
        name = (int(self.prompt_indices[index]), int(self.sample_indices[index]))
        return next((entry.reason for entry in record.excluded if (entry.prompt_index, entry.sample_index) == name), None)

    def _sealed_parts(self) -> list[int]:
        return [
            int(name)
            for name in self.location.children("parts")
            if name.isdigit() and self.location.read_attributes(part_group(int(name))) is not None
        ]

    def _part_manifest(self, part: int) -> PartManifest:
        where = self.location.show(part_group(part))
        attributes = self.location.read_attributes(part_group(part))
        record = _parse(PartManifest, attributes, where, ("tokens", "student_logp", *_SMALL_ARRAYS))
        if record.part != part:
            raise StoreError(f"{where}: holds part {record.part}; was the folder renamed?")
        return record

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def response_lens(self) -> np.ndarray:
        return self.lengths - self.prompt_lens

    def missing_parts(self) -> list[int]:
        """Parts that are not sealed yet."""
        return [part for part in range(self.manifest.num_parts) if part not in self.parts]

    def teachers(self) -> list[str]:
        """Names of the teachers that scored at least one part."""
        names = {name for part in self.parts for name in self.location.children(f"{part_group(part)}/teacher")}
        return sorted(name for name in names if any(self.score_manifest(part, name) for part in self.parts))

    def score_manifest(self, part: int, teacher: str) -> ScoreManifest | None:
        """Manifest of a teacher's scores of a part, None if it did not score it. Raises StoreError if it scored other rollouts."""
        key = (part, teacher)
        if key not in self._score_manifests:
            attributes = self.location.read_attributes(score_group(part, teacher))
            if attributes is None:
                return None
            where = self.location.show(score_group(part, teacher))
            record = _parse(ScoreManifest, attributes, where, ("logp", "topk_ids", "topk_logp") if attributes.get("top_k") else ("logp",))
            if record.part_crc32c != self.parts[part].crc32c:
                raise StoreError(f"{where}: scores of other rollouts than part {part} now holds; delete and score again")
            self._score_manifests[key] = record
        return self._score_manifests[key]

    def unscored_parts(self, teacher: str) -> list[int]:
        """Sealed parts that `teacher` has not scored."""
        return [part for part in self.parts if self.score_manifest(part, teacher) is None]

    def check_complete(self, teacher: str | None = None) -> None:
        """Raise StoreError unless every part is sealed and, with `teacher`, scored by one and the same model."""
        missing = self.missing_parts()
        if missing:
            raise StoreError(
                f"{self.location.url}: {len(missing)} of {self.manifest.num_parts} parts are not sealed (first: {missing[:5]}); run the stage again to finish it"
            )
        if teacher is not None:
            self.check_scored(teacher)

    def check_scored(self, teacher: str) -> None:
        """Raise StoreError unless `teacher` scored every sealed part, with one and the same model."""
        unscored = self.unscored_parts(teacher)
        if unscored:
            known = self.teachers()
            raise StoreError(
                f"{self.location.url}: teacher {teacher!r} has not scored {len(unscored)} of {len(self.parts)} parts (first: {unscored[:5]}); "
                f"run 'megatron-opd score' (scored by: {', '.join(known) or 'nobody'})"
            )
        models = {
            record.teacher.weights_sha256: record.teacher.short() for part in self.parts if (record := self.score_manifest(part, teacher))
        }
        if len(models) > 1:
            raise StoreError(
                f"{self.location.url}: teacher {teacher!r} is {len(models)} different models: {', '.join(models.values())}; delete the odd parts and score again"
            )

    def rollout(self, index: int) -> Rollout:
        """Rollout `index` (0 <= index < len(self))."""
        part, rows = self._locate(index)
        record = self.parts[part]
        group = part_group(part)
        tokens, student_logp = (self._rows(group, name, rows, record.crc32c[name]) for name in ("tokens", "student_logp"))
        try:
            return Rollout(
                tokens=tokens,
                prompt_len=int(self.prompt_lens[index]),
                prompt_index=int(self.prompt_indices[index]),
                sample_index=int(self.sample_indices[index]),
                finish=Finish(int(self.finishes[index])),
                student_logp=student_logp,
            )
        except ValueError as error:
            raise StoreError(f"{self.location.show(group)}, rollout {index}: {error}; {_MAKE_AGAIN}") from None

    def scores(self, index: int, teacher: str, *, topk: bool = False) -> TeacherScores:
        """Scores of rollout `index` by `teacher`, with its top-K arrays if `topk`. Raises StoreError where there are none.

        Of a rollout that was scored in part they have the length that was scored.
        """
        part, rows = self._locate(index)
        record = self.score_manifest(part, teacher)
        if record is None:
            raise StoreError(f"{self.location.show(part_group(part))}: not scored by teacher {teacher!r}; run 'megatron-opd score'")
        if topk and not record.top_k:
            raise StoreError(f"{self.location.show(score_group(part, teacher))}: no top-k scores; score with score.top_k > 0")
        group = score_group(part, teacher)
        if (reason := self._exclusion(record, index)) is not None:
            raise StoreError(
                f"{self.location.show(group)}, rollout {index}: has no scores: {reason}; open the store with teacher={teacher!r}"
            )
        rollout = self.rollout(index).cut(record.max_tokens)
        rows = slice(rows.start, rows.start + len(rollout.tokens))
        names = ("logp", "topk_ids", "topk_logp") if topk else ("logp",)
        arrays = [self._rows(group, name, rows, record.crc32c[name]) for name in names]
        scores = TeacherScores(arrays[0], *(arrays[1:2]), *(array.astype(np.float32) for array in arrays[2:]))
        try:
            scores.check_against(rollout)
        except ValueError as error:
            raise StoreError(f"{self.location.show(group)}, rollout {index}: {error}; {_MAKE_AGAIN}") from None
        return scores

    def part_rollouts(self, part: int) -> list[Rollout]:
        """All rollouts of a sealed part."""
        if part not in self.parts:
            raise StoreError(f"{self.location.show(part_group(part))}: not sealed")
        return [self.rollout(int(index)) for index in np.flatnonzero(self.part_ids == part)]

    def verify(self) -> list[str]:
        """Read everything and compare every checksum; returns what is wrong, a sentence each."""
        problems = []
        for part, record in self.parts.items():
            groups = [(part_group(part), record.crc32c)]
            for teacher in self.location.children(f"{part_group(part)}/teacher"):
                try:
                    scores = self.score_manifest(part, teacher)
                except StoreError as error:
                    problems.append(str(error))
                    continue
                if scores is not None:
                    groups.append((score_group(part, teacher), scores.crc32c))
            for group, sums in groups:
                for name, crc32c in sums.items():
                    try:
                        self.location.read_array(group, name, crc32c=crc32c)
                    except StoreError as error:
                        problems.append(str(error))
        return problems

    def _locate(self, index: int) -> tuple[int, slice]:
        if not 0 <= index < len(self):
            raise IndexError(f"rollout {index} of {len(self)}")
        start = int(self.starts[index])
        return int(self.part_ids[index]), slice(start, start + int(self.lengths[index]))

    def _rows(self, group: str, name: str, rows: slice, crc32c: int) -> np.ndarray:
        """Rows of an array through the cache: the whole array if the store fits in memory, else blocks of it."""
        if self._num_tokens * 12 <= self._cache.max_bytes and not name.startswith("topk"):
            return self._cache.whole(group, name, crc32c)[rows]
        return self._cache.rows(group, name, crc32c, rows)
