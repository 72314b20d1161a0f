"""Gradients of every loss through the real model on gloo ranks against a float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import LOSS_WORKER, run_ranks
from stores import make_scored_store
from tiny_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for kind in ("qwen3", "qwen3-tied"):
        make_model(folder / kind, kind, layers=4)
    make_model(folder / "student", "qwen3", seed=5, layers=4)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "qwen3")
    make_scored_store(folder / "topk", sampler=folder / "student", teacher=folder / "qwen3", top_k=5)
    return folder


def test_gradients_of_every_loss_agree_with_float64(folder: Path) -> None:
    """With the teacher's candidates, in chunks, over a tensor-parallel vocabulary."""
    results = run_ranks("every_loss", 4, folder, worker=LOSS_WORKER)
    assert len(results) == 7
    assert max(loss for loss, _ in results.values()) < 1e-5, results
    assert max(error for _, error in results.values()) < 1e-5, results


def test_a_horizon_agrees_with_float64(folder: Path) -> None:
    """Whatever the layout: tokens behind it are no part of the loss, nor of its denominators."""
    results = run_ranks("horizon", 4, folder, worker=LOSS_WORKER)
    assert len(results) == 3
    assert max(loss for loss, _ in results.values()) < 1e-5, results
    assert max(error for _, error in results.values()) < 1e-5, results


def test_the_head_works_with_overlapped_reduction(folder: Path) -> None:
    """Megatron reduces a bucket when each of its weights has reported a gradient, which the head adds to main_grad itself."""
    results = run_ranks("overlapped", 2, folder, worker=LOSS_WORKER, kinds=["qwen3-tied", "qwen3"])
    assert len(results) == 2
    assert max(error for error, _ in results.values()) < 1e-5, results
    # The untied head waits for its gathered weights, in each of its micro-batches, though its module is never called.
    assert {name: waits > 0 for name, (_, waits) in results.items()} == {"qwen3-tied": False, "qwen3": True}


def test_top_k_overlap_is_that_of_the_sets(folder: Path) -> None:
    """Measured on a part of the rollouts, in chunks, whatever the layout and the loss."""
    results = run_ranks("overlap", 4, folder, worker=LOSS_WORKER)
    expected = results.pop("transformers")
    assert 1 < expected[0] < expected[1]
    assert len(results) == 8
    for name, found in results.items():
        assert found == pytest.approx(expected), name
