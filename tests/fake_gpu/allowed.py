"""Where a step makes the host wait for the GPU, and copies that block or are not pinned: all of them, each with its reason and its number.

An entry that finds less or more than its number fails, and so does what no entry finds. Whoever removes a wait removes its entry with it.
The aim is one entry: the read of the step's numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cases import OLDEST, Case
from oracle import layout_of, made_again

from megatron_opd.estimate.memory import layers_of_stage


@dataclass(frozen=True)
class Allowed:
    """`where`: a regular expression of what the ledger says, kind and place.

    count: how often in a step of a case on a Megatron-Core; None: as often as there are pieces of parameters, which the estimate does not know.
    """

    reason: str
    where: str
    count: Callable[[Case, str], int | None]


def _once(case: Case, version: str) -> int:
    return 1


def _dispatches(case: Case, version: str) -> int:
    """Of tokens to experts, those of layers that are run again included."""
    layers = layers_of_stage(case.arch, layout_of(case), case.pipeline_stage)
    return case.micro_batches * layers * (1 + made_again(case).feed_forward) if case.arch.num_experts else 0


def _local_permutations(case: Case, version: str) -> int:
    return 2 * _dispatches(case, version) if not case.with_te and version == OLDEST else 0


def _offloaded(case: Case, version: str) -> int | None:
    return None if case.config.optimizer_offload else 0


def _scaled_moments(case: Case, version: str) -> int | None:
    return None if case.config.moments_dtype == "fp8" else 0


ALLOWED = [
    Allowed("the step's numbers, read once", r"tolist  megatron_opd/train/update\.py:update", _once),
    Allowed(
        "how many tokens every expert is sent: sizes of products and messages",
        r"event\.synchronize  megatron/core/transformer/moe/token_dispatcher\.py:_maybe_dtoh_and_synchronize",
        _dispatches,
    ),
    Allowed(
        "without Transformer Engine's kernels Megatron-Core sorts tokens by a mask",
        r"masked_select  megatron/core/transformer/moe/moe_utils\.py:permute",
        _local_permutations,
    ),
    Allowed(
        "the optimizer on the CPU waits for each gradient that it updates with",
        r"event\.synchronize  megatron/core/optimizer/cpu_offloading/hybrid_optimizer\.py:step",
        _offloaded,
    ),
    Allowed(
        "its weights are made bf16 on the CPU, in memory that is not pinned, and sent back after the step",
        r"cpu->cuda pageable async \d+ B  megatron/core/optimizer/cpu_offloading/hybrid_optimizer\.py:param_copy_back_gpu_hook",
        _offloaded,
    ),
    Allowed(
        "Transformer Engine's Adam sends the scale of each FP8 moment",
        r"cpu->cuda BLOCKING 4 B  transformer_engine/pytorch/optimizers/fused_adam\.py:_apply_scale",
        _scaled_moments,
    ),
]


def faults(found: Iterable[tuple[str, int]], case: Case, version: str, allowed: list[Allowed] = ALLOWED) -> list[str]:
    """What differs between the waits and copies of a step on a Megatron-Core and the list, a line each; [] if nothing does."""
    seen: Counter[str] = Counter()
    for text, number in found:
        seen[re.sub(r":\d+:", ":", text)] += number  # of a file's lines nothing is said
    counts: Counter[int] = Counter()
    lines = []
    for text, number in seen.items():
        fitting = [index for index, entry in enumerate(allowed) if re.match(entry.where, text)]
        if len(fitting) != 1:
            lines.append(f"{'no entry' if not fitting else 'several entries'} of allowed.py for {number} x {text}")
        for index in fitting[:1]:
            counts[index] += number
    for index, entry in enumerate(allowed):
        wanted = entry.count(case, version)
        if (not counts[index]) if wanted is None else counts[index] != wanted:
            lines.append(f"{counts[index]} instead of {'some' if wanted is None else wanted} x {entry.where} ({entry.reason})")
    return lines
