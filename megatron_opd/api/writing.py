"""Stores written from Python, by those who sample or score with code of their own, with the checks of `rollout`, `generate` and `score`.

Legend: P prompt tokens, R response tokens, K teacher candidates. Arrays are of the response alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from pydantic import ValidationError

from megatron_opd.api.store import StoredRollout, open_store
from megatron_opd.cost.meter import provenance
from megatron_opd.data.joining import join_store
from megatron_opd.data.location import Location
from megatron_opd.data.prompts import hash_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_part, write_scores
from megatron_opd.errors import ConfigError, LineageError, StoreError
from megatron_opd.hf.lineage import LINEAGE_FILE, fingerprint_model, load_tokenizer
from megatron_opd.hf.model_config import read_context_length
from megatron_opd.recipe.config import GenerateStage, RolloutStage, SampleStage, ScoreStage
from megatron_opd.recipe.files import explain
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import Finish, Prompt, PromptFile, Rollout, SamplingParams, TeacherScores
from megatron_opd.serve.encode import encode_prompts, find_overlong, uses_template
from megatron_opd.serve.engine import GenerateRequest
from megatron_opd.serve.import_responses import declared_lineage
from megatron_opd.serve.sample import account, longest_prompt, prompt_format, read_stage_prompts
from megatron_opd.serve.score import account_scores, check_scoring, largest_candidate
from megatron_opd.serve.stage import Shard
from megatron_opd.store_records import Excluded, ScoreManifest, StoreManifest

_IN_PYTHON = "(given in Python)"
_ENGINE = {"kind": "python"}
Numbers = Sequence[float] | np.ndarray
Ids = Sequence[int] | np.ndarray


def create_store(
    store: str | Path,
    *,
    model: str | Path,
    prompts: str | Path | Sequence[str | list[dict[str, Any]]],
    role: Literal["student", "teacher"] = "student",
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    encoding: EncodingConfig | Mapping[str, Any] | None = None,
    prompts_per_part: int = 256,
    sft_teacher: str | Path | None = None,
    allow_template_mismatch: bool = False,
    max_quarantined: float | None = None,
    extend: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> StoreWriter:
    """A store for responses that code of your own samples; one that was made with the same settings is gone on with.

    `model`: directory of the model that samples. `role`: "student" for rollouts to distil on, "teacher" for SFT answers. `prompts`: a prompt
    file, or texts and chats, [{"role": ..., "content": ...}, ...]. A student's lineage is that of its directory; one that was fine-tuned
    elsewhere has none, and `sft_teacher`, the directory of the model whose answers it learnt from, declares it. That `model` made the
    responses is declared, too, and recorded so. The other arguments are fields of a recipe's [rollout] (docs/recipe-reference.md); `extend` and
    `shard` (i, n) are the flags of `rollout`.

    Raises UserError, also for prompts that leave no room for a response (encoding.overlong_prompt), LineageError where a student has no
    lineage and none is declared, StoreError for a store with other settings.
    """
    stage = _stage(
        role,
        model=str(model),
        prompts=str(prompts) if isinstance(prompts, str | Path) else _IN_PYTHON,
        store=str(store),
        sampling=SamplingParams() if sampling is None else sampling,
        encoding=EncodingConfig() if encoding is None else encoding,
        prompts_per_part=prompts_per_part,
        **({} if sft_teacher is None else {"sft_teacher": str(sft_teacher)}),
        **({"allow_template_mismatch": True} if allow_template_mismatch else {}),
        **({} if max_quarantined is None else {"max_quarantined": max_quarantined}),
    )
    prompt_file, rows = _read_prompts(stage, role, prompts)
    fingerprint, tokenizer = fingerprint_model(stage.model), load_tokenizer(stage.model)
    lineage, allowed = declared_lineage(stage, fingerprint.short(), "written from Python")
    if role == "student" and lineage.sft_teacher is None:
        raise LineageError(
            f"{stage.model}: no {LINEAGE_FILE} says whose answers this student was fine-tuned on, and no teacher could score it; "
            "declare it: sft_teacher=DIR, the directory of that model"
        )
    templated = [uses_template(prompt, stage.encoding) for prompt in rows]
    turns, lineage = prompt_format(stage, tokenizer, templated, lineage, allow_mismatch=allowed, section="rollout")
    wanted = StoreManifest(
        sampler_role=role,
        sampler=fingerprint,
        lineage=lineage,
        prompts=prompt_file,
        prompts_per_part=stage.prompts_per_part,
        sampling=stage.sampling,
        allow_template_mismatch=allowed,
        provenance=provenance(),
        **turns.manifest_fields(),
    )
    ids = encode_prompts(tokenizer, rows, turns.encoding)
    positions = read_context_length(stage.model)
    overlong = find_overlong(ids, rows, stage.encoding, max_tokens=longest_prompt(positions, stage.sampling.max_new_tokens))
    manifest = join_store(stage.store, wanted, lambda count: hash_prompts(rows[:count]), extend=extend)
    return StoreWriter(stage, manifest, ids, Shard(*shard), positions=positions, overlong=overlong)


def _stage(role: str, **fields: Any) -> SampleStage:
    """The section of a recipe that says the same. Raises ConfigError."""
    kinds: dict[str, type[SampleStage]] = {"student": RolloutStage, "teacher": GenerateStage}
    if role not in kinds:
        raise ConfigError(f"create_store: role = {role!r}; 'student' (rollouts to distil on) or 'teacher' (SFT answers) is expected")
    try:
        return kinds[role](**fields)
    except ValidationError as error:
        raise ConfigError(f"create_store: {explain(error, kinds[role])}") from None


def _read_prompts(
    stage: SampleStage, role: str, given: str | Path | Sequence[str | list[dict[str, Any]]]
) -> tuple[PromptFile, list[Prompt]]:
    if isinstance(given, str | Path):
        return read_stage_prompts(stage, role=role, answers=False)
    rows = [Prompt(number, content, where=f"prompt {number}") for number, content in enumerate(given)]
    for row in rows:
        if not row.content or not isinstance(row.content, str | list):
            raise ConfigError(
                f"create_store: {row.where} is {row.content!r:.100}; text, or chat messages [{{role, content}}, ...], is expected"
            )
    if not rows:
        raise ConfigError("create_store: no prompts are given")
    return PromptFile(name=_IN_PYTHON, sha256=hash_prompts(rows), num_prompts=len(rows)), rows


class _Writer(ABC):
    """Takes rollouts or scores by part, and seals a part when all of it is there. As a context, it says at its end what is left half given."""

    def __init__(self, location: Location, parts: Mapping[int, list[tuple[int, int]]]):
        self.location = location
        self._left = {part: list(pairs) for part, pairs in parts.items() if pairs}
        self._part_of = {pair: part for part, pairs in parts.items() for pair in pairs}
        self._given: defaultdict[int, dict[tuple[int, int], Any]] = defaultdict(dict)

    def exclude(self, request: GenerateRequest | StoredRollout, reason: str, *, failed: bool = True) -> None:
        """Leave a request out, with the reason, which the store keeps; `failed`: something went wrong, and it was not meant to be left out."""
        pair = self._check_wanted(request)
        self._take(pair, Excluded(prompt_index=pair[0], sample_index=pair[1], reason=reason, quarantined=failed))

    def close(self) -> None:
        """Raise StoreError if a part was given but in part, or could not be written: nothing of it is in the store.

        Raises QuarantineError where nothing is left to give and more than `max_quarantined` of it failed.
        """
        for part, given in self._given.items():
            if missing := [pair for pair in self._left[part] if pair not in given]:
                raise StoreError(
                    f"{self.location.url}: {len(given)} of part {part} were given, and {len(missing)} were not (prompt, sample: {missing[:5]}), so "
                    "that nothing of it was written; add them, or exclude them with the reason"
                )
        if not self._left:
            self._check_quarantined()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _check_wanted(self, request: GenerateRequest | StoredRollout) -> tuple[int, int]:
        """Its prompt and sample. Raises StoreError for what was given before, and for tokens of another store."""
        pair = (request.prompt_index, request.sample_index)
        part = self._part_of.get(pair)
        if part is None or part not in self._left or pair in self._given[part]:
            why = "is not of this writer's parts" if part is None else "was given before"
            raise StoreError(f"{self.location.url}: prompt {pair[0]}, sample {pair[1]} {why}; take those of requests()")
        if not self._has_tokens_of(request):
            raise StoreError(
                f"{self.location.url}: prompt {pair[0]}, sample {pair[1]} has other tokens here; it is of another store: take those of requests()"
            )
        return pair

    def _take(self, pair: tuple[int, int], what: Any) -> None:
        """Keep it, and seal its part if that is whole now. Where this fails, it was not given, and can be given again."""
        part = self._part_of[pair]
        given = self._given[part]
        given[pair] = what
        if len(given) == len(self._left[part]):
            try:
                self._seal(part, given)
            except BaseException:
                del given[pair]
                raise
            del self._left[part], self._given[part]

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """What was not given yet, in order."""
        for part, pairs in list(self._left.items()):
            yield from (pair for pair in pairs if pair not in self._given.get(part, {}))

    @abstractmethod
    def _has_tokens_of(self, request: Any) -> bool:
        """Whether the tokens of a request are the store's own."""

    @abstractmethod
    def _seal(self, part: int, given: dict[tuple[int, int], Any]) -> None:
        """Write a part whose pairs were all given."""

    @abstractmethod
    def _check_quarantined(self) -> None:
        """Raise QuarantineError if too much of this writer's parts failed."""


