"""What inference, disk and allocations are estimated at: against figures worked out by hand, and what must go up or down."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.cli import main
from megatron_opd.cost.gpus import GPUS, find_gpu
from megatron_opd.errors import UserError
from megatron_opd.estimate import compute, storage
from megatron_opd.estimate.allocation import Allocation, check_allocation, plan_serving
from megatron_opd.estimate.compute import Sampling, Serving, decode_seconds, prefill_seconds, sampling_hours, scoring_hours, weights_read
from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.estimate.memory import GIB, check_fits
from megatron_opd.estimate.ranges import Range, exactly
from megatron_opd.estimate.recipe import Estimate, Estimator
from megatron_opd.estimate.workload import PROMPT_TOKENS
from megatron_opd.model.architecture import Architecture, parse_architecture, read_architecture
from megatron_opd.recipe.cluster import limit_hours
from megatron_opd.recipe.config import Recipe, ScoreStage
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.inference import EngineConfig, LaunchConfig
from megatron_opd.recipe.layout import ParallelConfig
from megatron_opd.recipe.training_stages import TrainStage

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]


def architecture(name: str) -> Architecture:
    return parse_architecture(KNOWN[name], name)


QWEN3_8B, MIXTURE = architecture("Qwen3-8B"), architecture("Qwen3-30B-A3B")


def estimate(recipe: Recipe, gpus: int = 8, nodes: int = 1) -> Estimate:
    return Estimator(recipe, Allocation(nodes, gpus // nodes), H100).estimate()


def hours(found: Estimate, stage: str) -> Range:
    row = next(row for row in found.rows if row.stage == stage)
    assert row.gpu_hours is not None
    return row.gpu_hours


def test_inference_of_qwen3_8b_by_hand() -> None:
    # 36 layers of (4096 x 128 x (2 x 32 + 2 x 8) + 3 x 4096 x 12288 + norms), and a head of 151936 x 4096; the other table is looked up.
    assert weights_read(QWEN3_8B, 1) == pytest.approx(7.568e9, rel=1e-3)
    assert compute.cache_bytes(QWEN3_8B, 1) == 2 * 2 * 36 * 128 * 8
    assert compute.cache_bytes(QWEN3_8B, 16) == 2 * compute.cache_bytes(QWEN3_8B, 8), "8 key-value heads on 16 GPUs are held twice"
    # 2 x 7.568e9 x 1000 + 2 x 36 x 4096 x 1000^2 FLOP at 60 % of 989e12
    assert prefill_seconds(QWEN3_8B, H100, 1, 1000, worst=False) == pytest.approx(0.0260, rel=2e-3)
    # 15.14e9 bytes of weights and 64 x 2000 x 147456 of cache at 75 % of 3.35e12, and 1 ms
    assert decode_seconds(QWEN3_8B, H100, 1, batch=64, context=2000, worst=False) == pytest.approx(0.01454, rel=2e-3)
    # 85 % of 80 GiB without 16.4e9 bytes of weights, for 4352 tokens
    assert compute.sequences_that_fit(QWEN3_8B, H100, 1, 4352) == pytest.approx(88.2, rel=2e-3)


def test_a_mixture_reads_the_experts_that_are_met() -> None:
    looked_up = MIXTURE.vocab_size * MIXTURE.hidden_size
    assert weights_read(MIXTURE, 1) == pytest.approx(MIXTURE.num_active_parameters - looked_up)
    assert weights_read(MIXTURE, 1e4) == pytest.approx(MIXTURE.num_parameters - looked_up)
    two = weights_read(MIXTURE, 2) - weights_read(MIXTURE, 1)
    assert two == pytest.approx((8 - 8 * 8 / 128) * 48 * 3 * 2048 * 768), "a second token meets half an expert of the first's, on average"


def test_sampling_by_hand() -> None:
    work = Sampling(prompts=6400, samples=1, prompt_tokens=0, response_tokens=exactly(1000), longest=1000)
    found = sampling_hours(QWEN3_8B, H100, Serving(tp=1, copies=2, gpus=3), work)
    step = decode_seconds(QWEN3_8B, H100, 1, batch=256, context=500, worst=False)
    assert found.low == pytest.approx(3200 / 256 * 1000 * step * 3 / 3600), "an idle third GPU is paid for"
    assert found.high > found.low


work = st.builds(
    Sampling, prompts=st.integers(1, 10**6), samples=st.integers(1, 16), prompt_tokens=st.floats(10, 4000),
    response_tokens=st.floats(10, 4000).map(exactly), longest=st.integers(4000, 30000),
)  # fmt: skip


@settings(deadline=None)
@given(work=work, name=st.sampled_from(["Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-0.6B"]), copies=st.integers(1, 16))
def test_what_makes_inference_dearer(work: Sampling, name: str, copies: int) -> None:
    arch = architecture(name)

    def dearer(more: Sampling, *, strictly: bool = True) -> None:
        serving = Serving(1, copies, copies)
        before, after = sampling_hours(arch, H100, serving, work), sampling_hours(arch, H100, serving, more)
        assert 0 < before.low <= before.high
        assert after.low >= before.low and after.high >= before.high  # noqa: PT018
        assert not strictly or after.high > before.high

    dearer(replace(work, prompts=2 * work.prompts))
    dearer(replace(work, samples=2 * work.samples))
    dearer(replace(work, response_tokens=work.response_tokens * 2))
    dearer(replace(work, prompt_tokens=2 * work.prompt_tokens))
    rollouts, tokens = work.prompts * work.samples, work.response_tokens + exactly(work.prompt_tokens)
    once = scoring_hours(arch, H100, Serving(1, copies, copies), rollouts=rollouts, tokens=tokens)
    twice = scoring_hours(arch, H100, Serving(1, copies, copies), rollouts=2 * rollouts, tokens=tokens)
    assert once.low <= twice.low <= 2 * once.low * 1.0001
    # A faster card is never slower.
    assert (
        sampling_hours(arch, GPUS["h200"], Serving(1, copies, copies), work).low
        <= sampling_hours(arch, H100, Serving(1, copies, copies), work).low
    )


def test_more_gpus_do_not_change_gpu_hours() -> None:
    """But for the start of servers, the end of a stage, where few responses are left, and messages of a training that now go over the network."""
    recipe = load_recipe("opd_8b", ["train.global_batch=512"])
    small, large = estimate(recipe), estimate(recipe, gpus=32, nodes=4)
    for stage in ("generate", "sft", "train", "score"):
        before, after = hours(small, stage), hours(large, stage)
        start = compute.START_SECONDS * (32 / 3600)
        slower = 1.02 if stage in ("sft", "train") else 1.0
        assert 0.999 * before.low <= after.low <= slower * before.low + start.low + 1e-9, stage
    pipeline = load_recipe("opd_8b", ["train.parallel.pp=2"])
    flat = load_recipe("opd_8b", [])
    assert hours(estimate(pipeline), "train").low > hours(estimate(flat), "train").low, "the bubble"


def test_steps_of_tokens() -> None:
    """Their tokens are known whatever responses are long, and by default an epoch is as many as the longest mean length makes."""
    sft = next(row for row in estimate(load_recipe("opd_8b")).rows if row.stage == "sft")
    assert sft.tokens == exactly(3000 * 128 * 16384)
    found = estimate(load_recipe("opd_8b", ["sft.steps=null", "sft.epochs=2"]))
    steps = -(-2 * 300_000 * (PROMPT_TOKENS + 16384) // (128 * 16384))
    assert any(line.startswith("  speed: ") and line.endswith(f"; {steps:,} steps") for line in found.lines)
    with pytest.raises(
        UserError, match=r"sft: global_batch_tokens = 100000 is less than a micro-batch of 20480 for each of 8 data-parallel"
    ):
        check_fits(
            QWEN3_8B, "sft", load_recipe("opd_8b", ["sft.global_batch_tokens=100000", "sft.parallel={}"]).sft, 8, 80, mean_tokens=9000
        )


def test_rounds_share_prompts_and_steps_or_repeat_them() -> None:
    one = estimate(load_recipe("opd_4b", ["rollout.num_prompts=16000"]))
    sliced = estimate(load_recipe("opd_4b", ["rollout.num_prompts=16000", "rounds.count=5"]))
    every = estimate(load_recipe("opd_4b", ["rollout.num_prompts=16000", "rounds.count=5", "rounds.prompts=all"]))
    tokens = {id(found): next(row.tokens for row in found.rows if row.stage == "rollout") for found in (one, sliced, every)}
    assert tokens[id(sliced)].low == pytest.approx(tokens[id(one)].low)
    assert tokens[id(every)].low == pytest.approx(5 * tokens[id(one)].low)
    starts = compute.START_SECONDS * (4 * 8 / 3600)
    assert hours(sliced, "train").low == pytest.approx(hours(one, "train").low + starts.low)


def test_the_total_is_the_sum_of_what_is_known() -> None:
    known = ["eval.lcb_v5=null", "eval.lcb_v6=null"]  # without the windows of dates, whose prompts nobody knows
    found = estimate(load_recipe("opd_4b", known))
    assert found.gpu_hours.low == pytest.approx(sum(row.gpu_hours.low for row in found.rows if row.gpu_hours is not None))
    unknown = estimate(load_recipe("opd_4b", ["rollout.prompts=data/nobody-knows", *known]))
    rows = {row.stage: row for row in unknown.rows}
    assert rows["rollout"].per == rows["score"].per == 1000
    assert rows["train"].per is None, "its steps are given"
    assert found.gpu_hours.low - unknown.gpu_hours.low == pytest.approx(hours(found, "rollout").low + hours(found, "score").low)
    teacher = estimate(load_recipe("opd_4b", ["models.teacher=models/nobody-knows"]))
    assert [row.stage for row in teacher.rows if row.gpu_hours is None] == [
        "generate", "score", *(f"eval-{name}-teacher" for name in ("aime24", "aime25", "hmmt25", "lcb_v5", "lcb_v6")), "eval-aime24-sft", "eval-aime24-opd"
    ]  # fmt: skip


def test_an_evaluation_ends_where_the_model_has_no_more_positions() -> None:
    """The teacher has 40,960 positions and the student, a base model, 32,768; the recipe asks for 40,960 tokens."""
    found = estimate(load_recipe("opd_4b", ["eval.lcb_v5.num_prompts=10"]))
    lines = [line for line in found.lines if line.startswith("eval.lcb_v5: ")]
    assert [word in line for line, word in zip(lines, ("(40,704 of 40,960 tokens)", "(32,512 of 40,960 tokens)"), strict=True)] == [
        True,
        True,
    ]
    rows = {row.stage: row for row in found.rows}
    assert rows["eval-lcb_v5-opd"].tokens.high == pytest.approx(10 * 4 * 32768)


def test_disk_by_hand() -> None:
    measured = json.loads((ROOT / "docs/results/bench_store.json").read_text())["bytes_a_token"]
    assert pytest.approx(measured["zarr"], abs=1e-3) == storage.STORE_BYTES
    assert measured["raw"] == storage.RAW_BYTES
    assert storage.store_bytes(exactly(3e9), 3).low == pytest.approx(3e9 * 7.689)
    assert storage.candidate_bytes(ScoreStage(top_k=64, topk_dtype="float16"), exactly(1e6)).high == 1e6 * 64 * 6
    assert storage.candidate_bytes(ScoreStage(), exactly(1e6)).high == 0
    config = TrainStage(init="", store="", output="", save_every=25)
    assert storage.checkpoint_bytes(QWEN3_8B, config) == pytest.approx(114.7e9, rel=1e-3)  # 14 x 8.19e9
    assert storage.checkpoint_bytes(QWEN3_8B, config.model_copy(update={"dtype": "float32"})) == pytest.approx(131.1e9, rel=1e-3)
    assert storage.checkpoint_bytes(QWEN3_8B, config.model_copy(update={"moments_dtype": "bfloat16"})) == pytest.approx(114.7e9, rel=1e-3)
    # A node of two: half of the state, and all weights; of a pipeline over them half of these too, or of a group as large as both.
    for nodes, sizes, bytes_a_parameter in ((1, {}, 14), (2, {"tp": 4}, 8), (2, {"tp": 8, "pp": 2}, 7)):
        spread = config.model_copy(update={"parallel": ParallelConfig(**sizes)})
        assert storage.save_memory(QWEN3_8B, spread, Allocation(nodes, 8)) == pytest.approx(bytes_a_parameter * 8.19e9, rel=1e-3)
    assert [storage.num_checkpoints(config, steps) for steps in (10, 50, 150)] == [1, 2, 3]
    assert storage.num_checkpoints(config.model_copy(update={"keep_every": 50}), 150) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_takes_what_is_said(dtype: Literal["float32", "bfloat16"], tmp_path: Path) -> None:
    """One step of a model large enough that its tensors are nearly all of the checkpoint."""
    student = make_model(tmp_path / "student", hidden_size=256, intermediate_size=1024, layers=4)
    make_scored_store(tmp_path / "store", sampler=student, teacher=student)
    paths = {"run_dir": "run", "models.teacher": "student", "train.init": "student", "train.store": "store", "train.output": "out"}
    words = [f"{key}={str(tmp_path / path)!r}" for key, path in paths.items()] + [
        "train.steps=1",
        "train.global_batch=4",
        f"train.dtype={dtype}",
    ]
    command = [sys.executable, "-m", "megatron_opd", "train", "tiny", *words, "--nproc", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0, run.stderr[-3000:]
    size = sum(file.stat().st_size for file in (tmp_path / "out/checkpoints/step_000001").glob("*.distcp"))
    config = TrainStage(init="", store="", output="", dtype=dtype)
    assert size == pytest.approx(storage.checkpoint_bytes(read_architecture(student), config), rel=0.01)


def test_a_model_that_is_there_is_measured(tmp_path: Path) -> None:
    make_model(tmp_path / "student")
    make_scored_store(tmp_path / "store", sampler=tmp_path / "student", teacher=tmp_path / "student")
    paths = [f"{field}={str(tmp_path / 'student')!r}" for field in ("models.student", "models.teacher", "train.init")]
    found = estimate(load_recipe("tiny", [*paths, f"rollout.store={str(tmp_path / 'store')!r}", "rollout.num_prompts=10"]), gpus=2)
    rows = {row.stage: row for row in found.rows}
    assert rows["models"].disk == exactly(2 * (tmp_path / "student/model.safetensors").stat().st_size)
    assert any(f"({tmp_path / 'store'})" in line for line in found.lines if line.startswith("rollout: 10 prompts"))


@pytest.mark.parametrize(
    ("overrides", "nodes", "per_node", "message"),
    [
        (["train.parallel.tp=4"], 1, 6, r"train\.parallel\.tp = 4 would cut groups of ranks at the edge of nodes of 6 GPUs; take one of 1, 2, 3, 6"),
        (["train.parallel.tp=8"], 2, 3, r"train\.parallel\.tp = 8 would cut"),
        (["train.parallel.pp=3"], 1, 8, r"train\.parallel: 8 ranks do not fit tp=1 pp=3 cp=1 ep=1; start 3 ranks, or a multiple"),
        (["train.global_batch=2"], 1, 8, r"train\.global_batch = 2 is smaller than 8 data-parallel ranks"),
        (["engine.launch={tp=16}"], 2, 8, r"engine\.launch\.tp = 16, but a server runs on one node, which has 8 GPUs"),
        (["engine.launch={tp=4, servers=2, dp=2}"], 1, 8, r"take 16 GPUs of a node, which has 8; servers \* tp \* dp"),
    ],
)  # fmt: skip
def test_what_no_node_can_hold(overrides: list[str], nodes: int, per_node: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_allocation(load_recipe("opd_4b", overrides), Allocation(nodes, per_node))


def test_every_fault_of_an_allocation_at_once_and_by_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["check", "opd_4b", "--nodes", "2", "--gpus", "12", "sft.parallel.tp=4", "train.parallel.tp=4", "engine.launch={tp=7}"]) == 2
    )
    text = capsys.readouterr().err
    assert re.search(r"12 GPUs \(2 nodes of 6\).*sft\.parallel\.tp.*train\.parallel\.tp.*engine\.launch\.tp = 7", text)
    assert main(["check", "opd_4b", "--nodes", "3", "--gpus", "8"]) == 2
    assert "--gpus 8 is the number in all, and not a multiple of --nodes 3" in capsys.readouterr().err
    assert main(["check", "opd_4b", "--gpu", "h200"]) == 2
    assert "--gpu is for the estimate" in capsys.readouterr().err
    assert main(["check", "opd_32b_4nodes", "--nodes", "4"]) == 0
    assert "32 GPUs (4 nodes of 8): H100 of 80 GiB" in capsys.readouterr().out


def test_groups_over_whole_nodes_are_slow_and_possible() -> None:
    notes = check_allocation(load_recipe("opd_4b", ["train.parallel.tp=8", "engine.launch=null"]), Allocation(2, 4))
    assert notes == ["WARNING: train.parallel.tp = 8 is over nodes of 4 GPUs: its messages are many, and go over the network"]


def test_stages_take_the_nodes_that_their_jobs_get() -> None:
    found = estimate(load_recipe("opd_32b_4nodes", ["slurm.shards.score=2", "slurm.time.eval=5"]), gpus=32, nodes=4)
    rows = {row.stage: row for row in found.rows}
    assert [rows[name].gpus for name in ("generate", "rollout", "score", "eval-aime24-opd", "engines")] == [32, 32, 16, 8, 1]
    assert rows["engines"].what == "skipped: the student is too large for one GPU"
    assert "on 1 of 4 nodes" in rows["eval-aime24-opd"].what
    assert any(note.startswith("WARNING: eval-aime24-opd takes ") and "slurm.time.eval is 5:" in note for note in found.notes)
    other = estimate(load_recipe("opd_32b_4nodes", ["slurm.shards.score=2", "slurm.time.eval=5"]), gpus=64, nodes=8)
    assert next(row.gpus for row in other.rows if row.stage == "score") == 64, "these are not the GPUs of the jobs"
    assert not any("slurm.time" in note for note in other.notes)
    assert hours(estimate(load_recipe("opd_8b")), "engines") == compute.START_SECONDS * (2 / 3600)


def test_hours_of_time_limits() -> None:
    times = {"90": 1.5, "90:30": 1.5 + 30 / 3600, "12:00:00": 12, "1-6": 30, "2-00:30": 48.5, "1-01:30:36": 25.51}
    assert {text: limit_hours(text) for text in times} == pytest.approx(times)


def test_copies_of_a_model() -> None:
    teacher = architecture("Qwen3-32B")

    def plan(engine: EngineConfig, tokens: int) -> Serving:
        return plan_serving(engine, "teacher", teacher, Allocation(1, 8), H100, tokens=tokens, stage="generate")

    assert plan(EngineConfig(), 16640) == Serving(tp=2, copies=4, gpus=8)
    assert plan(EngineConfig(), 33024) == Serving(tp=4, copies=2, gpus=8)
    assert plan(EngineConfig(launch=LaunchConfig(tp=4, servers=1)), 33024) == Serving(tp=4, copies=1, gpus=8)
    with pytest.raises(ValueError, match=r"generate: engine\.launch\.tp = 1, but the teacher and one response need about 2 GPUs of 80 GiB"):
        plan(EngineConfig(launch=LaunchConfig()), 33024)
    large = architecture("Qwen3-235B-A22B")
    with pytest.raises(ValueError, match=r"eval: the teacher and one response need about 8 GPUs of 80 GiB, and a node has 4"):
        plan_serving(EngineConfig(), "teacher", large, Allocation(8, 4), H100, tokens=4096, stage="eval")
    assert compute.smallest_copy(teacher, H100, 10**9) is None
    for engine in (EngineConfig(), EngineConfig(launch=LaunchConfig(tp=4, servers=1))):
        with pytest.raises(
            ValueError, match=r"no number of GPUs of 80 GiB suffices for the teacher and one sequence of 1,000,000,000 tokens"
        ):
            plan(engine, 10**9)
    assert plan(EngineConfig(), 500_000).tp == 8, "4 GPUs have room for one of these, no number for 16"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
    ],
)
def test_gpus_by_the_drivers_name(name: str, key: str | None) -> None:
    assert find_gpu(name) == (None if key is None else GPUS[key])


@given(low=st.floats(0.001, 1e9), factor=st.floats(1, 100))
def test_ranges_are_shown_with_two_digits(low: float, factor: float) -> None:
    text = Range(low, low * factor).text()
    ends = [0.01 if end == "under 0.01" else float(end.replace(",", "")) for end in text.split(" to ")]
    for end, value in zip(ends if len(ends) == 2 else ends * 2, (low, low * factor), strict=True):
        assert end == pytest.approx(max(value, 0.01), rel=0.051)
    assert GIB == 1 << 30
