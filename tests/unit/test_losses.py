"""The losses in float64 against their definitions over the whole vocabulary, with gradients; and what recipes and stores must have."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import vocab_parallel_stats
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.errors import ConfigError, StoreError
from megatron_opd.recipe.files import build_recipe
from megatron_opd.recipe.objective import LossConfig
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.train.loss import TAIL_FLOOR, Stored, make_loss, sft_loss
from megatron_opd.train.readiness import check_train

N, V = 7, 23


class Case:
    """Random student logits, a teacher, sampled tokens and the teacher's K best candidates, all float64."""

    def __init__(self, seed: int, k: int, *, tilt: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = (tilt * torch.randn(N, V, generator=generator, dtype=torch.float64)).requires_grad_()
        self.teacher = torch.log_softmax(tilt * torch.randn(N, V, generator=generator, dtype=torch.float64), -1)
        self.tokens = torch.randint(V, (N,), generator=generator)
        self.student_logp = -torch.rand(N, generator=generator, dtype=torch.float64) * 4
        self.candidates = self.teacher.topk(k).indices
        self.upstream = torch.randn(N, generator=generator, dtype=torch.float64)
        self.stored = Stored(self.student_logp, self.teacher.gather(1, self.tokens[:, None])[:, 0], self.teacher.gather(1, self.candidates))

    @property
    def logp(self) -> torch.Tensor:
        return torch.log_softmax(self.logits, -1)

    def sampled(self) -> torch.Tensor:
        return self.logp.gather(1, self.tokens[:, None])[:, 0]

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((loss * self.upstream).sum(), self.logits)[0]

    def run(self, **config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [N] and gradient of the logits, through the kernel's definition."""
        ids = torch.cat([self.tokens[:, None], self.candidates], 1)
        loss, _ = make_loss(LossConfig(**config))(*vocab_parallel_stats(self.logits, ids), self.stored)
        return loss.detach(), self.gradient(loss)

    def agrees(self, definition: torch.Tensor, *, atol: float = 1e-10, **config: Any) -> None:
        """Value and gradient of `definition` [N], a function of `self.logits` by plain autograd."""
        loss, gradient = self.run(**config)
        torch.testing.assert_close(loss, definition.detach(), rtol=0, atol=atol)
        torch.testing.assert_close(gradient, self.gradient(definition), rtol=0, atol=atol)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "reverse_kl": lambda student, teacher: kl(student, teacher),
    "forward_kl": lambda student, teacher: kl(teacher, student),
    "jsd": lambda student, teacher: jsd(student, teacher, 0.3),
}
OPTIONS: dict[str, dict[str, Any]] = {"jsd": {"jsd_beta": 0.3}}


def test_sft_is_the_negative_log_likelihood() -> None:
    case = Case(0, 3)
    loss, _ = sft_loss(*vocab_parallel_stats(case.logits, case.tokens[:, None]), case.stored)
    torch.testing.assert_close(case.gradient(loss), case.gradient(-case.sampled()), rtol=0, atol=1e-12)


def test_opd_has_the_gradient_of_the_squared_log_ratio() -> None:
    """So nothing flows through the advantage."""
    case = Case(1, 3)
    assert case.stored.teacher_logp is not None
    loss, gradient = case.run(name="opd")
    gap = case.stored.teacher_logp - case.sampled()
    torch.testing.assert_close(loss, (-gap * case.sampled()).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, case.gradient(0.5 * gap**2), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clip=st.sampled_from([None, 0.5]),
    importance=st.sampled_from([None, 1.2]),
    scale=st.sampled_from([1.0, 1.25]),
)
def test_policy_losses_follow_their_formulas(seed: int, clip: float | None, importance: float | None, scale: float) -> None:
    case = Case(seed, V)
    stored, now = case.stored, case.sampled().detach()
    assert stored.teacher_logp is not None
    opd = stored.teacher_logp - now
    advantages = {
        "opd": opd,
        "vopd": opd + kl(case.logp.detach(), case.teacher),  # the baseline is the expectation, -KL
        "exopd": scale * (stored.teacher_logp - stored.student_logp) - (now - stored.student_logp),
        "constant": torch.full_like(now, -0.7),
    }
    options: dict[str, dict[str, Any]] = {"exopd": {"exopd_scale": scale}, "constant": {"constant_advantage": -0.7}}
    for name, gain in advantages.items():
        weight = torch.ones(N, dtype=torch.float64) if importance is None else (now - stored.student_logp).exp().clamp(max=importance)
        own = options.get(name, {})
        if clip is not None and name != "constant":
            own, gain = own | {"advantage_clip": clip}, gain.clamp(-clip, clip)
        case.agrees(-weight * gain * case.sampled(), name=name, importance_clip=importance, **own)


def test_a_constant_advantage_asks_nothing_of_the_teacher() -> None:
    """The gradient is that of log pi_S, which falls on every stored token; another teacher changes nothing."""
    case = Case(7, 3)
    loss, gradient = case.run(name="constant")
    torch.testing.assert_close(gradient, case.gradient(case.sampled()), rtol=0, atol=1e-12)
    case.stored = Stored(case.student_logp)
    torch.testing.assert_close(case.run(name="constant"), (loss, gradient), rtol=0, atol=0)


def test_vopd_has_no_advantage_on_average_and_exopd_of_scale_one_is_opd() -> None:
    case = Case(2, V)
    means = torch.zeros(N, dtype=torch.float64)
    logp = case.logp.detach()
    for token in range(V):
        case.tokens = torch.full((N,), token)
        case.stored = Stored(case.student_logp, case.teacher[:, token], case.stored.topk_logp)
        loss, _ = case.run(name="vopd")
        means += logp[:, token].exp() * (loss / -logp[:, token])
    torch.testing.assert_close(means, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(case.run(name="exopd", exopd_scale=1.0), case.run(name="opd"), rtol=0, atol=1e-12)


def test_clipped_tokens_are_counted() -> None:
    case = Case(3, 3)
    assert case.stored.teacher_logp is not None
    _, sums = make_loss(LossConfig(advantage_clip=0.7))(case.sampled()[:, None], torch.zeros(N), case.stored)
    assert sums["clipped"] == ((case.stored.teacher_logp - case.sampled()).abs() > 0.7).sum()
    assert 0 < sums["clipped"] < N


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(DIVERGENCES)))
def test_divergences_over_every_id_are_those_of_the_whole_vocabulary(seed: int, name: str) -> None:
    case = Case(seed, V)
    # The tail of nothing counts as TAIL_FLOOR on both sides: no divergence, and in the mixture neither.
    case.agrees(DIVERGENCES[name](case.logp, case.teacher), name=name, **OPTIONS.get(name, {}))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, V - 1), name=st.sampled_from(sorted(DIVERGENCES)))
