"""The LM head and a loss of its log-probabilities: hidden states to gradients without logits of all tokens.

Legend: S tokens of a micro-batch, N of them with a loss (its rows), C a chunk of the N, H hidden size, V columns of this rank's
vocabulary shard, K ids a row.

Three matrix products a chunk, by the vendor's library: logits = x W^T, and in the same forward pass dW += dz^T x and dx = dz W, as the
gradient of a loss that is a sum over tokens is known as soon as its log-probabilities are. So a chunk's logits are made once, turned
into their gradient in place, and forgotten. (Recomputing them in the backward pass would be a fourth product.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_kernels.shards import Shard
from opd_kernels.stats import choose, forward_stats, make_shard, row_gradients

logger = logging.getLogger(__name__)

# (logp [C,K], entropy [C], which of the N rows) -> the sum of the loss over these rows, a scalar.
ChunkLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
# (logits [C,V] of this rank's shard, which of the N rows)
Observer = Callable[[torch.Tensor, slice], None]
_DW_BLOCK_BYTES = 256 << 20


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    loss: ChunkLoss,
    *,
    rows: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    observe: Observer | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of `loss` over chosen tokens, and their log-probabilities [N,K] and entropies [N] (both without gradient).

    hidden [S,H], or [S/tp,H] with `sequence_parallel` (gathered once over `tp_group`). weight [V,H]: the shard of the LM head whose
    first row is `vocab_start`. rows int64 [N]: the tokens with a loss (all by default); the others never reach a matrix product.
    ids int64 [N,K] and the options as in `vocab_parallel_stats`. `loss(logp [C,K], entropy [C], slice of the N rows)` gives a scalar, and
    must be a sum over rows. `chunk_tokens`: C, so that logits [C,V] are the most that is held; None: all N at once. `observe` is shown
    each chunk's logits before their gradient takes their place; it must leave them alone.

    Gradients are made in this forward pass (none under `torch.no_grad()`). That of the weight is accumulated in fp32: where Megatron's
    data-parallel wrapper keeps a `main_grad`, straight into it, and then the loss must be the last operation (an upstream gradient other
    than 1 raises in the backward pass); else in a buffer, and any upstream gradient will do. That of hidden is summed over `tp_group`.
    Raises ValueError for shapes that do not fit, and RuntimeError under activation recompute and in a second backward.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "linear_loss is called within a backward pass: the LM head is under activation recompute, which would add its gradients twice; "
            "recompute the layers before it alone"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden [S,H] and weight [V,H] of one dtype are expected, got {hidden.dtype} {tuple(hidden.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    num_tokens = len(hidden) * (dist.get_world_size(tp_group) if sequence_parallel and tp_group is not None else 1)
    num_rows = num_tokens if rows is None else len(rows)
    if ids.dim() != 2 or len(ids) != num_rows or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [{num_rows},K], got {ids.dtype} {tuple(ids.shape)}")
    if chunk_tokens is not None and chunk_tokens <= 0:
        raise ValueError(f"chunk_tokens {chunk_tokens} is not positive")
    shard = make_shard(len(weight), vocab_start, vocab_size, temperature, tp_group, with_entropy=True)
    tp_group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    head = _Head(
        ids.contiguous(),
        loss,
        rows,
        chunk_tokens or max(num_rows, 1),
        shard,
        tp_group,
        sequence_parallel,
        observe,
        impl,
        torch.is_grad_enabled(),
    )
    return _LinearLoss.apply(hidden, weight, head)


@dataclass(frozen=True)
class _Head:
    """What `linear_loss` was asked for, beside the two tensors that have gradients."""

    ids: torch.Tensor
    loss: ChunkLoss
    rows: torch.Tensor | None
    chunk_tokens: int
    shard: Shard
    tp_group: dist.ProcessGroup | None
    sequence_parallel: bool
    observe: Observer | None
    impl: str
    with_grad: bool

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [N,H] of the rows."""
        if self.sequence_parallel and self.tp_group is not None:
            whole = hidden.new_empty(len(hidden) * dist.get_world_size(self.tp_group), hidden.shape[1])
            dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.tp_group)
            hidden = whole
        return hidden if self.rows is None else hidden.index_select(0, self.rows)

    def scatter(self, dx_NH: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient of `gather`'s argument, of `shape`, summed over the tensor-parallel ranks."""
        parts = dist.get_world_size(self.tp_group) if self.sequence_parallel and self.tp_group is not None else 1
        if self.rows is not None:
            dx_NH = dx_NH.new_zeros(shape[0] * parts, shape[1]).index_add_(0, self.rows, dx_NH)
        if self.tp_group is None:
            return dx_NH
        if not self.sequence_parallel:
            dist.all_reduce(dx_NH, group=self.tp_group)
            return dx_NH
        own = dx_NH.new_empty(shape)
        dist.reduce_scatter_tensor(own, dx_NH, group=self.tp_group)
        return own

    def chunks(self) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk_tokens, len(self.ids))) for start in range(0, len(self.ids), self.chunk_tokens))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: Any, head: _Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants_dx, wants_dw = (head.with_grad and wanted for wanted in ctx.needs_input_grad[:2])
        x_NH = head.gather(hidden)
        n, k = head.ids.shape
        buffer_CV = x_NH.new_empty(min(n, head.chunk_tokens), len(weight))
        backend, dtype = choose(head.impl, buffer_CV), head.shard.dtype(hidden)
        logp_NK, entropy_N = (torch.empty(*shape, dtype=dtype, device=hidden.device) for shape in ((n, k), (n,)))
        total = torch.zeros((), dtype=dtype, device=hidden.device)  # no view: Megatron's pipeline frees what a stage has sent
        # dx of a chunk takes the place of its hidden states, where these are a copy.
        dx_NH = (torch.empty_like(x_NH) if x_NH is hidden else x_NH) if wants_dx else None
        into_main_grad = wants_dw and hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
        dw_VH = (weight.main_grad if into_main_grad else torch.zeros_like(weight, dtype=dtype)) if wants_dw else None
        for rows in head.chunks():
            x_CH, ids = x_NH[rows], head.ids[rows]
            z_CV = torch.mm(x_CH, weight.t(), out=buffer_CV[: len(x_CH)])
            if head.observe is not None:
                head.observe(z_CV, rows)
            logp, entropy, *rest = forward_stats(z_CV, ids, None, head.shard, head.tp_group, backend)
            logp_NK[rows], entropy_N[rows] = logp, entropy
            value, g_logp, g_entropy = _loss_and_gradients(head.loss, logp, entropy, rows)
            total += value
            if dx_NH is None and dw_VH is None:
                continue
            lse, z_ids = rest
            backend.write_gradient_(
                z_CV, z_CV, ids, None, head.shard, row_gradients(ids, None, head.shard, (lse, entropy, z_ids), g_logp, g_entropy)
            )
            if dw_VH is not None:
                _add_product_(dw_VH, z_CV, x_CH)
            if dx_NH is not None:
                torch.mm(z_CV, weight, out=dx_NH[rows])
        if into_main_grad:
            weight.grad_added_to_main_grad = True
        ctx.save_for_backward(dx_NH, None if into_main_grad else dw_VH, weight)
        ctx.head, ctx.shape, ctx.into_main_grad, ctx.spent = head, hidden.shape, into_main_grad, False
        ctx.mark_non_differentiable(logp_NK, entropy_N)
        return total, logp_NK, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_total: torch.Tensor, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("linear_loss: a second backward, but its gradients were made once, in the forward pass")
        ctx.spent = True
        dx_NH, dw_VH, weight = ctx.saved_tensors
        if ctx.into_main_grad:
            # The weight's gradient is in main_grad already. No wait for the GPU: there the check fails in the kernel's queue.
            torch.ops.aten._assert_async.msg(
                g_total == 1, "linear_loss has added its gradient to main_grad, so the loss must not be scaled afterwards"
            )
            weight.grad_added_to_main_grad = True
        elif dx_NH is not None:
            dx_NH.mul_(g_total)
        dx = None if dx_NH is None else ctx.head.scatter(dx_NH, ctx.shape)
        if ctx.into_main_grad:
            # Something must arrive, or Megatron's hook of the weight runs in another thread; it drops this at once. Zeros, as the gradient
            # of tied embeddings is added to it; autograd would copy expanded ones. Made last: at a time when little else is there.
            return dx, torch.zeros_like(weight), None
        return dx, None if dw_VH is None else dw_VH.mul_(g_total).to(weight.dtype), None


