"""The real Megatron-Core on gloo ranks against transformers and a float64 reference, in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from stores import make_scored_store
from tiny_models import ARCHITECTURES, make_model
from worker import DENSE, MIXTURE

from megatron_opd.cli import main
from megatron_opd.model.architecture import read_architecture
from megatron_opd.recipe.layout import ParallelConfig


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


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
THETA = {"rope_theta": 1e6, "rope_type": "default"}
# name -> (kind of model, fields of config.json, None: without the field)
SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rope-theta-only": ("qwen3", {"rope_theta": 1e6, "rope_parameters": None}),
    "rope-parameters-only": ("qwen3", {"rope_parameters": THETA}),
    "rope-both": ("qwen3", {"rope_parameters": THETA, "rope_theta": 1e6, "rope_scaling": {"type": "default"}}),
    "rope-neither": ("qwen3", {"rope_parameters": None}),
    "llama3-scaling": ("llama", {"rope_theta": 1e6, "rope_scaling": LLAMA3, "rope_parameters": None}),
    "llama3-parameters": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e6}}),
    "llama3-both": ("llama", {"rope_theta": 1e6, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 1e6}}),
    "tied-with-the-same-head": ("qwen3-tied", {}),
    "no-word-of-ties": ("qwen2", {"tie_word_embeddings": None}),
    "no-head-dim": ("llama", {"head_dim": None, "mlp_bias": None, "attention_bias": None, "hidden_act": None}),
    "experts-of-version-4": ("qwen3-moe", {"num_local_experts": None, "num_experts": 4}),
    "one-expert": ("qwen3-moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "no-word-of-normalisation": ("qwen3-moe", {"norm_topk_prob": None}),
}


def test_every_spelling_that_is_accepted_is_the_model_of_transformers(folder: Path) -> None:
    for name, (kind, fields) in SPELLINGS.items():
        directory = shutil.copytree(folder / kind, folder / name)
        config = json.loads((directory / "config.json").read_text()) | fields
        (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    tied = folder / "tied-with-the-same-head" / "model.safetensors"
    tensors = load_file(tied)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tied, metadata={"format": "pt"})
    worst = run_ranks("parity", 1, folder, kinds=list(SPELLINGS), layouts=[{}])
    assert len(worst) == len(SPELLINGS)
    assert max(worst.values()) < 1e-4, worst
    assert read_architecture(folder / "rope-neither").rope_theta != read_architecture(folder / "rope-both").rope_theta


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