class StoreWriter(_Writer):
    """Takes responses in any order. A part is written and sealed when each of its requests was answered or excluded; until then it is in memory.

    `with create_store(...) as writer: ...` raises at its end if a part was given but in part. What is sealed stays: the same call goes on.
    """

    def __init__(
        self,
        stage: SampleStage,
        manifest: StoreManifest,
        prompts: Sequence[np.ndarray],
        shard: Shard,
        *,
        positions: int,
        overlong: list[int],
    ):
        """`prompts`: ids of each, int32 [P]; those of the rows `overlong` are left out. `positions`: tokens that the model takes."""
        sealed = StoreReader(stage.store).parts
        todo = {part: manifest.pairs(part) for part in range(manifest.num_parts) if shard.owns(part) and part not in sealed}
        skipped = set(overlong)
        asked = {part: [pair for pair in pairs if pair[0] not in skipped] for part, pairs in todo.items()}
        super().__init__(Location(stage.store), asked)
        self.manifest = manifest
        self._stage, self._shard = stage, shard
        self._positions = positions
        self._prompts = prompts
        for ids in prompts:
            ids.setflags(write=False)  # requests hand them out
        self._overlong = {
            part: [
                Excluded(prompt_index=row, sample_index=sample, reason=f"prompt of {len(prompts[row])} tokens is too long")
                for row, sample in pairs
                if row in skipped
            ]
            for part, pairs in todo.items()
        }
        for part in (part for part, pairs in asked.items() if not pairs):
            self._seal(part, {})

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a response, the last token of one that stopped by itself: what to sample with."""
        return list(self.manifest.stop_ids)

    def requests(self) -> list[GenerateRequest]:
        """What has no response yet: `prompt`, token ids int32 [P] in the model's format, with `prompt_index` and `sample_index`."""
        return [GenerateRequest(self._prompts[prompt], prompt, sample) for prompt, sample in self._pairs()]

    def add(self, request: GenerateRequest, response_ids: Ids, logp: Numbers, *, finish: Finish | None = None) -> None:
        """The response to a request: its ids [R], the end-of-turn token kept, and `logp` [R] of the model, at temperature 1 over the whole vocabulary.

        `finish` by default is STOP where the last id is a stop id, else LENGTH. Raises StoreError for what is no such response.
        """
        pair = self._check_wanted(request)
        where = f"{self.location.url}: prompt {pair[0]}, sample {pair[1]}"
        prompt = self._prompts[pair[0]]
        try:
            ids = _as_array(response_ids, np.int32, "response_ids")
            if not len(ids):
                raise ValueError("a response has at least one token")
            if finish is None:
                finish = Finish.STOP if int(ids[-1]) in self.manifest.stop_ids else Finish.LENGTH
            if len(ids) > (most := self.manifest.sampling.max_new_tokens):
                raise ValueError(f"{len(ids)} tokens, over sampling.max_new_tokens = {most}")
            _check_length(len(prompt) + len(ids), self._positions, self._stage.model)
            if (highest := int(ids.max())) >= self.manifest.vocab_size:
                raise ValueError(f"token id {highest} in a vocabulary of {self.manifest.vocab_size}")
            values = _padded(_as_array(logp, np.float32, "logp"), len(prompt), np.nan)
            rollout = Rollout(np.concatenate([prompt, ids]), len(prompt), *pair, finish, values)
            rollout.check_ending(self.manifest.stop_ids)
        except ValueError as error:
            raise StoreError(f"{where}: {error}") from None
        self._take(pair, rollout)

    def _seal(self, part: int, given: dict[tuple[int, int], Any]) -> None:
        rollouts = [entry for entry in given.values() if isinstance(entry, Rollout)]
        excluded = [*self._overlong[part], *(entry for entry in given.values() if isinstance(entry, Excluded))]
        write_part(self.location, part, rollouts, excluded, {"engine": _ENGINE, **provenance()})

    def _has_tokens_of(self, request: GenerateRequest) -> bool:
        return np.array_equal(request.prompt, self._prompts[request.prompt_index])

    def _check_quarantined(self) -> None:
        account(StoreReader(self.location.address), self._shard, self._stage, "create_store", run_dir=None)