def test_divergences_over_candidates_treat_the_rest_as_one_event(seed: int, k: int, name: str) -> None:
    """The documented approximation: a lower bound of the whole divergence, with the gradient of itself."""
    case = Case(seed, k)

    def coarse(logp: torch.Tensor) -> torch.Tensor:
        rest = torch.ones(N, V, dtype=torch.bool).scatter(1, case.candidates, False)
        tail = logp.exp().where(rest, 0.0).sum(1, keepdim=True).clamp(min=TAIL_FLOOR).log()
        return torch.cat([logp.gather(1, case.candidates), tail], 1)

    case.agrees(DIVERGENCES[name](coarse(case.logp), coarse(case.teacher)), name=name, **OPTIONS.get(name, {}), atol=1e-8)
    whole = DIVERGENCES[name](case.logp, case.teacher)
    loss, _ = case.run(name=name, **OPTIONS.get(name, {}))
    assert (loss <= whole + 1e-4).all()
    assert (loss >= -1e-6).all()


def test_leaving_the_candidates_does_not_pay() -> None:
    """Without the tail, a truncated reverse KL goes to 0 for a student that has left the teacher's candidates."""
    case = Case(4, 4, tilt=1.0)
    losses = []
    for push in (0.0, 5.0, 20.0):
        logits = case.logits.detach() - torch.zeros(N, V, dtype=torch.float64).scatter(1, case.candidates, push)
        logp = torch.log_softmax(logits, -1).gather(1, case.candidates)
        losses.append(make_loss(LossConfig(name="reverse_kl"))(torch.cat([logp[:, :1], logp], 1), torch.zeros(N), case.stored)[0])
    assert (losses[0] < losses[1]).all()
    assert (losses[1] <= losses[2] + 1e-9).all()


