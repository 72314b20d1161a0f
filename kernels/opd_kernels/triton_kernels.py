# ruff: noqa: SIM102  (a constexpr `if` is decided by the compiler; joined with `and` it would not be)
"""The Triton kernels of `vocab_parallel_stats`; `TRITON_INTERPRET=1`, set before triton is imported, runs them on a CPU.

Legend: N rows (tokens), V columns of this rank's shard as allocated, of which `num_real` count; K ids a row, KP its power of two.

Forward: one program a row. Each thread keeps a running maximum and sums of its own columns, so the loop has no barrier, and one
exponential an element; the threads are merged once, after it. Backward: one elementwise kernel, and a small one that writes the K
chosen columns of a row, each with one rounding, from the logits kept in fp32 by the forward (so it doesn't matter that the first
kernel has overwritten them). Loads are masked by the allocated width V, which divides by 16 bytes in practice, and `num_real` is
applied to the values: masked by `num_real`, the compiler could not prove alignment and would load element by element.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from opd_kernels.shards import LocalStats, RowGradients, Shard

LOAD_BYTES = 16  # of one thread's load; the columns of one load are the tile's second axis, reduced within the thread
FORWARD_TILE, FORWARD_WARPS = 1024, 8  # loads of a tile: four a thread
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 8
CHOSEN_WARPS = 1
OPTIONS = {"enable_fp_fusion": True}  # a multiplication and an addition in one instruction, whatever triton's default is

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
MINUS_HUGE = tl.constexpr(-1e30)  # stands for -inf where a product with 0 must be 0


@triton.jit
def _absorb(z, unit, running_max, total, weighted, WITH_ENTROPY: tl.constexpr):
    """Add a tile z [TILE,LANES] to the running maximum (of z) and sums [TILE] of exp2(u) and exp2(u) u, u = unit (z - max)."""
    z = tl.maximum(z, MINUS_HUGE, propagate_nan=tl.PropagateNan.ALL)  # -inf * 0 would be NaN
    new_max = tl.maximum(running_max, tl.max(z, 1))
    # The difference first: a fused multiply-add of z * unit with the rounded new_max * unit leaves that rounding, of -1e30 some 1e22.
    u = (z - new_max[:, None]) * unit
    e = tl.exp2(u)
    delta = (running_max - new_max) * unit
    decay = tl.exp2(delta)
    if WITH_ENTROPY:
        weighted = decay * (weighted + total * delta) + tl.sum(e * u, 1)
    return new_max, decay * total + tl.sum(e, 1), weighted


@triton.jit
def stats_kernel(
    z_ptr, stride_z, ids_ptr, mask_ptr, max_ptr, packed_ptr, N, V, num_real, vocab_start, inv_temperature,
    K: tl.constexpr, KP: tl.constexpr, HAS_MASK: tl.constexpr, WITH_ENTROPY: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    out_ptr = packed_ptr + row
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(max_ptr + row, 0.0)
            tl.store(out_ptr, 1.0)
            tl.store(out_ptr + N, 0.0)
            tl.store(out_ptr + (2 + k).to(tl.int64) * N, tl.zeros((KP,), tl.float32), mask=k < K)
            return
    z_row = z_ptr + row * stride_z
    unit = inv_temperature * LOG2_E
    tile = tl.arange(0, TILE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    running_max = tl.full((TILE,), MINUS_HUGE, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    weighted = tl.zeros((TILE,), tl.float32)
    whole = num_real // (TILE * LANES) * (TILE * LANES)
    for start in range(0, whole, TILE * LANES):
        z = tl.load(z_row + start + tile).to(tl.float32)
        running_max, total, weighted = _absorb(z, unit, running_max, total, weighted, WITH_ENTROPY)
    if whole < num_real:
        column = whole + tile
        z = tl.load(z_row + column, mask=column < V, other=0.0).to(tl.float32)
        z = tl.where(column < num_real, z, float("-inf"))
        running_max, total, weighted = _absorb(z, unit, running_max, total, weighted, WITH_ENTROPY)
    row_max = tl.max(running_max, 0)
    delta = (running_max - row_max) * unit
    decay = tl.exp2(delta)
    any_real = row_max > MINUS_HUGE  # false: padding or -inf alone; not so for NaN, which the maximum skips and the sums keep
    tl.store(max_ptr + row, tl.where(any_real, row_max * inv_temperature, float("-inf")))
    row_total = tl.sum(decay * total, 0)
    tl.store(out_ptr, tl.where(any_real | (row_total != row_total), row_total, 0.0))
    tl.store(out_ptr + N, tl.where(any_real, tl.sum(decay * (weighted + total * delta), 0) * LN_2, 0.0))
    column = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1)
    own = (column >= vocab_start) & (column < vocab_start + num_real) & (column >= 0)
    z = tl.load(z_row + tl.where(own, column - vocab_start, 0), mask=own, other=0.0).to(tl.float32) * inv_temperature
    tl.store(out_ptr + (2 + k).to(tl.int64) * N, z, mask=k < K)


@triton.jit
def _gradient(z, row, lse_ptr, entropy_ptr, g_sum_ptr, g_entropy_ptr, inv_temperature, WITH_ENTROPY: tl.constexpr):
    """-p (sum of g + g_entropy (log p + entropy)) / T of logits z of one row."""
    z = tl.maximum(z, MINUS_HUGE, propagate_nan=tl.PropagateNan.ALL)
    u = z * (inv_temperature * LOG2_E) - tl.load(lse_ptr + row) * LOG2_E  # log2 p
    scale = -inv_temperature * tl.load(g_sum_ptr + row)
    if WITH_ENTROPY:
        g_entropy = -inv_temperature * tl.load(g_entropy_ptr + row)
        scale = (scale + g_entropy * tl.load(entropy_ptr + row)) + (g_entropy * LN_2) * u
    return tl.exp2(u) * scale


@triton.jit
def gradient_kernel(
    out_ptr, stride_out, z_ptr, stride_z, mask_ptr, lse_ptr, entropy_ptr, g_sum_ptr, g_entropy_ptr, V, num_real, inv_temperature,
    HAS_MASK: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    out = out_ptr + row * stride_out + column
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(out, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=column < V)
            return
    z_block = z_ptr + row * stride_z + column
    if first + BLOCK <= num_real:
        z = tl.load(z_block).to(tl.float32)
        dz = _gradient(z, row, lse_ptr, entropy_ptr, g_sum_ptr, g_entropy_ptr, inv_temperature, WITH_ENTROPY)
        tl.store(out, dz.to(out_ptr.dtype.element_ty))
    else:
        z = tl.load(z_block, mask=column < V, other=0.0).to(tl.float32)
        dz = _gradient(z, row, lse_ptr, entropy_ptr, g_sum_ptr, g_entropy_ptr, inv_temperature, WITH_ENTROPY)
        dz = tl.where(column < num_real, dz, 0.0)
        tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=column < V)


@triton.jit
def chosen_kernel(
    out_ptr, stride_out, ids_ptr, mask_ptr, z_ids_ptr, g_ptr, lse_ptr, entropy_ptr, g_sum_ptr, g_entropy_ptr,
    N, num_real, vocab_start, inv_temperature,
    K: tl.constexpr, KP: tl.constexpr, HAS_MASK: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            return
    k = tl.arange(0, KP)
    column = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1)
    own = (column >= vocab_start) & (column < vocab_start + num_real) & (column >= 0)
    # Equal ids write the same number, the sum over all of them, so their order does not matter.
    g = tl.zeros((KP,), tl.float32)
    for other in range(K):
        g += tl.where(column == tl.load(ids_ptr + row * K + other), tl.load(g_ptr + row * K + other), 0.0)
    z = tl.load(z_ids_ptr + k.to(tl.int64) * N + row, mask=own, other=0.0) / inv_temperature
    dz = _gradient(z, row, lse_ptr, entropy_ptr, g_sum_ptr, g_entropy_ptr, inv_temperature, WITH_ENTROPY) + g * inv_temperature
    tl.store(out_ptr + row * stride_out + tl.where(own, column - vocab_start, 0), dz.to(out_ptr.dtype.element_ty), mask=own)


# A kernel's launch options are no parameters of its function.
_stats: Any = stats_kernel
_gradient_of: Any = gradient_kernel
_chosen: Any = chosen_kernel


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return not isinstance(stats_kernel, triton.runtime.JITFunction)


def local_stats(logits: torch.Tensor, ids: torch.Tensor, row_mask: torch.Tensor | None, shard: Shard) -> LocalStats:
    """See `opd_kernels.reference.local_stats`; reads the logits once."""
    (n, v), k = logits.shape, ids.shape[1]
    stats = LocalStats.empty(n, k, dtype=torch.float32, device=logits.device)
    if not n:
        return stats
    with _device_of(logits):
        _stats[(n,)](
            logits, logits.stride(0), ids, _mask(row_mask, ids), stats.max_N, stats.packed, n, v, shard.num_real, shard.start,
            1.0 / shard.temperature, K=k, KP=triton.next_power_of_2(max(k, 1)), HAS_MASK=row_mask is not None,
            WITH_ENTROPY=shard.with_entropy, TILE=FORWARD_TILE, LANES=LOAD_BYTES // logits.element_size(), num_warps=FORWARD_WARPS, **OPTIONS,
        )  # fmt: skip
    return stats


def write_gradient_(
    out: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, row_mask: torch.Tensor | None, shard: Shard, rows: RowGradients
) -> None:
    """See `opd_kernels.reference.write_gradient_`; reads the logits once and writes the gradient once."""
    (n, v), k = logits.shape, ids.shape[1]
    if not n or not v:
        return
    mask, g_sum_N = _mask(row_mask, ids), rows.g_logp_NK.sum(1)
    constants = {"HAS_MASK": row_mask is not None, "WITH_ENTROPY": shard.with_entropy}
    with _device_of(logits):
        _gradient_of[(n, triton.cdiv(v, BACKWARD_BLOCK))](
            out, out.stride(0), logits, logits.stride(0), mask, rows.lse_N, rows.entropy_N, g_sum_N, rows.g_entropy_N, v, shard.num_real,
            1.0 / shard.temperature, BLOCK=BACKWARD_BLOCK, num_warps=BACKWARD_WARPS, **constants, **OPTIONS,
        )  # fmt: skip
        if k:
            _chosen[(n,)](
                out, out.stride(0), ids, mask, rows.z_ids_NK.t(), rows.g_logp_NK, rows.lse_N, rows.entropy_N, g_sum_N, rows.g_entropy_N,
                n, shard.num_real, shard.start, 1.0 / shard.temperature, K=k, KP=triton.next_power_of_2(k), num_warps=CHOSEN_WARPS, **constants, **OPTIONS,
            )  # fmt: skip


def _device_of(logits: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _mask(row_mask: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """The mask as bytes; any tensor where there is none, as the kernel does not look at it."""
    return unused if row_mask is None else row_mask.to(torch.uint8)
