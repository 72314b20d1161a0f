"""Predicted step times: bytes and FLOPs against the simulated step, shares by hand, and the shipped recipes' layouts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cost.gpus import GPUS
from megatron_opd.estimate.known_models import known_config
from megatron_opd.estimate.memory import FIXED_BYTES, FRAGMENTATION, GIB, Layout, fullest_stage
from megatron_opd.estimate.ranges import NOTHING, Range
from megatron_opd.estimate.step_time import COMPUTE_SHARE, EXPOSED, LINK_SHARE, predict_step
from megatron_opd.estimate.traffic import over_nodes, sent_bytes, step_work
from megatron_opd.model.architecture import Architecture, parse_architecture
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.training_stages import TrainerConfig

H100 = GPUS["h100"]
MIB = 2**20
SHIPPED = ["opd_4b", "opd_8b", "opd_30b_a3b", "opd_32b_4nodes"]
PAPER = ["opd_4b_paper", "opd_8b_paper", "opd_30b_a3b_paper"]
H200 = ["opd_4b_h200", "opd_8b_h200", "opd_30b_a3b_h200", "opd_32b_4nodes_h200"]
LAYOUT_FIELDS = {
    "parallel", "recompute", "recompute_modules", "micro_batch_tokens", "precision_aware_optimizer", "optimizer_offload",
    "init", "store", "output",
}  # fmt: skip


def stage_of(name: str, stage: str, *words: str, layers: int | None = None) -> tuple[Architecture, TrainerConfig, int]:
    recipe = load_recipe(name, [f"{stage}.{word}" for word in words])
    arch = parse_architecture(known_config(recipe.models.student) or {}, recipe.models.student)
    gpus = recipe.slurm.nodes * recipe.slurm.gpus_per_node
    return dataclasses.replace(arch, num_layers=layers or arch.num_layers), getattr(recipe, stage), gpus


# python -m megatron_opd.simulate RECIPE STAGE stage.WORD ... --gpus N --layers L --micro-batches M: sizes of its collectives in MiB.
SIMULATED: list[tuple[tuple[str, str], list[str], int, int, dict[str, list[tuple[str, float, int]]]]] = [
    (
        ("opd_8b_paper", "train"), [], 2, 2,
        {"tp": [("all-gather", 4608, 4), ("reduce-scatter", 3584, 4)], "dp": [("all-gather", 777.5, 2), ("reduce-scatter", 1555, 2)]},
    ),
    (
        ("opd_8b", "train"), ["micro_batch_tokens=8704"], 2, 2,
        {"tp": [("all-gather", 1904, 2), ("reduce-scatter", 1360, 2)], "dp": [("all-gather", 1555, 4), ("reduce-scatter", 3110, 4)]},
    ),
    (
        ("opd_8b", "sft"), ["parallel={tp=2, cp=2}"], 2, 2,
        {
            "tp": [("all-gather", 2240, 2), ("reduce-scatter", 1600, 2)], "cp": [("send", 240, 2)],
            "dp": [("all-gather", 1555, 4), ("reduce-scatter", 3110, 4)],
        },
    ),
    (
        ("opd_30b_a3b_paper", "train"), [], 2, 2,
        {"tp": [("all-gather", 960, 4), ("reduce-scatter", 768, 4)], "ep": [("all-to-all", 2304, 8)]},
    ),
    (("opd_30b_a3b_paper", "train"), ["parallel={tp=1, ep=8}", "recompute=none", "micro_batch_tokens=4608"], 2, 2, {"ep": [("all-to-all", 2304, 8)]}),
    (("opd_32b_4nodes", "train"), [], 4, 4, {"pp": [("send", 60, 2)]}),
    (("opd_8b_paper", "train"), ["fp8={recipe='tensorwise'}"], 2, 2, {"tp": [("all-gather", 2560, 4), ("reduce-scatter", 3584, 4)]}),
    (("opd_8b_paper", "train"), ["fp8={recipe='blockwise'}"], 2, 2, {"tp": [("all-gather", 3152, 4), ("reduce-scatter", 3584, 4)]}),
]  # fmt: skip


@pytest.mark.parametrize(("run", "words", "layers", "micro_batches", "messages"), SIMULATED)
def test_bytes_are_those_of_the_simulated_step(
    run: tuple[str, str], words: list[str], layers: int, micro_batches: int, messages: dict[str, list[tuple[str, float, int]]]
) -> None:
    arch, config, gpus = stage_of(*run, *words, layers=layers)
    layout = Layout.of(config, gpus)
    tokens = config.micro_batch_tokens * micro_batches * layout.dp
    work = step_work(arch, config, layout, tokens=tokens, squared=0)
    assert work.micro_batches == micro_batches
    for kind, sizes in messages.items():
        sent = sum(sent_bytes(operation, size * MIB, ranks) for operation, size, ranks in sizes)
        assert work.sent[kind] == pytest.approx(sent, rel=2e-3), kind


@pytest.mark.parametrize(
    ("words", "simulated"), [(["recompute=full", "micro_batch_tokens=16384", "parallel={tp=4}"], 529), (["micro_batch_tokens=16384", "parallel={tp=4}"], 405)]
)  # fmt: skip
def test_flops_are_those_of_the_simulated_step(words: list[str], simulated: float) -> None:
    """Of Qwen3-8B at full size on 4 ranks, two micro-batches: the head makes logits of responses alone, so somewhat less is simulated."""
    arch, config, gpus = stage_of("opd_8b", "train", *words)
    lengths = [4352, 4352, 4352, 3328] * 2
    layout = Layout.of(config, gpus)
    work = step_work(arch, config, layout, tokens=layout.dp * sum(lengths), squared=layout.dp * sum(n * n for n in lengths))
    assert work.flops / 1e12 == pytest.approx(simulated, rel=0.02)


def test_a_step_by_hand() -> None:
    time = predict_step(
        989e12,
        {"tp": 45e9, "dp": 9e9},
        gpu="h100",
        calls={"tp": 1000},
        over_nodes={"dp"},
        pp=2,
        micro_batches=10,
        waits=10,
        updated=3.35e12,
    )
    assert (time.compute.low, time.compute.high) == pytest.approx((1 / 0.55, 1 / 0.30))
    tp = Range(0.1 / 0.80 + 8e-3, 0.1 / 0.45 + 30e-3)
    assert time.sent["tp"].low == pytest.approx(tp.low)
    assert time.sent["tp"].high == pytest.approx(tp.high)
    assert time.exposed["tp"].low == pytest.approx(0.6 * tp.low)
    assert time.exposed["dp"].high == pytest.approx(0.5 * 9 / 50 / 0.50)
    assert time.bubble.low == pytest.approx((1 / 0.55 + 0.6 * tp.low) / 10)
    assert (time.waits.low, time.waits.high) == pytest.approx((10 * 30e-6, 10 * 200e-6))
    assert (time.optimizer.low, time.optimizer.high) == pytest.approx((1 / 0.75, 1 / 0.40))
    parts = [time.compute, *time.exposed.values(), time.bubble, time.waits, time.optimizer]
    assert time.total == sum(parts, NOTHING)
    assert "compute 1.8 to 3.3 s, tp 0.08 to 0.25 s" in time.describe()
    with pytest.raises(KeyError):
        predict_step(1e12, {}, gpu="h1000")


def test_every_assumption_goes_from_worse_to_better() -> None:
    assert all(worst < best for worst, best in [*COMPUTE_SHARE.values(), *LINK_SHARE.values()])
    assert all(worst >= best for worst, best in EXPOSED.values())
    for gpu in GPUS.values():
        assert gpu.network < gpu.nvlink < gpu.bytes_per_second


def test_what_makes_a_step_longer() -> None:
    def total(flops: float = 1e15, size: float = 1e10, gpu: str = "h100", **words: Any) -> Range:
        return predict_step(flops, {"tp": size}, gpu=gpu, **words).total

    here = total()
    longer = [total(flops=2e15), total(size=2e10), total(over_nodes={"tp"}), total(pp=4), total(waits=100), total(updated=1e12)]
    longer += [total(offloaded=1e9), total(calls={"tp": 1000}), total(gpu="a100")]
    assert all(other.low > here.low and other.high > here.high for other in longer)
    assert total(pp=4, vpp=2).low < total(pp=4).low
    assert total(fp8=True) == Range(total(fp8=True).low, here.high)
    assert total(mixture=True).high > here.high
    assert total(gpu="b200").high < here.high


def test_groups_over_nodes() -> None:
    assert over_nodes(Layout(8, 4, 1, 1, 1, 8)) == frozenset()
    assert over_nodes(Layout(32, 4, 2, 1, 1, 1)) == {"dp", "expert-dp", "pp"}
    assert "tp" in over_nodes(Layout(32, 16, 1, 1, 1, 1))


def needed(name: str, stage: str) -> float:
    """GiB that a stage takes on the fullest GPU."""
    arch, config, gpus = stage_of(name, stage)
    assert not (arch.layout_faults(config.parallel, config.fp8) + Layout.of(config, gpus).faults(config))
    parts = fullest_stage(arch, config, Layout.of(config, gpus), mean_tokens=4352 if stage == "train" else 16640).parts
    return (sum(parts.values()) * (1 + FRAGMENTATION) + FIXED_BYTES) / GIB


@pytest.mark.parametrize("stage", ["sft", "train"])
@pytest.mark.parametrize("name", [*SHIPPED, *PAPER, *H200])
def test_the_shipped_layouts_fit_with_a_margin(name: str, stage: str) -> None:
    gpu = GPUS["h200" if name in H200 else "h100"]
    assert needed(name, stage) < 0.92 * gpu.memory_gib


@pytest.mark.parametrize("name", H200)
def test_a_recipe_for_larger_gpus_needs_them(name: str) -> None:
    assert max(needed(name, "sft"), needed(name, "train")) > 0.92 * H100.memory_gib


@pytest.mark.parametrize("name", [*PAPER, *H200])
def test_another_layout_is_the_same_training(name: str) -> None:
    other, base = load_recipe(name), load_recipe(name.removesuffix("_paper").removesuffix("_h200"))
    for stage in ("sft", "train"):
        mine, theirs = (getattr(recipe, stage).model_dump(exclude=LAYOUT_FIELDS) for recipe in (other, base))
        assert mine == theirs
    assert (other.models, other.engine) == (base.models, base.engine)


@pytest.mark.parametrize("stage", ["sft", "train"])
@pytest.mark.parametrize("name", [*PAPER, *H200])
def test_the_shipped_layouts_are_faster_than_the_paper_s(name: str, stage: str) -> None:
    base = name.removesuffix("_paper").removesuffix("_h200")
    slower, faster = (name, base) if name in PAPER else (base, name)
    assert seconds(faster, stage) <= seconds(slower, stage) * 1.0001


def seconds(name: str, stage: str) -> float:
    """Of a step, worst case."""
    compare = tool()
    arch, config, gpus = compare.read(name, stage, [])
    return compare.judge(arch, config, gpus, H100, compare.TOKENS[stage]).time.total.high


def tool() -> Any:
    path = Path(__file__).resolve().parents[2] / "tools/compare_layouts.py"
    spec = importlib.util.spec_from_file_location("compare_layouts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_layouts"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tool_lists_settings_that_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["compare_layouts.py", "opd_8b", "train", "--best", "3", "--json", str(tmp_path / "out.json")])
    tool().main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 1 + 3
    assert lines[4].startswith("| opd_8b train | tp 2, dp 4; 8192 tokens; recompute none |")
    assert (tmp_path / "out.json").read_text().startswith('{\n "command": "python compare_layouts.py opd_8b train')


def test_the_table_of_the_docs_is_of_these_recipes() -> None:
    """docs/results/layouts.json has their settings, and simulated peaks near the closed form's; docs/layouts.md is made of it."""
    compare, root = tool(), Path(__file__).resolve().parents[2]
    rows = json.loads((root / "docs/results/layouts.json").read_text())["rows"]
    assert {(row["recipe"], row["stage"]) for row in rows} == {
        (name, stage) for name in [*SHIPPED, *PAPER, *H200] for stage in ("sft", "train")
    }
    page = (root / "docs/layouts.md").read_text()
    assert all(line in page for line in compare.markdown(rows))
    for row in rows:
        arch, config, gpus = compare.read(row["recipe"], row["stage"], [])
        found = compare.judge(arch, config, gpus, GPUS[row["gpu"].lower()], compare.TOKENS[row["stage"]])
        assert row["setting"] == found.describe()
        assert row["seconds"] == pytest.approx([found.time.total.low, found.time.total.high], abs=0.01)
        assert row["peak_gib"] == pytest.approx(found.peak / GIB, abs=0.06)
        assert row["tflop"] == pytest.approx(found.work.flops / 1e12, abs=0.6)
        assert row["sent_gib"] == pytest.approx({kind: size / GIB for kind, size in found.work.sent.items()}, abs=0.06)
        if "simulated" in row:
            even = compare.peak_bytes(arch, config, found.layout, found.work.micro_batches, imbalance=1.0)
            assert row["simulated"]["peak_gib"] == pytest.approx(even / GIB, rel=0.03)
