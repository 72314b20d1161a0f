"""How far the student has moved from pi_ref, the policy that the stored rollouts were sampled from, and when that is too far.

Legend: N response tokens of a micro-batch, P position classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_opd.recipe.objective import DriftConfig
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.train.batches import MicroBatch

# Class p holds the response positions 2^p - 1 to 2^(p+1) - 2 (from 0): one token, two, four, ... and the last class all that follow.
POSITION_CLASSES = 18


@dataclass(frozen=True)
class Watch:
    """What is summed over response tokens beside the loss: tokens that are off, top-k overlap, and reverse KL by position."""

    ratio: float = 2.0

    def sums(self, logp: torch.Tensor, batch: MicroBatch, overlap: torch.Tensor | None = None) -> torch.Tensor:
        """float64 [3 + 2P]: tokens off; summed overlap and its tokens; summed reverse KL and tokens of each position class.

        logp float32 [N] of the student; overlap float32 [M] of the tokens on which it was measured.
        """
        logp = logp.detach()
        off = ((logp - batch.student_logp).abs() > math.log(self.ratio)).sum()
        classes_N = torch.log2(batch.response_positions.double() + 1).long().clamp(max=POSITION_CLASSES - 1)
        kl_N = (logp - batch.teacher_logp).double() if batch.teacher_logp is not None else torch.zeros_like(logp, dtype=torch.float64)
        zeros_P = torch.zeros(POSITION_CLASSES, dtype=torch.float64, device=logp.device)
        kl_P, tokens_P = zeros_P.index_add(0, classes_N, kl_N), zeros_P.index_add(0, classes_N, torch.ones_like(kl_N))
        measured = torch.zeros(0, device=logp.device) if overlap is None else overlap
        totals = torch.stack([off.double(), measured.double().sum(), torch.full_like(off, len(measured)).double()])
        return torch.cat([totals, kl_P, tokens_P])

    @property
    def num_sums(self) -> int:
        return 3 + 2 * POSITION_CLASSES


@dataclass(frozen=True)
class Watched:
    """The sums of `Watch` over a global batch."""

    off: float = 0.0
    kl_by_position: list[float] = field(default_factory=list)
    tokens_by_position: list[float] = field(default_factory=list)
    overlap: float = 0.0
    overlap_tokens: float = 0.0

    @staticmethod
    def of(sums: list[float]) -> Watched:
        (off, overlap, overlap_tokens), by_position = sums[:3], sums[3:]
        return Watched(off, by_position[:POSITION_CLASSES], by_position[POSITION_CLASSES:], overlap, overlap_tokens)

    def means_by_position(self) -> list[float | None]:
        """Reverse KL in nat/token of each position class up to the last that has tokens; None where one has none."""
        means = [kl / n if n else None for kl, n in zip(self.kl_by_position, self.tokens_by_position, strict=True)]
        while means and means[-1] is None:
            means.pop()
        return means


@dataclass
class DriftRule:
    """Counts the steps in a row that are beyond a limit of the recipe. `beyond` goes into checkpoints."""

    config: DriftConfig
    beyond: int = 0

    def check(self, row: dict[str, Any]) -> str | None:
        """After a step with these metrics: what is beyond its limit, when that has lasted long enough; None otherwise."""
        faults = []
        limit = self.config.max_off_share
        if limit is not None and row["off_share"] > limit:
            faults.append(f"{row['off_share']:.1%} of the tokens have pi_S / pi_ref beyond {self.config.ratio:g} (limit {limit:.1%})")
        limit = self.config.min_effective_share
        share = row["effective_sample_share"] or 0.0  # None where the ratios are too small or too large for a number
        if limit is not None and share < limit:
            faults.append(f"the effective sample share is {share:.1%} (limit {limit:.1%})")
        self.beyond = self.beyond + 1 if faults else 0
        due = self.beyond >= self.config.patience if self.config.stop else self.beyond == self.config.patience
        return f"{' and '.join(faults)} for {self.beyond} steps" if due else None


def advice(reason: str, stage: TrainStage, recipe: str) -> str:
    """What to do about a student that has left its rollouts, by what docs/study.md measured: on one small task, of one seed."""
    candidates = "score.top_k=8 score.teacher=candidates train.teacher=candidates train.loss.name=reverse_kl"
    stored = (
        "a divergence over the teacher's candidates did most there, on the rollouts that are there; in a new run:\n"
        f"  megatron-opd score {recipe} {candidates}\n"
        f"  megatron-opd train {recipe} {candidates} train.output=NEW\n"
    )
    return (
        f"the student has left its rollouts: {reason}. What helped on a small task (docs/study.md):\n"
        f"{'' if stage.loss.is_divergence else stored}"
        f"new rollouts, at a lower rate (train.lr, here {stage.lr:g}): at the rate of one store they ruined the student of the plain loss\n"
        f"  megatron-opd convert to-hf {stage.output} {stage.output}-hf\n"
        f"  megatron-opd rollout {recipe} rollout.model={stage.output}-hf rollout.store=NEW   (then score, and train on NEW with train.init={stage.output}-hf)\n"
        "or let a new run do it: rounds.count = N and rounds.until = 'drift' (docs/rounds.md)"
    )
