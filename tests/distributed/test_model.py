"""The real Megatron-Core on four gloo ranks against transformers and a float64 reference, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from stores import make_scored_store
from tiny_models import ARCHITECTURES, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for kind in ARCHITECTURES:
        make_model(folder / kind, kind, layers=4)
    make_model(folder / "student", "qwen3", seed=5, layers=4)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "qwen3")
    return folder


def test_log_probabilities_agree_with_transformers(folder: Path) -> None:
    worst = run_ranks("parity", 4, folder, kinds=list(ARCHITECTURES))
    assert len(worst) == len(ARCHITECTURES) * 6
    assert max(worst.values()) < 1e-4, worst


def test_opd_gradients_agree_with_float64(folder: Path) -> None:
    """Any layout, packing and micro-batch size gives the formula's loss and gradients."""
    results = run_ranks("gradients", 4, folder, kinds=["qwen3-tied", "qwen2"])
    assert len(results) == 2 * (12 + 3)
    assert max(loss for loss, _ in results.values()) < 1e-5, results
    assert max(error for _, error in results.values()) < 1e-5, results


def test_gradients_of_every_loss_agree_with_float64(folder: Path) -> None:
    """With the teacher's candidates, in chunks, over a tensor-parallel vocabulary."""
    make_scored_store(folder / "topk", sampler=folder / "student", teacher=folder / "qwen3", top_k=5)
    results = run_ranks("every_loss", 4, folder)
    assert len(results) == 6
    assert max(loss for loss, _ in results.values()) < 1e-5, results
    assert max(error for _, error in results.values()) < 1e-5, results


def test_the_head_works_with_overlapped_reduction(folder: Path) -> None:
    """Megatron reduces a bucket when each of its weights has reported a gradient, which the head adds to main_grad itself."""
    results = run_ranks("overlapped", 2, folder, kinds=["qwen3-tied", "qwen3"])
    assert len(results) == 2
    assert max(error for error, _ in results.values()) < 1e-5, results
    # The untied head waits for its gathered weights, in each of its micro-batches, though its module is never called.
    assert {name: waits > 0 for name, (_, waits) in results.items()} == {"qwen3-tied": False, "qwen3": True}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_checkpoint_loads_into_any_layout(folder: Path, distributed_optimizer: bool) -> None:
    """Three steps after the load: an optimizer state restored wrongly shows in the second."""
    results = run_ranks("reshard", 4, folder, distributed_optimizer=distributed_optimizer)
    continued = results.pop("continued tp2 pp1")
    assert len(results) == 4
    assert results["loaded tp2 pp1"] == continued
    for name, values in results.items():
        assert values == pytest.approx(continued, rel=2e-5), (name, values, continued)
