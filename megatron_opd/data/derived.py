"""Makes derived teachers: scores made of another teacher's scores of a whole store, part by part. docs/scoring.md, docs/store-format.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd.cost.meter import provenance
from megatron_opd.data.manifests import part_id, read_scores, score_group, source_id
from megatron_opd.data.recurring import RecurringPart, response_tokens
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.errors import StoreError
from megatron_opd.records import Derivation, Rollout, TeacherScores
from megatron_opd.store_records import Derived, ScoreManifest

Scored = tuple[Rollout, TeacherScores | None]


@dataclass(frozen=True)
class Plan:
    """What is left to do of derived teacher `name`: the parts that have no scores of it, or such of what is no more."""

    name: str
    wanted: Derived
    parts: list[int]

    def tokens(self, reader: StoreReader) -> int:
        """Response tokens that will be read."""
        counts = {part: record.num_response_tokens for part, record in reader.parts.items()}
        fitted = sum(counts.values()) if self.wanted.method == "residualize" and self.parts else 0
        return fitted + sum(counts[part] for part in self.parts)


def plan_derived(reader: StoreReader, name: str, derivation: Derivation) -> Plan:
    """What is missing or stale of teacher `name`. Raises StoreError where its source has not scored the whole store, and where a part has scores
    of this name that no source explains, or that were made otherwise."""
    reader.check_complete(derivation.source)
    scores = {part: record for part in reader.parts if (record := reader.score_manifest(part, derivation.source))}
    if any(record.derived is not None for record in scores.values()):
        raise StoreError(f"{reader.location.url}: teacher {derivation.source!r} is derived itself; name the one that a model scored for")
    if derivation.method == "residualize" and reader.manifest.sampler_role != "student":
        raise StoreError(
            f"{reader.location.url}: answers of a {reader.manifest.sampler_role}, whose log-probabilities are stored in place of pi_ref's; "
            "what recurs is found on rollouts of the student (megatron-opd rollout)"
        )
    wanted = Derived(**derivation.model_dump(), source_id=source_id(reader.parts, scores))
    return Plan(name, wanted, [part for part in reader.parts if _is_due(reader, part, name, wanted)])


def derive(reader: StoreReader, plan: Plan, progress: Callable[[int], object] = lambda tokens: None) -> str:
    """Do what is planned; returns a sentence on what was found in it. `progress` hears of response tokens that were read.

    Of the same store any number of workers make the same scores, in whatever order; what one that was killed has sealed is kept. Raises StoreError.
    """
    name, wanted = plan.name, plan.wanted
    method = _methods[wanted.method](reader, wanted, progress)
    for part in plan.parts:
        scored = list(part_scores(reader, part, wanted.source))
        derived = method.scores(part, scored)
        own = reader.score_manifest(part, wanted.source)
        assert own is not None
        record = ScoreManifest(
            part=part,
            teacher=own.teacher,
            max_tokens=own.max_tokens,
            excluded=own.excluded,
            allow_teacher_mismatch=own.allow_teacher_mismatch,
            derived=wanted,
            part_crc32c=own.part_crc32c,
            crc32c={},
            provenance=provenance(),
        )
        if _is_due(reader, part, name, wanted):  # another worker may have made it meanwhile
            if reader.location.read_attributes(group := score_group(part, name)) is not None:
                reader.location.remove_group(group)
            write_scores(reader.location, name, record, [rollout for rollout, _ in scored], derived)
        progress(reader.parts[part].num_response_tokens)
    reader.refresh()
    return method.summary()


def part_scores(reader: StoreReader, part: int, teacher: str) -> Iterator[Scored]:
    """Each rollout of a part and its scores, which may be those of its beginning alone, or none. Checksums are compared. Raises StoreError."""
    reader.check_sampled(part, teacher)
    record = reader.score_manifest(part, teacher)
    assert record is not None
    out = {(entry.prompt_index, entry.sample_index) for entry in record.excluded}
    rows = reader.part_rows(part)
    for index in range(rows.start, rows.stop):
        rollout = reader.rollout(index)
        is_out = (rollout.prompt_index, rollout.sample_index) in out
        yield rollout, None if is_out else reader.scores(index, teacher)


def _is_due(reader: StoreReader, part: int, name: str, wanted: Derived) -> bool:
    """Whether the part has no scores of this name, or such that were made of others. Raises StoreError for those that must not be replaced."""
    identity = part_id(reader.manifest, reader.store_id, part)
    found = read_scores(reader.location, reader.parts[part], name, identity)
    if found is None or found[0].derived == wanted:
        return found is None
    where, derived = reader.location.show(score_group(part, name)), found[0].derived
    if derived is None:
        raise StoreError(f"{where}: scores of a model, {found[0].teacher.short()}; give the derived teacher another name")
    if derived.derivation != wanted.derivation:
        raise StoreError(
            f"{where}: derived otherwise, {derived.describe()}, now {wanted.describe()}; give this one another name, or delete that one (teacher/{name} of every part)"
        )
    return True


class _Residualize:
    """Takes off what recurs; made, it has read the whole store once."""

    def __init__(self, reader: StoreReader, derivation: Derivation, progress: Callable[[int], object]):
        self.settings: dict[str, Any] = derivation.settings
        self.recurring = RecurringPart(self.settings, reader.manifest.vocab_size)
        self._squares = np.zeros(3)  # of weights; weighted squares of d and of what is left of it; of the parts that are made
        self._made, self._parts = 0, len(reader.parts)
        for part in reader.parts:
            self.recurring.add(response_tokens(_cut(part_scores(reader, part, derivation.source)), self.settings))
            progress(reader.parts[part].num_response_tokens)
        self.recurring.fit()

    def scores(self, part: int, scored: Sequence[Scored]) -> list[TeacherScores | None]:
        self._made += 1
        pairs = _cut(scored)
        tokens = response_tokens(pairs, self.settings)
        recurs_N = self.recurring.of(tokens)
        for number, square_N in enumerate((1.0, (tokens.gap_N - self.recurring.mean) ** 2, (tokens.gap_N - recurs_N) ** 2)):
            self._squares[number] += (tokens.weight_N * square_N).sum()
        pieces = iter(np.split(recurs_N, np.cumsum([rollout.response_len for rollout, _ in pairs])))
        return [
            None
            if scores is None
            else _with_response(rollout, scores, _response(rollout, scores).astype(np.float64) - next(pieces), are_log_probs=False)
            for rollout, scores in scored
        ]

    def summary(self) -> str:
        weight, before, after = self._squares
        where = "" if self._made == self._parts else f" in {self._made} of {self._parts} parts"
        share = f", of which {1 - after / before:.1%} recurs" if before else ""
        return f"log pi_T - log pi_ref is {self.recurring.mean:.4f} nats on average, with a variance{where} of {before / max(weight, 1):.4f}{share}"


class _Shuffle:
    """Permutes the scores of a part's response tokens; which token gets which is drawn from the seed and the part's number."""

    def __init__(self, reader: StoreReader, derivation: Derivation, progress: Callable[[int], object]):
        self.seed = int(derivation.settings["seed"])

    def scores(self, part: int, scored: Sequence[Scored]) -> list[TeacherScores | None]:
        responses = [_response(rollout, scores) for rollout, scores in scored if scores is not None]
        values_N = np.concatenate(responses) if responses else np.empty(0, np.float32)
        # The numbers of a bit generator stay the same from version to version of NumPy, those of Generator may not.
        drawn_N = np.random.PCG64(np.random.SeedSequence([self.seed, part])).random_raw(len(values_N))
        pieces = iter(np.split(values_N[np.argsort(drawn_N, kind="stable")], np.cumsum([len(response) for response in responses])))
        return [None if scores is None else _with_response(rollout, scores, next(pieces)) for rollout, scores in scored]

    def summary(self) -> str:
        return "every score stays in its part"


_methods = {"residualize": _Residualize, "shuffle": _Shuffle}


def _cut(scored: Iterator[Scored] | Sequence[Scored]) -> list[tuple[Rollout, TeacherScores]]:
    """Those that have scores, each up to where it has them."""
    return [(rollout.cut(len(scores.logp)), scores) for rollout, scores in scored if scores is not None]


def _response(rollout: Rollout, scores: TeacherScores) -> np.ndarray:
    return scores.logp[rollout.prompt_len :]


def _with_response(rollout: Rollout, scores: TeacherScores, response: np.ndarray, *, are_log_probs: bool = True) -> TeacherScores:
    logp = scores.logp.copy()
    logp[rollout.prompt_len :] = response
    return TeacherScores(logp, are_log_probs=are_log_probs)
