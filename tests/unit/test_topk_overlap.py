"""The overlap of a teacher's candidates with the student's most probable tokens, against sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import topk_overlap
from ranks import KERNEL_WORKER, run_ranks


def overlap_of_sets(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    k = ids.shape[1]
    return [len(set(row.topk(k).indices.tolist()) & set(chosen.tolist())) / k for row, chosen in zip(logits, ids, strict=True)]


@settings(deadline=None)
@given(rows=st.integers(0, 5), vocab=st.integers(1, 30), padding=st.integers(0, 5), data=st.data())
def test_agrees_with_sets(rows: int, vocab: int, padding: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(rows * 100 + vocab)
    logits = torch.randn(rows, vocab + padding, generator=generator, dtype=torch.float64)
    ids = (
        torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(rows)]) if rows else torch.empty(0, k, dtype=torch.long)
    )
    found = topk_overlap(logits, ids, vocab_size=vocab)
    assert found.tolist() == pytest.approx(overlap_of_sets(logits[:, :vocab], ids))


def test_ties_with_the_last_count() -> None:
    assert topk_overlap(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), torch.tensor([[0, 2]])).tolist() == [1.0]


@pytest.mark.parametrize("vocab", [40, 29, 9])  # padding in the last shard; a shard of padding alone
def test_tensor_parallel(tmp_path: Path, vocab: int) -> None:
    assert run_ranks("overlap_parallel", 4, tmp_path, worker=KERNEL_WORKER, vocab=vocab, padded=40)