def _loss_and_gradients(
    loss: ChunkLoss, logp: torch.Tensor, entropy: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chunk's loss, and its gradients by both inputs."""
    leaves = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(*leaves, rows)
    if value.dim() != 0:
        raise ValueError(f"the loss must be a scalar, the sum over its rows, got shape {tuple(value.shape)}")
    grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else (None, None)
    g_logp, g_entropy = (torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))
    return value.detach(), g_logp, g_entropy


def _add_product_(total_VH: torch.Tensor, dz_CV: torch.Tensor, x_CH: torch.Tensor) -> None:
    """total += dz^T x, in the precision of `total`."""
    if total_VH.dtype == dz_CV.dtype:
        total_VH.addmm_(dz_CV.t(), x_CH)
    elif dz_CV.is_cuda and total_VH.dtype == torch.float32 and _has_mixed_addmm():
        torch.addmm(total_VH, dz_CV.t(), x_CH, out_dtype=torch.float32, out=total_VH)
    else:
        # In blocks of columns, so that what is upcast is small. On a CPU the product itself is of the upcast factors.
        size = max(1, _DW_BLOCK_BYTES // (4 * max(x_CH.shape)))
        for start in range(0, len(total_VH), size):
            block = slice(start, start + size)
            if dz_CV.is_cuda:
                total_VH[block] += dz_CV[:, block].t() @ x_CH
            else:
                total_VH[block].addmm_(dz_CV[:, block].t().to(total_VH.dtype), x_CH.to(total_VH.dtype))


@cache
def _has_mixed_addmm() -> bool:
    """Whether this PyTorch multiplies 16-bit matrices into an fp32 sum (2.8 and later)."""
    found = hasattr(torch.ops.aten.addmm, "dtype_out")
    if not found:
        logger.warning(
            "PyTorch %s has no addmm with out_dtype: each chunk's weight gradient is rounded to 16 bits before it is added",
            torch.__version__,
        )
    return found
