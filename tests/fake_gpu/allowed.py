"""Where a step makes the host wait for the GPU, and copies that block or are not pinned: all of them, each with its reason and its number.

An entry that finds less or more than its number fails, and so does what no entry finds. Whoever removes a wait removes its entry with it.
The aim is one entry: the read of the step's numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cases import Case


@dataclass(frozen=True)
class Allowed:
    """`where`: a regular expression of what the ledger says, kind and place; `count`: how often in a step of a case."""

    reason: str
    where: str
    count: Callable[[Case], int]


def _once(case: Case) -> int:
    return 1


def _chunks(case: Case) -> int:
    return case.config.parallel.vpp


def _on_last_stage(times: int) -> Callable[[Case], int]:
    """So often in each micro-batch of a rank that has the loss."""
    return lambda case: times * case.micro_batches if case.pipeline_stage == case.config.parallel.pp - 1 else 0


def _arrays(case: Case) -> int:
    """Of micro-batches: tokens, positions, bounds, rows, labels, places, weights, student's numbers; the teacher's; its candidates' two."""
    arrays = 8 + (case.stage == "train") + 2 * (case.top_k > 0) + (case.top_k > 0)
    return arrays * case.micro_batches


STEP_FILE, MCORE = r"megatron_opd/train/step\.py", r"megatron/core"
ALLOWED = [
    Allowed("the step's numbers, read once", rf"tolist  {STEP_FILE}:train_step", _once),
    Allowed("is the number of tokens above 0", rf"item  {MCORE}/distributed/finalize_model_grads\.py:finalize_model_grads", _chunks),
    Allowed("the gradient norm, to report it", rf"item  {MCORE}/optimizer/clip_grads\.py:get_grad_norm_fp32 .*{STEP_FILE}:_update", _once),
    Allowed("the gradient norm again, to clip", rf"item  {MCORE}/optimizer/clip_grads\.py:get_grad_norm_fp32 .*optimizer\.py:step$", _once),
    Allowed("is the loss finite", rf"item  {STEP_FILE}:_update", _once),
    Allowed("are all ranks' finite", rf"item  {STEP_FILE}:_finite_on_all_ranks", _once),
    Allowed("are all ranks' finite: this rank's flag", rf"cpu->cuda BLOCKING 4 B  {STEP_FILE}:_finite_on_all_ranks", _once),
    Allowed("numbers of Python's among the sums", r"cpu->cuda BLOCKING 8 B  megatron_opd/train/loss\.py:<listcomp> < \S*:pack_sums", _on_last_stage(4)),
    Allowed("the denominator of a micro-batch", rf"cpu->cuda BLOCKING 4 B  {STEP_FILE}:_loss_sums", _on_last_stage(1)),
    Allowed("micro-batches, from pageable memory", r"cpu->cuda pageable async \d+ B  megatron_opd/train/batches\.py:", _arrays),
]


def faults(found: Iterable[tuple[str, int]], case: Case, allowed: list[Allowed] = ALLOWED) -> list[str]:
    """What differs between the waits and copies of a step and the list, a line each; [] if nothing does."""
    counts: Counter[int] = Counter()
    lines = []
    for text, number in found:
        plain = re.sub(r":\d+:", ":", text)  # of a file's lines nothing is said
        fitting = [index for index, entry in enumerate(allowed) if re.match(entry.where, plain)]
        if len(fitting) != 1:
            lines.append(f"{'no entry' if not fitting else 'several entries'} of allowed.py for {number} x {text}")
        for index in fitting[:1]:
            counts[index] += number
    for index, entry in enumerate(allowed):
        if counts[index] != entry.count(case):
            lines.append(f"{counts[index]} instead of {entry.count(case)} x {entry.where} ({entry.reason})")
    return lines
