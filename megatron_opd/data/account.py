"""Whether the rollouts of a store are those that were asked for: each (prompt, sample) once, in the part that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_opd.records import Finish
from megatron_opd.store_records import PartManifest, Segment, StoreManifest


def find_fault(
    manifest: StoreManifest,
    parts: dict[int, PartManifest],
    *,
    part_ids: np.ndarray,
    lengths: np.ndarray,
    prompt_lens: np.ndarray,
    prompt_indices: np.ndarray,
    sample_indices: np.ndarray,
    finishes: np.ndarray,
) -> tuple[int, str] | None:
    """The first part with a fault, and the fault; an entry a rollout in each array, all integers, [n]."""
    excluded = [(part, entry.prompt_index, entry.sample_index) for part, record in parts.items() for entry in record.excluded]
    excluded_parts, excluded_prompts, excluded_samples = np.array(excluded, np.int64).reshape(-1, 3).T
    owner = np.concatenate([part_ids, excluded_parts])  # of rollouts, then of exclusions
    prompts = np.concatenate([prompt_indices, excluded_prompts])
    samples = np.concatenate([sample_indices.astype(np.int64), excluded_samples])
    numbers = np.array(list(parts), np.int64)  # in order
    at = np.searchsorted(numbers, owner)
    bounds = [_bounds(segment, part) for part, segment in _with_segments(manifest, parts)]
    prompt, prompt_end, sample, sample_end = np.array(bounds, np.int64).reshape(-1, 4).T
    per_prompt = manifest.samples_per_prompt

    def name(row: int) -> str:
        return f"prompt {prompts[row]}, sample {samples[row]}"

    for fault, wrong in (
        ("belongs to another part", (prompts < prompt[at]) | (prompts >= prompt_end[at])),
        (f"is none of the {per_prompt} samples of its prompt", (samples < 0) | (samples >= per_prompt)),
        ("belongs to another part", (samples < sample[at]) | (samples >= sample_end[at])),
        ("has a prompt that is not a part of its tokens", (prompt_lens < 1) | (prompt_lens >= lengths)),
        ("ends for a reason that is none", finishes > max(Finish)),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            return int(owner[row]), f"{name(row)} {fault}"
    keys = prompts * per_prompt + samples
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if twice.size:
        row = int(order[twice[0] + 1])
        return int(owner[row]), f"{name(row)} is there twice"
    found = np.bincount(at, minlength=len(numbers))
    expected = (prompt_end - prompt) * (sample_end - sample)
    if (found != expected).any():
        number = int((found != expected).argmax())
        return int(numbers[number]), f"{found[number]} rollouts and exclusions, {expected[number]} belong to it"
    return None


def _with_segments(manifest: StoreManifest, parts: dict[int, PartManifest]) -> Iterator[tuple[int, Segment]]:
    """Each part, in order, with its segment."""
    segments = manifest.segments()
    number = 0
    for part in parts:
        while number + 1 < len(segments) and segments[number + 1].first_part <= part:
            number += 1
        yield part, segments[number]


def _bounds(segment: Segment, part: int) -> tuple[int, int, int, int]:
    """First prompt, the one behind the last, first sample, the one behind the last."""
    prompts = segment.prompt_range(part)
    return prompts.start, prompts.stop, segment.samples.start, segment.samples.stop
