"""The real Megatron-Core on gloo ranks against transformers and a float64 reference, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from stores import make_scored_store
from tiny_models import ARCHITECTURES, make_model
from worker import DENSE, MIXTURE

from megatron_opd.cli import main
from megatron_opd.config import ParallelConfig
from megatron_opd.model.architecture import read_architecture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for kind in ARCHITECTURES:  # six layers do not divide over four stages
        make_model(folder / kind, kind, layers=6 if kind == "qwen2" else 4)
    make_model(folder / "student", "qwen3", seed=5, layers=4)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "qwen3")
    return folder


def test_logits_agree_with_transformers(folder: Path) -> None:
    worst = run_ranks("parity", 4, folder, kinds=list(ARCHITECTURES))
    assert len(worst) == sum("cp" not in sizes for sizes in [*DENSE * (len(ARCHITECTURES) - 1), *MIXTURE])
    assert max(worst.values()) < 1e-4, worst


def test_opd_gradients_agree_with_float64(folder: Path) -> None:
    """Any layout, packing and micro-batch size gives the formula's loss, gradients and gradient norm, also with uneven stages (qwen2)."""
    assert read_architecture(folder / "qwen2").stage_layers(4) == [1, 2, 2, 1]
    results = run_ranks("gradients", 4, folder, kinds=["qwen3-tied", "qwen2", "qwen3-moe"])
    assert len(results) == 2 * (len(DENSE) + 3) + len(MIXTURE) + 3  # the first layout thrice, the last with both normalisations
    for name, errors in results.items():
        assert max(errors) < 1e-5, (name, errors)


@pytest.mark.parametrize(
    ("kind", "saved", "loaded", "options"),
    [
        ("student", {"tp": 2}, [{"tp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}, {}], {}),
        ("student", {"tp": 2}, [{"tp": 2}], {"dtype": "bfloat16", "deterministic": True}),
        ("qwen3-moe", {"pp": 2, "ep": 2}, [{"pp": 2, "ep": 2}, {"tp": 2, "ep": 4}, {}], {}),
        pytest.param("student", {"tp": 2}, [{"tp": 2}, {"pp": 2}, {"pp": 4}, {}], {"distributed_optimizer": False}, marks=pytest.mark.slow),
        pytest.param("student", {"pp": 2, "vpp": 2}, [{"pp": 2, "vpp": 2}, *DENSE], {}, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {}, [{}, *MIXTURE], {}, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {"tp": 2, "pp": 2, "ep": 2}, [{"tp": 2, "pp": 2, "ep": 2}, *MIXTURE], {}, marks=pytest.mark.slow),
    ],
)
def test_checkpoint_loads_into_any_layout(folder: Path, kind: str, saved: dict, loaded: list[dict], options: dict) -> None:
    """Three steps after the load: an optimizer state restored wrongly shows in the second."""
    results = run_ranks("reshard", 4, folder, kind=kind, saved=saved, loaded=loaded, options=options)
    assert results.pop("weights") == [0.0]
    continued = results.pop("continued")
    assert len(results) == len({str(sizes) for sizes in loaded})
    assert next(iter(results.values())) == continued  # the layout that saved it: bit for bit
    for name, values in results.items():
        assert values == pytest.approx(continued, rel=2e-5), (name, values, continued)


@pytest.mark.parametrize(
    ("kind", "worlds"), [("student", [4]), ("qwen3-moe", [2, 4]), pytest.param("student", [2], marks=pytest.mark.slow)]
)
def test_training_is_the_same_on_any_number_of_ranks(folder: Path, kind: str, worlds: list[int]) -> None:
    """Losses and gradient norms of three steps with the distributed optimizer, on one, two and four ranks."""
    single = run_ranks("losses", 1, folder, kind=kind, layouts=[{}])["dp"]
    for ranks in worlds:
        layouts = [sizes for sizes in (MIXTURE if kind == "qwen3-moe" else DENSE) if ParallelConfig(**sizes).min_ranks <= ranks]
        results = run_ranks("losses", ranks, folder, kind=kind, layouts=layouts)
        assert len(results) == len(layouts)
        for name, values in results.items():
            assert values == pytest.approx(single, rel=2e-5), (ranks, name, values, single)


@pytest.mark.parametrize("kind", ["qwen3-moe", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_megatron_loads_a_converted_checkpoint(folder: Path, kind: str) -> None:
    """Into any layout, also one that pads the vocabulary (305 rows) to another size than the file's."""
    make_model(folder / f"odd-{kind}", kind, layers=4, vocab=305)
    assert main(["convert", "to-mcore", str(folder / f"odd-{kind}"), str(folder / f"mcore-{kind}")]) == 0
    layouts = [{}, {"tp": 2, "ep": 4}, {"pp": 2, "vpp": 2, "ep": 2}] if kind == "qwen3-moe" else [{"tp": 2}, {"tp": 2, "pp": 2}]
    results = run_ranks("converted", 4, folder, model=f"odd-{kind}", checkpoint=f"mcore-{kind}", layouts=layouts)
    assert len(results) == len(layouts)
    assert all(results.values()), results
