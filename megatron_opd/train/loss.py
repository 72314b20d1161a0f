"""The losses: sums over the response tokens of a micro-batch; the division by the global denominator comes after the reduction.

Legend: N response tokens of a micro-batch.
"""

from __future__ import annotations

import torch

from megatron_opd.records import LOSS_SUM_NAMES
from megatron_opd.train.batches import MicroBatch


def sft_loss(logp: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood sum of the response. logp float32 [N] of the student."""
    return -(batch.weights * logp).sum(), {}


def opd_loss(logp: torch.Tensor, batch: MicroBatch, *, advantage_clip: float | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of -A log pi_S with A = log pi_T - log pi_S, detached, optionally clipped to +-advantage_clip nats.

    logp float32 [N] of the student being trained. The advantage is of this same forward pass. Its gradient is that of
    0.5 (log pi_S - log pi_T)^2 on the stored tokens. Source: Lightning OPD, arXiv 2604.13010.
    """
    assert batch.teacher_logp is not None
    advantage = batch.teacher_logp - logp.detach()
    sums = {"abs_advantage": advantage.abs().sum(), "reverse_kl": -advantage.sum()}
    if advantage_clip is not None:
        sums["clipped"] = (advantage.abs() > advantage_clip).sum()
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    return -(batch.weights * advantage * logp).sum(), sums


def pack_sums(
    loss: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, extra: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Everything that is reported, float64 [len(LOSS_SUM_NAMES)] in their order; ratio is pi_S / pi_ref of the stored tokens."""
    logp = logp.detach()
    ratio = (logp - batch.student_logp).double().exp()
    sums = {
        "loss": loss.detach(),
        "denominator": batch.denominator,
        "tokens": len(batch.rows),
        "sequences": batch.num_sequences,
        "nll": -logp.sum(),
        "entropy": entropy.detach().sum(),
        "ratio": ratio.sum(),
        "ratio_squared": ratio.square().sum(),
        **extra,
    }
    return torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=logp.device) for name in LOSS_SUM_NAMES])
