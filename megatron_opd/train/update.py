"""The optimizer's step. The gradient norm is computed once, and the host reads the device once, for all numbers of the step.

Megatron's `optimizer.step()` computes the norm itself, whatever the caller knows, and updates the weights whatever the norm is. These are
its parts (Megatron-Core 0.16.1 and 0.19.2: `MegatronOptimizer.step`, `ChainedOptimizer.step`), with the decision between them.

Legend: P squared norms: one, or with experts and without the distributed optimizer one of each of Megatron's optimizers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_opd.train.optim import optimizer_parts


@torch.no_grad()
def update(optimizer: Any, sums: torch.Tensor) -> tuple[list[float], float, bool]:
    """Clip and step, unless the loss `sums[0]` or the gradient norm is not finite on some rank: then weights and optimizer stay as they are.

    sums: float64 [n] on the device. Returns them as the host read them, the norm before clipping, and whether the step was left out.
    This read is the one place of a step where the host waits for the device: what is to be left out must not have begun.
    """
    optimizer.prepare_grads()
    squares_P = _squared_norms(optimizer, sums.device).double()
    doubt = (0 * torch.cat([sums[:1], squares_P])).sum(0, keepdim=True)  # 0; NaN if one of them is not finite, and then on every rank
    dist.all_reduce(doubt)
    numbers = torch.cat([sums, squares_P, doubt]).tolist()
    values, squares, skipped = numbers[: len(sums)], numbers[len(sums) : -1], not math.isfinite(numbers[-1])
    norms = [square**0.5 for square in squares]  # in float64, as Megatron-Core does (0.19.2 with Transformer Engine: in float32)
    grad_norm = norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))
    if not skipped:
        _clip_(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
    return values, grad_norm, skipped


def _squared_norms(optimizer: Any, device: torch.device) -> torch.Tensor:
    """float32 [P], over all ranks that hold parts of the gradients. The maths of Megatron's `get_grad_norm`, which waits for the device."""
    parts = optimizer_parts(optimizer)
    gradients = [_gradients(part) for part in parts]
    groups = [part.get_grad_stats_parallel_group() for part in parts]
    if all(group == groups[0] for group in groups):
        gradients, groups = [[tensor for tensors in gradients for tensor in tensors]], groups[:1]
    squares = []
    for tensors, group in zip(gradients, groups, strict=True):
        square = _norm(tensors) ** 2.0 if tensors else torch.zeros(1, dtype=torch.float, device=device)
        dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.cat(squares)


def _gradients(part: Any) -> list[torch.Tensor]:
    """Those that count for the norm. 0.19.2 has another name for it."""
    found = part.get_grads_for_grad_norm if hasattr(part, "get_grads_for_grad_norm") else part.get_main_grads_for_grad_norm
    return found()


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """float32 [1]: of all of them, by Transformer Engine's or apex's kernel where it is there."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # the same, but that it reads each tensor's norm back
        return torch.stack([torch.norm(tensor).float() for tensor in tensors]).norm()[None]
    overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
    return clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [tensors], False)[0]


def _clip_(optimizer: Any, grad_norm: float) -> None:
    """Scale the gradients. With a norm that the host knows Megatron passes over them only if there is something to clip."""
    for part in optimizer_parts(optimizer):
        if parameters := part.get_parameters():
            clip_grads.clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
