"""What `bench_loss.py` compares: each way to get from logits, or from hidden states, to gradients of a loss of log-probabilities.

Legend: N tokens, H hidden size, V vocabulary, K ids a token.

A contestant's `make(problem)` gives a function that runs forward and backward once and returns (log-probabilities [N,K], gradient of the
logits or of hidden; None where it gives none). It raises `Absent` with the reason where it can't run or has no such loss.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from opd_kernels import linear_loss, vocab_parallel_stats


class Absent(Exception):
    """Why a contestant is not in the table."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one row of the table. The loss is sum(g_logp * logp) + sum(g_entropy * entropy); g_logp is -1 where K is 1 (a
    cross-entropy, so that those who have only that can take part)."""

    logits: torch.Tensor | None  # [N,V]
    hidden: torch.Tensor | None  # [N,H]
    weight: torch.Tensor | None  # [V,H], with a main_grad in fp32 as Megatron has
    ids: torch.Tensor  # [N,K]
    g_logp: torch.Tensor
    g_entropy: torch.Tensor | None  # [N], None without entropy

    @property
    def is_cross_entropy(self) -> bool:
        return self.ids.shape[1] == 1 and self.g_entropy is None

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and weight as autograd's leaves; the weight without its main_grad."""
        assert self.hidden is not None
        assert self.weight is not None
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def loss(self, logp: torch.Tensor, entropy: torch.Tensor | None, rows: slice = slice(None)) -> torch.Tensor:
        total = (logp * self.g_logp[rows]).sum()
        if self.g_entropy is not None:
            assert entropy is not None
            total = total + (entropy * self.g_entropy[rows]).sum()
        return total


Run = Callable[[], tuple[torch.Tensor | None, torch.Tensor | None]]
Make = Callable[[Problem], Run]


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is there but does not load is absent too, with its reason
        raise Absent(
            f"{name.partition('.')[0]} does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


def _needs_gpu(problem: Problem) -> None:
    if not problem.ids.is_cuda:
        raise Absent("needs a GPU")


def _only_cross_entropy(problem: Problem) -> None:
    if not problem.is_cross_entropy:
        raise Absent("has K = 1 without entropy alone")


def _eager_stats(logits: torch.Tensor, ids: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(1, ids), -(logp.exp() * logp).sum(-1) if with_entropy else None


def _from_logits(problem: Problem, stats: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]) -> Run:
    assert problem.logits is not None
    leaf = problem.logits.detach().requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = stats(leaf.view_as(leaf))  # a view: its gradient may be written over it
        return logp.detach(), torch.autograd.grad(problem.loss(logp, entropy), leaf)[0]

    return run


def ours_logits(problem: Problem) -> Run:
    wanted = problem.g_entropy is not None
    return _from_logits(problem, lambda z: vocab_parallel_stats(z, problem.ids, with_entropy=wanted, inplace_backward=True))


def eager_logits(problem: Problem) -> Run:
    return _from_logits(problem, lambda z: _eager_stats(z, problem.ids, problem.g_entropy is not None))


def compiled_logits(problem: Problem) -> Run:
    _needs_gpu(problem)
    torch._dynamo.reset()
    compiled = torch.compile(_eager_stats)
    return _from_logits(problem, lambda z: compiled(z, problem.ids, problem.g_entropy is not None))


def megatron_native(problem: Problem) -> Run:
    _only_cross_entropy(problem)
    return _from_logits(problem, lambda z: (-vocab_parallel_cross_entropy(z, problem.ids[:, 0])[:, None], None))


def megatron_fused(problem: Problem) -> Run:
    _only_cross_entropy(problem)
    group = parallel_state.get_tensor_model_parallel_group()

    def stats(z: torch.Tensor) -> tuple[torch.Tensor, None]:
        loss: Any = fused_vocab_parallel_cross_entropy(z[:, None], problem.ids, group)  # [sequence, batch, vocabulary]
        return -loss, None

    return _from_logits(problem, stats)


def liger_vocab_parallel(problem: Problem) -> Run:
    _only_cross_entropy(problem)
    _needs_gpu(problem)
    function = _package("liger_kernel.ops.vocab_parallel_cross_entropy").LigerVocabParallelCEFunction
    return _from_logits(problem, lambda z: (-function.apply(z[:, None], problem.ids, None, -100, 0.0, "pytorch", "global"), None))


def _ours_head(problem: Problem, chunk_tokens: int | None) -> Run:
    assert problem.weight is not None
    hidden, _ = problem.head()
    weight: Any = torch.nn.Parameter(problem.weight)
    weight.main_grad, weight.grad_added_to_main_grad = problem.weight.main_grad, False  # pyright: ignore[reportAttributeAccessIssue]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        total, logp, _ = linear_loss(hidden, weight, problem.ids, problem.loss, chunk_tokens=chunk_tokens)
        (dx,) = torch.autograd.grad(total, hidden)
        return logp, dx

    return run


def _through_head(problem: Problem, stats: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]) -> Run:
    hidden, weight = problem.head()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = stats(hidden, weight)
        dx, _ = torch.autograd.grad(problem.loss(logp, entropy), (hidden, weight))
        return logp.detach(), dx

    return run


