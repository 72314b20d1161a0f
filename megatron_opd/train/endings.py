"""How the responses of a store end: what a student learns of it from SFT answers, and whether its own rollouts end as those did."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError
from megatron_opd.records import Finish, SftFacts

# Rollouts of which a smaller share ended by themselves than this share of the SFT answers' are refused: a student has not unlearnt half of
# its endings without a fault in its stop ids or its chat template.
LEAST_OF_EXPECTED = 0.5
_SIGMAS = 3.0


def sft_facts(reader: StoreReader) -> SftFacts:
    """What the store of teacher answers tells of prompts and endings."""
    manifest = reader.manifest
    ended = [token for token, _ in _endings(reader).most_common()]
    if manifest.turn_end is not None and manifest.turn_end not in ended:
        ended.append(manifest.turn_end)
    return SftFacts(
        stop_ids=ended,
        chat_templates=manifest.chat_templates,
        prompt_suffix=manifest.prompt_suffix,
        prompt_probe=manifest.prompt_probe,
        num_answers=len(reader),
        stopped_within=_stopped_within(reader),
    )


def _endings(reader: StoreReader) -> Counter[int]:
    """How many responses each stop id ended."""
    counts: Counter[int] = Counter()
    for part, record in reader.parts.items():
        if record.endings is not None:
            counts.update(record.endings)
        else:  # of an older version
            counts.update(int(rollout.tokens[-1]) for rollout in reader.part_rollouts(part) if rollout.finish is Finish.STOP)
    return counts


def _stopped_within(reader: StoreReader) -> dict[int, float]:
    """Share of the responses that ended by themselves in at most so many tokens: powers of two, and the longest."""
    lengths = reader.response_lens[reader.finishes == Finish.STOP]
    if not lengths.size:
        return {}
    longest = int(lengths.max())
    limits = [*(1 << power for power in range(longest.bit_length()) if 1 << power < longest), longest]
    return {limit: float((lengths <= limit).sum() / len(reader)) for limit in limits}


def check_endings(reader: StoreReader, stop_ids: set[int], sft: SftFacts | None, *, allow: bool) -> list[str]:
    """Raise StoreError for rollouts that end otherwise than the SFT answers, or go on behind one of `stop_ids`.

    With `allow`, returns the sentences that are recorded and printed instead.
    """
    problems = [_going_on(reader, stop_ids), _never_ending(reader, sft)]
    found = [problem for problem in problems if problem is not None]
    if found and not allow:
        raise StoreError(
            f"{'; '.join(found)}. Sample again with the right stop ids and chat template ('check --stage inputs' shows both); "
            "allow_stop_mismatch = true goes on all the same, and is recorded"
        )
    return [f"stop mismatch allowed: {problem}" for problem in found]


def _going_on(reader: StoreReader, stop_ids: set[int]) -> str | None:
    """What stands behind a stop id inside a response. Sealed parts hold nothing behind the ids of their manifest, so others are looked for."""
    unseen = sorted(stop_ids - set(reader.manifest.stop_ids))
    if not unseen:
        return None
    tokens = responses = 0
    for part in reader.parts:
        for rollout in reader.part_rollouts(part):
            stops = np.flatnonzero(np.isin(rollout.tokens[rollout.prompt_len : -1], unseen))
            if stops.size:
                responses += 1
                tokens += rollout.response_len - 1 - int(stops[0])
    if not responses:
        return None
    known = f"its manifest's stop ids are {reader.manifest.stop_ids}" if reader.manifest.stop_ids else "its manifest names no stop ids"
    return f"{reader.location.url}: {responses} of {len(reader)} responses go on behind a stop id of {unseen} ({tokens} tokens; {known})"


def _never_ending(reader: StoreReader, sft: SftFacts | None) -> str | None:
    """What is wrong with the share of responses that ended by themselves; their number is taken as binomial."""
    if sft is None or not len(reader):
        return None
    # As they were sampled: a reader counts what the teacher could not score to its end as cut.
    sampled = sum(record.num_rollouts for record in reader.parts.values())
    limit = reader.manifest.sampling.max_new_tokens
    expected, share = sft.expected_stop_share(limit), _endings(reader).total() / sampled
    least = LEAST_OF_EXPECTED * expected
    if share + _SIGMAS * (least * (1 - least) / sampled) ** 0.5 >= least:
        return None
    return (
        f"{reader.location.url}: {share:.1%} of the responses ended by themselves, but of the SFT answers {expected:.1%} did within "
        f"{limit} tokens"
    )
