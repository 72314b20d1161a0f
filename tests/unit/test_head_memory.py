"""What the LM-head loss holds and waits for, at the sizes of real models, on tensors that have shapes alone.

Legend: N rows (tokens), C rows of a chunk, V columns of this rank's vocabulary shard, K ids a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from opd_kernels import overlap
from torch.testing._internal.distributed import fake_pg

from megatron_opd.recipe.objective import LossConfig
from megatron_opd.train.loss import Stored, make_loss, sft_loss

TOOLS = Path(__file__).resolve().parents[2] / "tools"
N, C, V, H = 2560, 1024, 131072, 512
CANDIDATES = 64
LOSSES = {
    "sft": sft_loss,
    "opd": make_loss(LossConfig(name="opd", advantage_clip=2.0, importance_clip=1.5)),
    "exopd": make_loss(LossConfig(name="exopd", entropy_bonus=0.1)),
    "vopd": make_loss(LossConfig(name="vopd", advantage_clip=2.0)),
    "reverse_kl": make_loss(LossConfig(name="reverse_kl", entropy_bonus=0.1)),
    "forward_kl": make_loss(LossConfig(name="forward_kl")),
    "jsd": make_loss(LossConfig(name="jsd", jsd_beta=0.3)),
}
NEEDS_CANDIDATES = {"vopd", "reverse_kl", "forward_kl", "jsd"}


@pytest.fixture(scope="module")
def head_ops() -> ModuleType:
    pytest.importorskip("triton")
    sys.path.insert(0, str(TOOLS))
    try:
        import head_ops
    finally:
        sys.path.remove(str(TOOLS))
    return head_ops


@pytest.fixture(params=[1, 2], ids=["tp1", "tp2"])
def tp_group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup | None]:
    if request.param == 1:
        yield None
        return
    dist.init_process_group("fake", rank=1, world_size=2, store=fake_pg.FakeStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def shard_of(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The last shard, whose last columns are padding."""
    world = 1 if group is None else 2
    return {"vocab_start": (world - 1) * V, "vocab_size": world * V - 100, "tp_group": group}


def chunk_loss(name: str) -> Any:
    def loss(logp: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
        one = logp.new_empty(len(logp))
        stored = Stored(one, one, logp.new_empty(len(logp), CANDIDATES) if name in NEEDS_CANDIDATES else None)
        return LOSSES[name](logp, entropy, stored)[0].sum()

    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu_nothing_waits_and_no_logits_are_copied(head_ops: ModuleType, tp_group: dist.ProcessGroup | None, name: str) -> None:
    """The operations of a GPU, with the overlap measured on some rows of each chunk."""
    k = 1 + CANDIDATES * (name in NEEDS_CANDIDATES)
    found = head_ops.record_head(
        N, H, V, k, chunk_loss(name), chunk_tokens=C, overlap_rows=700, overlap_ids=CANDIDATES, **shard_of(tp_group)
    )
    assert not found.waits
    # fp32: a few values for each id of a row. 16 bits: one chunk of logits, made once, hidden states, and the zeros that stand for the
    # weight's gradient, which is in main_grad.
    assert found.largest(torch.float32) <= max(N * k, C * (2 + k), 700 * CANDIDATES)
    assert found.largest(torch.float64) == 0
    large = [shape.numel() for dtype, shape in found.made if dtype == torch.bfloat16 and shape.numel() > N * H]
    assert large == [C * V, V * H]
    # Each chunk: three products, one pass over the logits forward and one backward.
    chunks = -(-N // C)
    kinds = [op.name for op in found.ops]
    assert [kinds.count(kind) for kind in ("mm", "addmm", "stats_kernel", "gradient_kernel", "chosen_kernel")] == [
        2 * chunks,
        *[chunks] * 4,
    ]
    others = ("mm", "addmm", "topk", "zeros_like")
    passes = sum(op.bytes_read + op.bytes_written > C * V / 2 for op in found.ops if op.name not in others)
    assert passes == 2 * chunks


def test_the_overlap_copies_a_padded_shard_in_blocks(head_ops: ModuleType, tp_group: dist.ProcessGroup | None) -> None:
    """torch.topk copies what is not contiguous, unseen by any mode: what it is given is small, or needs no copy."""
    common: dict[str, Any] = {"chunk_tokens": C, "overlap_rows": 700, "overlap_ids": CANDIDATES, "tp_group": tp_group}
    largest = []
    for size in ({}, {"vocab_size": None}):
        found = head_ops.record_head(N, H, V, 1, chunk_loss("sft"), **(shard_of(tp_group) | common | size))
        largest.append(max(op.bytes_read for op in found.ops if op.name == "topk"))
    assert largest[0] <= overlap._BLOCK_BYTES < largest[1] == 700 * 2 * V


@pytest.mark.parametrize("k", [1, 1 + CANDIDATES])
def test_on_a_cpu_no_fp32_logits_of_a_chunk_are_held(head_ops: ModuleType, tp_group: dist.ProcessGroup | None, k: int) -> None:
    name = "jsd" if k > 1 else "sft"
    found = head_ops.record_head(C, H, V, k, chunk_loss(name), overlap_rows=C, on_gpu=False, **shard_of(tp_group))
    assert not found.waits
    assert found.largest(torch.float32) <= C * V / 2
    assert [shape.numel() for dtype, shape in found.made if dtype == torch.bfloat16].count(C * V) == 1


def test_the_recorder_sees_waits_and_copies(head_ops: ModuleType) -> None:
    x = torch.arange(6.0).to(torch.bfloat16)
    with head_ops.Recorder() as seen:
        assert x.sum().item() == 15
        x[x > 2], x.nonzero(), x.masked_select(x > 2), torch.equal(x, x), torch.tensor([1.0])
        x.float()
    assert {"_local_scalar_dense", "index with a mask", "nonzero", "masked_select", "torch.tensor"} <= set(seen.waits)
    assert seen.largest(torch.float32) == 6
