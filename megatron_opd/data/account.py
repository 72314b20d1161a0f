"""Whether the rollouts of a store are those that were asked for: each (prompt, sample) once, in the part that it belongs to."""

from __future__ import annotations

import numpy as np

from megatron_opd.records import Finish, PartManifest, StoreManifest


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
    per_prompt, per_part = manifest.sampling.samples_per_prompt, manifest.prompts_per_part
    end = np.minimum((owner + 1) * per_part, manifest.prompts.num_prompts)

    def name(row: int) -> str:
        return f"prompt {prompts[row]}, sample {samples[row]}"

    for fault, wrong in (
        ("belongs to another part", (prompts < owner * per_part) | (prompts >= end)),
        (f"is none of the {per_prompt} samples of its prompt", (samples < 0) | (samples >= per_prompt)),
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
    numbers = np.array(list(parts), np.int64)
    found = np.bincount(np.searchsorted(numbers, owner), minlength=len(numbers))
    expected = np.array([len(manifest.prompt_range(part)) * per_prompt for part in parts], np.int64)
    if (found != expected).any():
        number = int((found != expected).argmax())
        return int(numbers[number]), f"{found[number]} rollouts and exclusions, {expected[number]} belong to it"
    return None