def add_scores(
    store: str | Path,
    *,
    model: str | Path,
    teacher: str = "teacher",
    top_k: int = 0,
    topk_dtype: Literal["float32", "float16"] = "float32",
    allow_teacher_mismatch: bool = False,
    max_quarantined: float | None = None,
    shard: tuple[int, int] = (0, 1),
) -> ScoreWriter:
    """For log-probabilities that code of your own computes with the teacher in the directory `model`, into the store's group `teacher`.

    The arguments are fields of a recipe's [score]. Raises UserError for all that `score` refuses, LineageError for a teacher that is not
    the student's SFT teacher.
    """
    fields = {"store": str(store), "model": str(model), "teacher": teacher, "top_k": top_k, "topk_dtype": topk_dtype}
    fields |= {} if max_quarantined is None else {"max_quarantined": max_quarantined}
    try:
        stage = ScoreStage(**fields, allow_teacher_mismatch=allow_teacher_mismatch)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(f"add_scores: {explain(error, ScoreStage)}") from None
    return ScoreWriter(stage, Shard(*shard))


class ScoreWriter(_Writer):
    """Takes a teacher's scores in any order; those of a part are written when all its rollouts were scored or excluded. Use it as `StoreWriter`."""

    def __init__(self, stage: ScoreStage, shard: Shard):
        self._store = open_store(stage.store)
        reader = self._store.reader
        self._fingerprint = fingerprint_model(stage.model)
        self._owned = [part for part in reader.parts if shard.owns(part)]
        todo, _, self._override = check_scoring(reader, stage, self._fingerprint, self._owned)
        self._positions = read_context_length(stage.model)
        self._stage = stage
        self._rows = {part: reader.part_rows(part) for part in todo}
        names = list(zip(reader.prompt_indices.tolist(), reader.sample_indices.tolist(), strict=True))
        self._index = {names[row]: row for rows in self._rows.values() for row in range(rows.start, rows.stop)}
        super().__init__(reader.location, {part: names[rows] for part, rows in self._rows.items()})
        for part in (part for part, rows in self._rows.items() if rows.start == rows.stop):
            self._seal(part, {})  # every rollout of it was excluded

    def requests(self) -> list[StoredRollout]:
        """The rollouts that have no scores yet."""
        return list(self._store[[self._index[pair] for pair in self._pairs()]])

    def add(self, rollout: StoredRollout, logp: Numbers, topk_ids: np.ndarray | None = None, topk_logp: np.ndarray | None = None) -> None:
        """The teacher's log-probability of each response token, [R], and with top_k its candidates [R,K], temperature 1, whole vocabulary.

        Raises StoreError for what is not this.
        """
        pair = self._check_wanted(rollout)
        start = len(rollout.prompt_ids)
        try:
            _check_length(start + len(rollout.response_ids), self._positions, self._stage.model)
            scores = TeacherScores(
                _padded(_as_array(logp, np.float32, "logp"), start, np.nan),
                None if topk_ids is None else _padded(_as_array(topk_ids, np.int32, "topk_ids", 2), start, -1),
                None if topk_logp is None else _padded(_as_array(topk_logp, np.float32, "topk_logp", 2), start, np.nan),
            )
            scores.check_against(self._store.reader.rollout(self._index[pair]))
            given = 0 if scores.topk_ids is None else scores.topk_ids.shape[1]
            if given != self._stage.top_k:
                raise ValueError(f"{given} candidates a token, but top_k = {self._stage.top_k}")
            if (highest := largest_candidate([scores])) is not None and highest >= self._fingerprint.vocab_size:
                raise ValueError(f"candidate {highest} in a vocabulary of {self._fingerprint.vocab_size}")
        except ValueError as error:
            raise StoreError(f"{self.location.url}: prompt {pair[0]}, sample {pair[1]}: {error}") from None
        self._take(pair, scores)

    def _seal(self, part: int, given: dict[tuple[int, int], Any]) -> None:
        reader = self._store.reader
        rollouts = reader.part_rollouts(part)
        entries = [given[rollout.prompt_index, rollout.sample_index] for rollout in rollouts]
        scores = [entry if isinstance(entry, TeacherScores) else None for entry in entries]
        record = ScoreManifest(
            part=part,
            teacher=self._fingerprint,
            top_k=self._stage.top_k,
            largest_candidate=largest_candidate(scores),
            excluded=[entry for entry in entries if isinstance(entry, Excluded)],
            allow_teacher_mismatch=self._override is not None,
            part_crc32c=reader.parts[part].crc32c,
            crc32c={},
            engine=_ENGINE,
            provenance=provenance(),
        )
        write_scores(reader.location, self._stage.teacher, record, rollouts, scores, topk_dtype=self._stage.topk_dtype)

    def _has_tokens_of(self, request: StoredRollout) -> bool:
        own = self._store.reader.rollout(self._index[request.prompt_index, request.sample_index])
        start = own.prompt_len
        return np.array_equal(request.prompt_ids, own.tokens[:start]) and np.array_equal(request.response_ids, own.tokens[start:])

    def _check_quarantined(self) -> None:
        account_scores(StoreReader(self.location.address), self._owned, self._stage, "add_scores", run_dir=None)


