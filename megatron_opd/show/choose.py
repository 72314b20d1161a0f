"""Which rollouts of a store are shown: filtered and sorted in one pass that keeps no more than what was asked for."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.records import Finish
from megatron_opd.show.items import Place, disagreement
from megatron_opd.show.tokens import TokenTexts
from megatron_opd.show.verdicts import ORDER, Verdicts

Sort = Literal["disagreement", "length", "verdict"]
Only = Literal["unfinished", "wrong", "excluded"]


@dataclass(frozen=True)
class Query:
    """What is asked for. `sort`: None for the order of the store; `search`: a text that prompt or response hold."""

    limit: int
    prompt: int | None = None
    search: str | None = None
    sort: Sort | None = None
    only: Only | None = None


def choose(reader: StoreReader, teacher: str | None, query: Query, verdicts: Verdicts, texts: TokenTexts) -> list[Place]:
    """At most `query.limit` rollouts, in their order. Raises UserError for a question that this store can't answer.

    Only `search` and the order by disagreement read tokens; memory is that of the result.
    """
    _check(reader, teacher, query, verdicts, texts)
    excluded = _excluded(reader, teacher)
    places = _filtered(reader, query, verdicts, excluded)
    if query.sort in ("length", "verdict"):
        places = iter(sorted(places, key=lambda place: _key(reader, place, query, verdicts)))
    if query.search is not None:
        needle = query.search.encode(errors="surrogatepass")
        places = (place for place in places if place.index is not None and needle in texts.raw(reader.rollout(place.index).tokens.tolist()))
    if query.sort != "disagreement":
        return list(islice(places, query.limit))
    assert teacher is not None
    return heapq.nsmallest(query.limit, places, key=lambda place: (-_disagreement(reader, place, teacher), place.index or 0))


def _check(reader: StoreReader, teacher: str | None, query: Query, verdicts: Verdicts, texts: TokenTexts) -> None:
    where = reader.location.url
    if query.prompt is not None and not 0 <= query.prompt < reader.manifest.num_prompts:
        raise UserError(f"--prompt {query.prompt}: {where} has the prompts 0 to {reader.manifest.num_prompts - 1}")
    if query.search is not None and not texts.known:
        raise UserError("--search looks for a text, and no tokenizer of this store was found; give --tokenizer DIR")
    if query.sort == "disagreement" and teacher is None:
        raise UserError(f"{where}: no teacher scored it, so that nothing can be sorted by disagreement; run 'megatron-opd score'")
    if (query.only == "wrong" or query.sort == "verdict") and not verdicts.rows:
        raise UserError(f"{where}: verdicts are {verdicts.source}")


def _excluded(reader: StoreReader, teacher: str | None) -> dict[tuple[int, int], str]:
    """Reasons, of what has no response and what has no scores."""
    found: dict[tuple[int, int], str] = {}
    for part, record in reader.parts.items():
        scores = None if teacher is None else reader.score_manifest(part, teacher)
        for who, entries in (("", record.excluded), ("no scores: ", scores.excluded if scores is not None else [])):
            found |= {(entry.prompt_index, entry.sample_index): who + entry.reason for entry in entries}
    return found


def _filtered(reader: StoreReader, query: Query, verdicts: Verdicts, excluded: dict[tuple[int, int], str]) -> Iterator[Place]:
    """Without `search`, in the order of the store; rollouts that were excluded when it was made come last, and only if they are asked for."""
    keep = np.ones(len(reader), bool)
    if query.prompt is not None:
        keep &= reader.prompt_indices == query.prompt
    if query.only == "unfinished":
        keep &= reader.finishes != Finish.STOP
    for index in np.flatnonzero(keep).tolist():
        name = int(reader.prompt_indices[index]), int(reader.sample_indices[index])
        row = verdicts.get(name)
        if query.only == "wrong" and (row is None or row.outcome == "right"):
            continue
        if query.only == "excluded" and name not in excluded:
            continue
        yield Place(name, index, excluded.get(name))
    if query.only == "excluded" or query.prompt is not None:
        there = set(zip(reader.prompt_indices.tolist(), reader.sample_indices.tolist(), strict=True))
        for name, reason in sorted(excluded.items()):
            asked = query.only in (None, "excluded") and query.prompt in (None, name[0])
            if asked and name not in there:
                yield Place(name, None, reason)


def _key(reader: StoreReader, place: Place, query: Query, verdicts: Verdicts) -> tuple[int, int]:
    """The longest first; or by verdict, those without one last."""
    index = -1 if place.index is None else place.index
    if query.sort == "length":
        return (int(reader.prompt_lens[index] - reader.lengths[index]) if index >= 0 else 0, index)
    row = verdicts.get(place.name)
    return (len(ORDER) if row is None or row.outcome not in ORDER else ORDER.index(row.outcome), index)


def _disagreement(reader: StoreReader, place: Place, teacher: str) -> float:
    """In nats; -1 for what has no scores, which so comes last."""
    if place.index is None or place.excluded is not None or reader.score_manifest(int(reader.part_ids[place.index]), teacher) is None:
        return -1.0
    scores = reader.scores(place.index, teacher)
    return disagreement(scores.logp - reader.rollout(place.index).student_logp[: len(scores.logp)])