@pytest.mark.parametrize("name", ["vopd", *DIVERGENCES])
def test_a_candidate_outside_of_the_students_vocabulary_is_no_nan(name: str) -> None:
    case = Case(5, 4)
    case.candidates[:, 1] = V + 3
    loss, gradient = case.run(name=name)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["opd", "reverse_kl"])
def test_entropy_bonus(name: str) -> None:
    case = Case(6, V)
    without, gradient = case.run(name=name)
    entropy = -(case.logp.exp() * case.logp).sum(1)
    with_bonus, gradient_with = case.run(name=name, entropy_bonus=0.2)
    torch.testing.assert_close(with_bonus, without - 0.2 * entropy.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient_with, gradient - 0.2 * case.gradient(entropy), rtol=0, atol=1e-10)


def test_options_that_do_nothing_are_refused() -> None:
    models = {"models": {"teacher": "t", "student": "s"}, "name": "x"}
    with pytest.raises(ConfigError, match="has no advantage"):
        build_recipe(models | {"train": {"loss": {"name": "jsd", "advantage_clip": 1.0}}})
    for loss, message in (
        ({"jsd_beta": 0.3}, "jsd_beta is for loss 'jsd' and does nothing for 'opd'"),
        ({"name": "vopd", "exopd_scale": 2.0}, "exopd_scale is for loss 'exopd'"),
        ({"name": "reverse_kl", "constant_advantage": -2.0}, "constant_advantage is for loss 'constant'"),
        ({"name": "constant", "advantage_clip": 2.0}, "which advantage_clip does not change"),
        ({"name": "constant", "constant_advantage": 0.5}, "less than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_recipe(models | {"train": {"loss": loss}})
    with pytest.raises(ConfigError, match="loss_chunk_tokens"):
        build_recipe(models | {"train": {"loss_chunk_tokens": 0}})
    whole = build_recipe(models | {"train": {"loss_chunk_tokens": "all"}})
    assert whole.train.chunk_tokens is None
    assert build_recipe(tomllib.loads(whole.to_toml())) == whole  # as a run writes it down
    with pytest.raises(ConfigError, match="reverse_kl"):
        build_recipe(models | {"train": {"loss": {"name": "kl"}}})


def test_a_store_without_candidates_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "student", "qwen3", seed=1)
    make_model(tmp_path / "teacher", "qwen3", seed=2)
    for name, top_k in (("plain", 0), ("topk", 4)):
        make_scored_store(tmp_path / name, sampler=tmp_path / "student", teacher=tmp_path / "teacher", prompts=5, top_k=top_k)

    def stage(store: str, loss: str) -> TrainStage:
        config = LossConfig.model_validate({"name": loss})
        return TrainStage(init=str(tmp_path / "student"), store=str(tmp_path / store), global_batch=10, loss=config)

    check_train(stage("plain", "exopd"))
    check_train(stage("plain", "constant"))
    check_train(stage("topk", "jsd"))
    with pytest.raises(StoreError, match=r"'jsd' needs the top-k candidates of teacher 'teacher', and 2 of 2 parts have none.*score.top_k"):
        check_train(stage("plain", "jsd"))