def _check_length(num_tokens: int, positions: int, model: str) -> None:
    """Raise ValueError for more tokens than the model takes."""
    if num_tokens > positions:
        raise ValueError(f"prompt and response have {num_tokens} tokens, and {model} takes {positions}; exclude it with the reason")


def _as_array(values: Any, dtype: Any, name: str, dimensions: int = 1) -> np.ndarray:
    """Raises ValueError for what is no such array, and for numbers that `dtype` can't hold."""
    found = np.asarray(values)
    kinds = "iu" if np.issubdtype(dtype, np.integer) else "fiu"
    if found.ndim != dimensions or (found.size and found.dtype.kind not in kinds):
        raise ValueError(
            f"{name} must be {dimensions}-dimensional, of {'whole ' * (kinds == 'iu')}numbers, not {found.dtype} {list(found.shape)}"
        )
    cast = found.astype(dtype)
    if kinds == "iu" and (cast != found).any():
        raise ValueError(f"{name} holds {int(found[cast != found][0])}, which is no token id")
    return cast


def _padded(values: np.ndarray, prompt_len: int, fill: float) -> np.ndarray:
    """`values` with `fill` at the prompt's tokens before them."""
    return np.concatenate([np.full((prompt_len, *values.shape[1:]), fill, values.dtype), values])
