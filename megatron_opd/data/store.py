"""Reads a rollout store by global rollout index. `data/writer.py` writes it; layout: docs/store-format.md.

Legend: n rollouts of a part, T tokens of a part (or a rollout), K teacher candidates.
"""

from __future__ import annotations

import numpy as np

from megatron_opd.data.account import find_fault
from megatron_opd.data.cache import ArrayCache
from megatron_opd.data.location import MAKE_AGAIN, Location
from megatron_opd.data.manifests import part_group, part_id, part_number, read_manifest, read_part, read_scores, score_group, source_id
from megatron_opd.data.shards import ArrayFacts
from megatron_opd.errors import StoreError, UserError
from megatron_opd.records import Finish, Rollout, TeacherScores
from megatron_opd.safety.untrusted import one_line
from megatron_opd.store_records import PartManifest, ScoreManifest, StoreManifest

_SMALL_ARRAYS = ("offsets", "prompt_len", "prompt_index", "sample_index", "finish")


class StoreReader:
    """Rollouts and scores by global index over the sealed parts.

    What fits `memory_bytes` is read whole and kept; a larger store is read in blocks that an LRU keeps. `refresh()` sees parts
    sealed since. Anything missing, unsealed or damaged raises StoreError naming it. With `teacher`, rollouts that it could not score
    are left out, and those that it scored in part are cut there. A derived teacher that is stale is refused, unless `allow_stale`.
    """

    def __init__(self, url: str, *, teacher: str | None = None, memory_bytes: int = 4 << 30, allow_stale: bool = False):
        self.location = Location(url)
        self.teacher = teacher
        self.allow_stale = allow_stale
        self.manifest: StoreManifest
        self.store_id = ""  # of the manifest; `refresh` reads both
        self.stores: list[StoreReader] = [self]  # a reader of several has more
        self._cache = ArrayCache(self.location, memory_bytes)
        self._facts: dict[str, dict[str, ArrayFacts]] = {}  # of the arrays of a group
        self._scores: dict[tuple[int, str], ScoreManifest] = {}
        self._exclusions: dict[tuple[int, str], dict[tuple[int, int], str]] = {}  # reasons, of the rollouts in _scores[...].excluded
        self._current: set[str] = set()  # teachers whose scores are no derived ones, or are of what they were made of
        self.parts: dict[int, PartManifest] = {}
        self.notes: list[str] = []
        self.refresh()

    def refresh(self) -> None:
        """Look for parts that were sealed, and extensions that were made since.

        Raises StoreError for a part that is damaged, of another store or not of this one. `notes` then says what is odd, and no fault.
        """
        self.notes = []
        small: dict[str, list[np.ndarray]] = {name: [] for name in _SMALL_ARRAYS}
        parts: dict[int, PartManifest] = {}
        for part in self._part_numbers():
            group = part_group(part)
            found = read_part(self.location, part, part_id(self.manifest, self.store_id, part))
            if found is None:
                continue
            parts[part], self._facts[group] = found
            for name in _SMALL_ARRAYS:
                small[name].append(self._cache.whole(group, name, self._facts[group][name]))
            if small["offsets"][-1][0] != 0 or small["offsets"][-1][-1] != parts[part].num_tokens:
                raise StoreError(f"{self.location.show(group)}: its rollouts don't cover its tokens; {MAKE_AGAIN}")
        self._scores.clear()
        self._exclusions.clear()
        self._current.clear()
        self.parts = parts
        self._num_tokens = sum(record.num_tokens for record in parts.values())
        self.part_ids = np.repeat(np.array(list(parts), np.int64), [record.num_rollouts for record in parts.values()])
        self.starts = _concat([offsets[:-1] for offsets in small["offsets"]], np.int64)
        self.lengths = _concat([np.diff(offsets) for offsets in small["offsets"]], np.int64)
        self.prompt_lens = _concat(small["prompt_len"], np.int32)
        self.prompt_indices = _concat(small["prompt_index"], np.int64)
        self.sample_indices = _concat(small["sample_index"], np.int32)
        self.finishes = _concat(small["finish"], np.uint8)
        names = ("part_ids", "lengths", "prompt_lens", "prompt_indices", "sample_indices", "finishes")
        fault = find_fault(self.manifest, parts, **{name: getattr(self, name) for name in names})
        if fault is not None:
            raise StoreError(f"{self.location.show(part_group(fault[0]))}: {fault[1]}; {MAKE_AGAIN}")
        if unbound := sum(record.store_id is None for record in parts.values()):
            self.notes.append(f"{unbound} parts don't say which store they are of: an older version wrote them")
        if self.teacher is not None:
            self._keep_scored(self.teacher)

    def _part_numbers(self) -> list[int]:
        """Numbers of the folders of parts, sealed or not. Raises StoreError for one that the store can't have."""
        names = self.location.children("parts")
        numbers = {name: number for name in names if (number := part_number(name)) is not None}
        self._reread_manifest()  # after the parts were listed: an extension is written down before its first part
        for name in names:
            where = self.location.show(f"parts/{name}")
            if name not in numbers:
                self.notes.append(f"{where} is not the name of a part (six digits) and left out")
            elif numbers[name] >= self.manifest.num_parts:
                raise StoreError(f"{where}: the store has {self.manifest.num_parts} parts, from 000000 on; delete it, or move it away")
        return sorted(numbers.values())

    def _reread_manifest(self) -> None:
        """See extensions made since. Raises StoreError if it is another store by now."""
        manifest, identity = read_manifest(self.location)
        if self.store_id not in ("", identity, *(extension.extends for extension in manifest.extensions)):
            raise StoreError(
                f"{self.location.url}: was another store ({self.store_id}, now {identity}) when it was opened; run the same command again"
            )
        self.manifest, self.store_id = manifest, identity

    def _keep_scored(self, teacher: str) -> None:
        """Leave out what `teacher` could not score. Parts that it has not scored at all stay: `check_scored` names them."""
        self._check_current(teacher)
        keep = np.ones(len(self.lengths), bool)
        for part in self.parts:
            record = self.score_manifest(part, teacher)
            if record is None or (not record.excluded and record.max_tokens is None):
                continue
            rows = self.part_rows(part)
            out = self._exclusions[part, teacher]
            names = zip(self.prompt_indices[rows].tolist(), self.sample_indices[rows].tolist(), strict=True)
            keep[rows] = [name not in out for name in names]
            if record.max_tokens is not None:
                self.finishes[rows] = np.where(self.lengths[rows] > record.max_tokens, Finish.LENGTH, self.finishes[rows])
                self.lengths[rows] = np.minimum(self.lengths[rows], record.max_tokens)
            if int((~keep[rows]).sum()) != len(record.excluded) or (self.lengths[rows] <= self.prompt_lens[rows])[keep[rows]].any():
                raise StoreError(
                    f"{self.location.show(score_group(part, teacher))}: what it excludes or cuts (at {record.max_tokens} tokens) are not "
                    "responses of this part; delete and score again"
                )
        for name in ("part_ids", "starts", "lengths", "prompt_lens", "prompt_indices", "sample_indices", "finishes"):
            setattr(self, name, getattr(self, name)[keep])

    def part_rows(self, part: int) -> slice:
        """Global indices of a part's rollouts."""
        first, last = np.searchsorted(self.part_ids, [part, part + 1])
        return slice(int(first), int(last))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def response_lens(self) -> np.ndarray:
        return self.lengths - self.prompt_lens

    @property
    def num_parts(self) -> int:
        """Parts that the store will have when it is complete."""
        return self.manifest.num_parts

    def missing_parts(self) -> list[int]:
        """Parts that are not sealed yet."""
        return [part for part in range(self.manifest.num_parts) if part not in self.parts]

    def teachers(self) -> list[str]:
        """Names of the teachers that scored at least one part."""
        folders = {part: self.location.children(f"{part_group(part)}/teacher") for part in self.parts}
        names = sorted({name for children in folders.values() for name in children})
        return [name for name in names if any(name in folders[part] and self.score_manifest(part, name) for part in self.parts)]

    def default_teacher(self) -> str | None:
        """The only teacher, or of several the only one that is not derived of another; None where that is nobody or more than one."""
        names = self.teachers()
        own = [name for name in names if not self._is_derived(name)]
        return names[0] if len(names) == 1 else own[0] if len(own) == 1 else None

    def _is_derived(self, teacher: str) -> bool:
        return any(record.derived is not None for part in self.parts if (record := self.score_manifest(part, teacher)))

    def score_manifest(self, part: int, teacher: str) -> ScoreManifest | None:
        """Manifest of a teacher's scores of a part, None if it did not score it. Raises StoreError if it scored other rollouts."""
        key = (part, teacher)
        if key not in self._scores:
            found = read_scores(self.location, self.parts[part], teacher, part_id(self.manifest, self.store_id, part))
            if found is None:
                return None
            self._scores[key], self._facts[score_group(part, teacher)] = found
            self._exclusions[key] = {(entry.prompt_index, entry.sample_index): entry.reason for entry in found[0].excluded}
        return self._scores[key]

    def derived_fault(self, teacher: str) -> str | None:
        """Why the scores of a derived teacher are not what would be made of their source now; None for those that are, and for a model's."""
        found = [record.derived for part in self.parts if (record := self.score_manifest(part, teacher))]
        derived = next((entry for entry in found if entry is not None), None)
        if derived is None:
            return None
        scores = {part: record for part in self.parts if (record := self.score_manifest(part, derived.source))}
        if len(scores) < len(self.parts):
            return (
                f"{len(self.parts) - len(scores)} of {len(self.parts)} parts have no scores of {derived.source!r}, of which they are made"
            )
        if any(entry != derived for entry in found):
            return "its parts were derived of other scores, or with other settings, than one another"
        if derived.source_id != (now := source_id(self.parts, scores)):
            return f"the scores of {derived.source!r} are others since ({derived.source_id}, now {now})"
        return None

    def _check_current(self, teacher: str) -> None:
        """Raise StoreError for derived scores that are stale, unless that is allowed."""
        if self.allow_stale or teacher in self._current:
            return
        if (fault := self.derived_fault(teacher)) is not None:
            raise StoreError(
                f"{self.location.url}: the derived teacher {teacher!r} is stale: {fault}; make it again: 'megatron-opd derive'"
            )
        self._current.add(teacher)

    def unscored(self, part: int, teacher: str) -> dict[tuple[int, int], str]:
        """(prompt, sample) of the rollouts that `teacher` left out of a part that it scored, and why."""
        return self._exclusions[part, teacher] if self.score_manifest(part, teacher) is not None else {}

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
        """Raise StoreError unless `teacher` scored every sealed part, with one and the same model, and is not stale if it is derived."""
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
        self._check_current(teacher)

    def rollout(self, index: int) -> Rollout:
        """Rollout `index` (0 <= index < len(self))."""
        part, rows = self._locate(index)
        group = part_group(part)
        tokens, student_logp = (self._rows(group, name, rows) for name in ("tokens", "student_logp"))
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
            raise StoreError(f"{self.location.show(group)}, rollout {index}: {error}; {MAKE_AGAIN}") from None

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
        self._check_current(teacher)
        group = score_group(part, teacher)
        name = (int(self.prompt_indices[index]), int(self.sample_indices[index]))
        if (reason := self._exclusions[part, teacher].get(name)) is not None:
            raise StoreError(
                f"{self.location.show(group)}, rollout {index}: has no scores: {one_line(reason)}; open the store with teacher={teacher!r}"
            )
        rollout = self.rollout(index)
        names = ("logp", "topk_ids", "topk_logp") if topk else ("logp",)
        try:
            rollout = rollout.cut(record.max_tokens)
            rows = slice(rows.start, rows.start + len(rollout.tokens))
            arrays = [self._rows(group, name, rows) for name in names]
            are_log_probs = record.derived is None or record.derived.are_log_probs
            scores = TeacherScores(
                arrays[0], *(arrays[1:2]), *(array.astype(np.float32) for array in arrays[2:]), are_log_probs=are_log_probs
            )
            scores.check_against(rollout)
        except StoreError:
            raise
        except ValueError as error:
            raise StoreError(f"{self.location.show(group)}, rollout {index}: {error}; {MAKE_AGAIN}") from None
        return scores

    def part_rollouts(self, part: int) -> list[Rollout]:
        """All rollouts of a sealed part."""
        if part not in self.parts:
            raise StoreError(f"{self.location.show(part_group(part))}: not sealed")
        rows = self.part_rows(part)
        return [self.rollout(index) for index in range(rows.start, rows.stop)]

    def check_sampled(self, part: int, teacher: str | None = None) -> None:
        """Raise StoreError unless the tokens of a sealed part, the sampler's log-probabilities and those of a `teacher` that scored it have
        the checksums of their manifests."""
        group = part_group(part)
        for name in ("tokens", "student_logp"):
            self._cache.whole(group, name, self._facts[group][name])
        if teacher is not None and self.score_manifest(part, teacher) is not None:
            group = score_group(part, teacher)
            self._cache.whole(group, "logp", self._facts[group]["logp"])

    def verify(self) -> list[str]:
        """Read everything and compare every checksum; returns what is wrong, a sentence each."""
        problems: list[str] = []

        def read(group: str) -> None:
            for name, facts in self._facts[group].items():
                try:
                    self.location.read_array(group, name, facts=facts)
                except UserError as error:
                    problems.append(str(error))

        for part in self.parts:
            read(part_group(part))
            for teacher in self.location.children(f"{part_group(part)}/teacher"):
                try:
                    if self.score_manifest(part, teacher) is not None:
                        read(score_group(part, teacher))
                except UserError as error:
                    problems.append(str(error))
        return problems

    def _locate(self, index: int) -> tuple[int, slice]:
        if not 0 <= index < len(self):
            raise IndexError(f"rollout {index} of {len(self)}")
        start = int(self.starts[index])
        return int(self.part_ids[index]), slice(start, start + int(self.lengths[index]))

    def _rows(self, group: str, name: str, rows: slice) -> np.ndarray:
        """Rows of an array through the cache: the whole array if the store fits in memory, else blocks of it."""
        facts = self._facts[group][name]
        if self._num_tokens * 12 <= self._cache.max_bytes and not name.startswith("topk"):
            return self._cache.whole(group, name, facts)[rows]
        return self._cache.rows(group, name, facts, rows)


def _concat(arrays: list[np.ndarray], dtype: type[np.number]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