def eager_head(problem: Problem) -> Run:
    return _through_head(problem, lambda x, w: _eager_stats(F.linear(x, w), problem.ids, problem.g_entropy is not None))


def compiled_head(problem: Problem) -> Run:
    _needs_gpu(problem)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: _eager_stats(F.linear(x, w), problem.ids, problem.g_entropy is not None))
    return _through_head(problem, compiled)


def _fused_linear(problem: Problem, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Run:
    """For those that give a summed cross-entropy and no log-probabilities."""
    hidden, weight = problem.head()
    return lambda: (None, torch.autograd.grad(loss(hidden, weight), (hidden, weight))[0])


def products_alone(problem: Problem) -> Run:
    """The head's three matrix products and nothing else: what no loss can be faster than."""
    assert problem.weight is not None
    hidden, weight = (tensor.detach() for tensor in problem.head())

    def run() -> tuple[None, None]:
        z = F.linear(hidden, weight)
        torch.mm(z.t(), hidden)
        torch.mm(z, weight)
        return None, None

    return run


def liger_head(problem: Problem) -> Run:
    _only_cross_entropy(problem)
    _needs_gpu(problem)
    loss = _package("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss(
        reduction="sum", accum_dtype=torch.float32
    )
    return _fused_linear(problem, lambda x, w: loss(w, x, problem.ids[:, 0]))


def cut_cross_entropy_head(problem: Problem) -> Run:
    _only_cross_entropy(problem)
    _needs_gpu(problem)
    function = _package("cut_cross_entropy").linear_cross_entropy
    return _fused_linear(problem, lambda x, w: function(x, w, problem.ids[:, 0], reduction="sum"))


def verl_head(problem: Problem) -> Run:
    if problem.ids.shape[1] != 1:
        raise Absent("has K = 1 alone")
    _needs_gpu(problem)
    function = _package("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def stats(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = function(x, w, problem.ids[:, 0], 1.0, "none")
        return logp[:, None], entropy

    return _through_head(problem, stats)


PRODUCTS = "three matrix products"  # no loss: its gradient is not compared


def contestants(chunk_tokens: int) -> dict[str, dict[str, Make]]:
    """By level and name."""
    return {
        "logits": {
            "opd_kernels": ours_logits,
            "PyTorch eager": eager_logits,
            "torch.compile": compiled_logits,
            "Megatron native": megatron_native,
            "Megatron fused": megatron_fused,
            "Liger vocab-parallel": liger_vocab_parallel,
        },
        "head": {
            "opd_kernels whole": lambda problem: _ours_head(problem, None),
            f"opd_kernels chunks of {chunk_tokens}": lambda problem: _ours_head(problem, chunk_tokens),
            PRODUCTS: products_alone,
            "PyTorch eager": eager_head,
            "torch.compile": compiled_head,
            "Liger fused linear": liger_head,
            "cut-cross-entropy": cut_cross_entropy_head,
            "verl linear": verl_head,
        },
    }
