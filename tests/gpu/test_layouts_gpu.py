"""What only GPUs can run: bfloat16 against a CPU's float32 losses; Transformer Engine's layers and FP8 in every layout, against one GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.errors import UserError
from megatron_opd.model.fp8 import Machine, check_fp8, this_machine
from megatron_opd.recipe.layout import Fp8Config, ParallelConfig

pytestmark = pytest.mark.gpu
LAYOUTS: list[dict[str, Any]] = [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}, {"ep": 2}, {"tp": 2, "ep": 4}]


@pytest.fixture(scope="module")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(scope="module")
def machine(gpu: None) -> Machine:
    machine = this_machine()
    if machine.transformer_engine is None:
        pytest.skip("no Transformer Engine")
    return machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose sizes FP8 products take: multiples of 32."""
    folder = tmp_path_factory.mktemp("gpu")
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    make_model(folder / "dense", "qwen3", layers=4, **sizes)
    make_model(folder / "mixture", "qwen3-moe", layers=4, **sizes, moe_intermediate_size=64)
    make_scored_store(folder / "store", sampler=folder / "dense", teacher=folder / "dense")
    return folder


def fitting_layouts(kind: str) -> tuple[int, list[dict[str, Any]]]:
    """How many GPUs there are, and the layouts that they hold."""
    gpus = torch.cuda.device_count()
    fitting = [sizes for sizes in LAYOUTS if gpus % ParallelConfig(**sizes).min_ranks == 0 and (kind == "mixture" or "ep" not in sizes)]
    if not fitting:
        pytest.skip(f"{gpus} GPU(s) for layouts of 2 and more ranks")
    return gpus, fitting


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_gpu_trains_as_a_cpu_does(gpu: None, folder: Path, kind: str) -> None:
    """With or without Transformer Engine; at a learning rate that bfloat16 follows."""
    options = [{"lr": 1e-3}]
    on_cpu, on_gpu = (
        [*run_ranks("losses", 1, folder, on_gpus=gpus, kind=kind, layouts=[{}], options=options).values()][-1] for gpus in (False, True)
    )
    assert on_gpu == pytest.approx(on_cpu, rel=5e-2)
    assert on_gpu != on_cpu


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_every_layout_trains_as_one_rank_does(machine: Machine, folder: Path, kind: str) -> None:
    gpus, fitting = fitting_layouts(kind)
    single = run_ranks("losses", 1, folder, on_gpus=True, kind=kind, layouts=[{}])["dp"]
    for name, values in run_ranks("losses", gpus, folder, on_gpus=True, kind=kind, layouts=fitting).items():
        assert values == pytest.approx(single, rel=5e-2), (name, values, single)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_checkpoint_of_one_layout_goes_on_in_others(machine: Machine, folder: Path, kind: str) -> None:
    gpus, fitting = fitting_layouts(kind)
    saved, *others = fitting
    options = {"deterministic": True}
    results = run_ranks("reshard", gpus, folder, on_gpus=True, kind=kind, saved=saved, loaded=[saved, *others], options=options)
    assert results.pop("weights") == [0.0]
    continued, same, *moved = results.values()
    assert same == continued
    for values in moved:
        assert values == pytest.approx(continued, rel=5e-2), results


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_trains_as_bfloat16_does(machine: Machine, folder: Path, recipe: Any, kind: str) -> None:
    try:
        check_fp8(Fp8Config(recipe=recipe), machine)
    except UserError as error:
        pytest.skip(str(error))
    options: list[dict[str, Any]] = [{"fp8": {"recipe": recipe}}]
    if recipe != "delayed":
        options.append({"fp8": {"recipe": recipe, "bf16_first_layers": 1, "bf16_last_layers": 1}})
        options.append({"fp8": {"recipe": recipe, "parameters": True}})
    single, *others = run_ranks("losses", 1, folder, on_gpus=True, kind=kind, layouts=[{}], options=options).values()
    for values in others:
        assert values[::2] == pytest.approx(single[::2], rel=0.1), (values, single)
        assert values != single


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_deterministic_run_resumes_bit_for_bit(gpu: None, folder: Path, kind: str) -> None:
    results = run_ranks(
        "reshard", torch.cuda.device_count(), folder, on_gpus=True, kind=kind, saved={}, loaded=[{}], options={"deterministic": True}
    )
    assert results.pop("weights") == [0.0]
    assert results["loaded dp"] == results["continued"]


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_parameters_go_through_a_checkpoint(machine: Machine, folder: Path, recipe: Any, kind: str) -> None:
    """Weights, losses and gradient norms bit for bit: the FP8 weights are made from the main weights again."""
    fp8 = Fp8Config(recipe=recipe, parameters=True)
    try:
        check_fp8(fp8, machine)
    except UserError as error:
        pytest.skip(str(error))
    options = {"fp8": fp8.model_dump(), "deterministic": True}
    results = run_ranks("reshard", torch.cuda.device_count(), folder, on_gpus=True, kind=kind, saved={}, loaded=[{}], options=options)
    assert results.pop("weights") == [0.0]
    assert results["loaded dp"] == results["continued"]


def test_precision_offload_and_recompute_train_as_the_plain_optimizer_does(machine: Machine, folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
        {"precision_aware_optimizer": True},
        {"precision_aware_optimizer": True, "main_grads_dtype": "bfloat16", "moments_dtype": "bfloat16"},
        {"precision_aware_optimizer": True, "moments_dtype": "fp8"},
        {"precision_aware_optimizer": True, "optimizer_offload": 1.0},
        {"precision_aware_optimizer": True, "optimizer_offload": 0.5},
    ]
    single, *others = run_ranks("losses", 1, folder, on_gpus=True, kind="dense", layouts=[{}], options=options).values()
    for values in others:
        assert values == pytest.approx(single, rel=5e-2), (values, single)
