"""The trainer's promises that need several ranks: skipped steps, the gradient norm, shapes in pipelines, and the estimator's counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import TRAINER_WORKER, run_ranks
from stores import make_scored_store
from tiny_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for kind in ("qwen3", "qwen3-tied", "qwen2", "qwen3-moe"):
        make_model(folder / kind, kind, layers=4)
    make_model(folder / "student", "qwen3", seed=5, layers=4)
    make_model(folder / "mixture", "qwen3-moe", seed=5, layers=4)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "qwen3")
    return folder


def test_the_estimator_counts_as_megatron_does(folder: Path) -> None:
    """Parameters of every rank exactly; Adam's moments over the data-parallel ranks, but for the padding of Megatron's buffers."""
    results = run_ranks("estimates", 4, folder, worker=TRAINER_WORKER, kinds=["qwen3", "qwen3-tied", "qwen2"])
    assert len(results) == 3 * 4 * 4
    for name, ((counted, predicted), (moments, predicted_moments)) in results.items():
        assert counted == predicted, name
        assert moments == pytest.approx(predicted_moments, rel=0.1), name


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_step_that_is_not_finite_leaves_no_trace(folder: Path, distributed_optimizer: bool) -> None:
    results = run_ranks("skipping", 4, folder, worker=TRAINER_WORKER, distributed_optimizer=distributed_optimizer)
    assert len(results) == 3 * 6
    assert all(results.values()), results


def test_stages_of_a_pipeline_know_the_shapes_that_they_would_ask_for(folder: Path) -> None:
    """Every answer of the plan beside that of Megatron's exchange, then the step's numbers with the one and with the other."""
    results = run_ranks("planned_shapes", 4, folder, worker=TRAINER_WORKER)
    assert results.pop("refused").startswith("pipeline: the stages have made different micro-batches of this step")
    assert len(results) == 5
    for name, (same, compared) in results.items():
        assert same, name
        assert compared >= 4, name


def test_the_gradient_norm_is_computed_once_and_is_megatrons(folder: Path) -> None:
    """With and without clipping, for one optimizer and for experts beside it."""
    results = run_ranks("one_norm", 4, folder, worker=TRAINER_WORKER)
    assert len(results) == 2 * 2 * 2 * 4
    assert all(results.values()), [name for name, right in results.items() if not right]


def test_fp8_parameters_are_loaded_rounded_and_their_main_weights_exact(folder: Path) -> None:
    """With a stand-in for Transformer Engine's quantized tensors; gate and up are cut out of one of them."""
    results = run_ranks("quantized", 2, folder, worker=TRAINER_WORKER, kinds=["qwen3", "qwen2"])
    assert len(results) > 80
    assert all(results.values()), [name for name, right in results.items() if not right]


def test_a_checkpoint_loads_into_layers_with_an_extra_state_but_lacks_no_tensor(folder: Path) -> None:
    """As a run that moves from CPUs, or GPUs without Transformer Engine, to GPUs with it."""
    results = run_ranks("other_layers", 2, folder, worker=TRAINER_WORKER)
    assert results["extra state"] == results["continued"]
    assert "can't be loaded: 4 of the tensors wanted are not in it (first: decoder.final_layernorm.bias)" in results["extra parameter"]


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [("student", {"tp": 2}, [{"pp": 2, "vpp": 2}, {}]), ("qwen3-moe", {"tp": 2, "ep": 2}, [{"pp": 2, "ep": 2}])],
)
def test_what_each_rank_writes_is_what_megatron_gathers(folder: Path, kind: str, saved: dict, loaded: list[dict]) -> None:
    """The same names and numbers in the files, bit for bit, and so in every layout: checkpoints of older versions go on."""
    results = run_ranks("gathered", 4, folder, worker=TRAINER_WORKER, kind=kind, saved=saved, loaded=loaded)
    assert len(results) == 4 + 1 + len(loaded)
    assert all(results.values()), results
