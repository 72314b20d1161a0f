"""The losses: sums over the response tokens of a micro-batch; the division by the global denominator comes after the reduction.

A loss is a function of small tensors: the student's log-probabilities at chosen ids, its entropy, and what the store holds.

Legend: N response tokens, K teacher candidates a token, C = 1 + K ids a token: the sampled one, then the candidates.

Divergences are between distributions over K + 1 events: the teacher's K candidates, and the rest of the vocabulary as one (the tail).
That is the divergence of the whole vocabulary where K covers it, a lower bound of it else (data-processing inequality), and unlike a
sum over the candidates alone it does not gain by leaving them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from megatron_opd.recipe.objective import LossConfig
from megatron_opd.records import LOSS_SUM_NAMES
from megatron_opd.train.batches import MicroBatch

# 1 - sum of K probabilities is rounding below this in fp32.
TAIL_FLOOR = 1e-6
# exp(-80) is as good as 0; keeps 0 * -inf out where a candidate is not in the student's vocabulary.
_LEAST_LOGP = -80.0


@dataclass(frozen=True)
class Stored:
    """What the store holds of N tokens: log-probabilities float32, of the sampled token [N] and of the teacher's candidates [N,K]."""

    student_logp: torch.Tensor
    teacher_logp: torch.Tensor | None = None
    topk_logp: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: MicroBatch, rows: slice) -> Stored:
        pieces = (batch.student_logp, batch.teacher_logp, batch.topk_logp)
        return cls(*(None if piece is None else piece[rows] for piece in pieces))  # pyright: ignore[reportArgumentType]


# (student logp [N,C], entropy [N], stored) -> (loss [N], further sums for the log)
LossFunction = Callable[[torch.Tensor, torch.Tensor, Stored], tuple[torch.Tensor, dict[str, torch.Tensor]]]
# (student logp [N,C] detached, stored) -> advantage [N]
Advantage = Callable[[torch.Tensor, Stored], torch.Tensor]
# (student logp of K+1 events, teacher logp of K+1 events), both [N,K+1] -> divergence [N]
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sft_loss(logp: torch.Tensor, entropy: torch.Tensor, stored: Stored) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the response."""
    return -logp[:, 0], {}


def opd_advantage(logp: torch.Tensor, stored: Stored) -> torch.Tensor:
    """log pi_T - log pi_S of the sampled token. Source: Lightning OPD, arXiv 2604.13010."""
    assert stored.teacher_logp is not None
    return stored.teacher_logp - logp[:, 0]


def vopd_advantage(logp: torch.Tensor, stored: Stored) -> torch.Tensor:
    """The same less its expectation under the student, which is -KL(pi_S, pi_T): less variance, the same mean gradient on-policy.

    The KL is that over the candidates and the tail, an approximation from below. Source: vOPD, arXiv 2605.07865.
    """
    return opd_advantage(logp, stored) + reverse_kl(*events(logp, stored))


def exopd_advantage(logp: torch.Tensor, stored: Stored, *, scale: float) -> torch.Tensor:
    """scale (log pi_T - log pi_ref) - (log pi_S - log pi_ref) with the stored pi_ref; scale 1 is `opd`. Source: ExOPD, arXiv 2602.12125."""
    assert stored.teacher_logp is not None
    return scale * (stored.teacher_logp - stored.student_logp) - (logp[:, 0] - stored.student_logp)


def constant_advantage(logp: torch.Tensor, stored: Stored, *, value: float) -> torch.Tensor:
    """The same for every token, a control: what training does where the teacher says nothing. Source: arXiv 2608.31046."""
    return torch.full_like(logp[:, 0], value)


def policy_loss(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    stored: Stored,
    *,
    advantage: Advantage = opd_advantage,
    advantage_clip: float | None = None,
    importance_clip: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-w A log pi_S of the sampled token; nothing flows through the advantage A or the weight w.

    A is of this same forward pass, optionally clipped to +-advantage_clip nats. With `importance_clip`, w = min(pi_S / pi_ref,
    importance_clip), which makes stored tokens count as the student of now would sample them; else w = 1. Sources: arXiv 2604.13010 (the
    loss, its gradient for `opd` is that of 0.5 (log pi_S - log pi_T)^2 on the stored tokens); truncated importance sampling, Ionides 2008.
    """
    of_now = logp.detach()
    gain = advantage(of_now, stored)
    sums = {}
    if advantage_clip is not None:
        sums["clipped"] = (gain.abs() > advantage_clip).sum()
        gain = gain.clamp(-advantage_clip, advantage_clip)
    if importance_clip is not None:
        gain = gain * (of_now[:, 0] - stored.student_logp).exp().clamp(max=importance_clip)
    return -gain * logp[:, 0], sums


opd_loss = policy_loss


def events(logp: torch.Tensor, stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N,K+1] of the teacher's candidates and of the tail, for student and teacher; the tail is at least TAIL_FLOOR."""
    assert stored.topk_logp is not None
    return _with_tail(logp[:, 1:].clamp(min=_LEAST_LOGP)), _with_tail(stored.topk_logp)


def _with_tail(logp_NK: torch.Tensor) -> torch.Tensor:
    tail_N = (1 - logp_NK.exp().sum(1)).clamp(min=TAIL_FLOOR)
    return torch.cat([logp_NK, tail_N.log()[:, None]], 1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(pi_S, pi_T) over K+1 events. Sources: MiniLLM, arXiv 2306.08543; the tail: see the module."""
    return (student.exp() * (student - teacher)).sum(1)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(pi_T, pi_S) over K+1 events. Source: Hinton et al., arXiv 1503.02531."""
    return reverse_kl(teacher, student)


def jsd(student: torch.Tensor, teacher: torch.Tensor, *, beta: float) -> torch.Tensor:
    """beta KL(pi_T, m) + (1 - beta) KL(pi_S, m) with m = beta pi_T + (1 - beta) pi_S. Source: GKD, arXiv 2306.13649, equation 1."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * reverse_kl(teacher, mixture) + (1 - beta) * reverse_kl(student, mixture)


def divergence_loss(
    logp: torch.Tensor, entropy: torch.Tensor, stored: Stored, *, divergence: Divergence
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A divergence from the teacher at each position of the stored response, with its whole gradient."""
    return divergence(*events(logp, stored)), {}


def with_entropy_bonus(
    logp: torch.Tensor, entropy: torch.Tensor, stored: Stored, *, loss: LossFunction, bonus: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`loss` less bonus x the entropy of pi_S over the whole vocabulary. Source: Williams and Peng 1991."""
    value, sums = loss(logp, entropy, stored)
    return value - bonus * entropy, sums


ADVANTAGES: dict[str, Callable[[LossConfig], Advantage]] = {
    "opd": lambda config: opd_advantage,
    "vopd": lambda config: vopd_advantage,
    "exopd": lambda config: partial(exopd_advantage, scale=config.exopd_scale),
    "constant": lambda config: partial(constant_advantage, value=config.constant_advantage),
}
DIVERGENCES: dict[str, Callable[[LossConfig], Divergence]] = {
    "reverse_kl": lambda config: reverse_kl,
    "forward_kl": lambda config: forward_kl,
    "jsd": lambda config: partial(jsd, beta=config.jsd_beta),
}


def make_loss(config: LossConfig) -> LossFunction:
    """The loss that a recipe names."""
    loss: LossFunction
    if config.name in DIVERGENCES:
        loss = partial(divergence_loss, divergence=DIVERGENCES[config.name](config))
    else:
        loss = partial(
            policy_loss,
            advantage=ADVANTAGES[config.name](config),
            advantage_clip=config.advantage_clip,
            importance_clip=config.importance_clip,
        )
    return partial(with_entropy_bonus, loss=loss, bonus=config.entropy_bonus) if config.entropy_bonus else loss


def pack_sums(
    loss: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, extra: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Everything that is reported, float64 [len(LOSS_SUM_NAMES)] in their order; ratio is pi_S / pi_ref of the stored tokens.

    logp float32 [N] of the sampled tokens. |A| and the reverse KL estimate are of log pi_T - log pi_S, whatever the loss.
    """
    logp = logp.detach()
    ratio = (logp - batch.student_logp).double().exp()
    denominator, tokens, sequences = batch.counts
    sums = {
        "loss": loss.detach(),
        "denominator": denominator,
        "tokens": tokens,
        "sequences": sequences,
        "nll": -logp.sum(),
        "entropy": entropy.detach().sum(),
        "ratio": ratio.sum(),
        "ratio_squared": ratio.square().sum(),
        **extra,
    }
    if batch.teacher_logp is not None:
        gap = batch.teacher_logp - logp
        sums |= {"abs_advantage": gap.abs().sum(), "reverse_kl": -gap.sum()}
    zero = torch.zeros_like(tokens)
    return torch.stack([sums.get(name, zero).double() for name in LOSS_SUM_NAMES])
