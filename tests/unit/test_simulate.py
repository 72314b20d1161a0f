"""Simulated GPUs without simulating: refusals, what a result says, the time of a whole step, messages; tests/fake_gpu runs the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_opd.cli import main
from megatron_opd.cost.gpus import GPUS
from megatron_opd.errors import UserError
from megatron_opd.estimate.memory import FIXED_BYTES, GIB, Layout
from megatron_opd.estimate.workload import student_of
from megatron_opd.recipe.files import load_recipe
from megatron_opd.simulate import check, needs
from megatron_opd.simulate.devices import device_of
from megatron_opd.simulate.places import place
from megatron_opd.simulate.report import describe, provenance
from megatron_opd.simulate.result import Message, Simulation
from megatron_opd.simulate.timing import predict, whole_step

FOUND = Simulation(
    recipe="opd_8b",
    stage="train",
    ranks=16,
    rank=0,
    layers=36,
    layout={"tp": 4, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "dp": 4},
    gpu="H100",
    gpu_bytes=80 * GIB,
    rest_bytes=FIXED_BYTES,
    lengths=[4352, 4352],
    micro_batches=2,
    steps=2,
    parameters=2_000_000_000,
    peak_bytes=26 * GIB,
    peak_phase="step 1",
    peaks={"build": 20 * GIB, "step": 26 * GIB, "save": 21 * GIB},
    host_peaks={"build": 0, "step": GIB, "save": 30 * GIB},
    by_place=[("[step 0] a.py:1:f", 20 * GIB), ("[step 1] b.py:2:g", 6 * GIB)],
    flops=100e12,
    messages=[
        Message("all-gather", "tp", 4, 36, 4 * GIB, False),
        Message("receive", "pp", 2, 2, GIB, False),
        Message("reduce-scatter", "dp-cp", 4, 4, 8 * GIB, True),
        Message("gather", "dp-cp on the host", 4, 1, GIB, True),
    ],
    waits={"tolist  c.py:3:h": 1, "token counts  d.py:4:i": 96},
    copies={"cpu->cuda BLOCKING 8 B  e.py:5:j": 3, "cpu->cuda pageable async 9 B  f.py:6:k": 2, "cpu->cuda pinned async 9 B  g.py:7:l": 10},
    calls={"generic_gemm": 5},
    runs_out=None,
    stood_in_for=["something"],
    versions={"torch": "2.13.0", "megatron-core": "0.19.2"},
    seconds=8.0,
)


def test_a_result_travels_as_json() -> None:
    assert Simulation.from_json(json.loads(json.dumps(FOUND.to_json()))) == FOUND
    assert sum(FOUND.blocking_copies.values()) == 3
    assert sum(FOUND.pageable_copies.values()) == 2


def test_what_people_read() -> None:
    text = "\n".join([*describe(FOUND, places=1), *provenance(FOUND)])
    assert "20.00 GiB while building, 26.00 GiB in a step, 21.00 GiB in a save; most in 'step 1'" in text
    assert "20.00 GiB  [step 0] a.py:1:f" in text
    assert "6.00 GiB  other places" in text
    assert "reduce-scatter over dp-cp (4 ranks, over several nodes): 4 calls, 8.00 GiB" in text
    assert "the host waits for the GPU 97 times a step" in text
    assert "3 blocking, 2 from or to pageable memory, 10 from pinned memory" in text
    assert "pinned async" not in text
    assert "fits: 26.0 of 77.0 GiB (80 less 3" in text
    full = replace(FOUND, runs_out={"phase": "step 0", "bytes": 78 * GIB, "place": "x.py:1:y"})
    assert "RUNS OUT: 78.0 of 77.0 GiB" in "\n".join(describe(full))
    assert "in 'step 0', at x.py:1:y" in "\n".join(describe(full))


def test_a_whole_step_has_more_micro_batches() -> None:
    step = whole_step(FOUND, 10)
    assert step.flops == 5 * FOUND.flops
    assert step.sent["tp"] == pytest.approx(5 * 3 / 4 * 4 * GIB)  # a ring sends 3 of 4 parts; with each micro-batch
    assert step.sent["dp-cp"] == pytest.approx(3 / 4 * 8 * GIB)  # once a step
    assert step.sent.keys() == {"tp", "dp-cp"}  # what is received is sent by another rank, and the host's network is another
    assert step.calls == {"tp": 180, "dp-cp": 4}
    assert step.over_nodes == {"dp-cp"}
    assert step.waits == 1 + 5 * 96


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ("event.synchronize  megatron/core/transformer/moe/token_dispatcher.py:4:i < megatron_opd/train/step.py:1:f", 5),
        ("event.synchronize  megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py:1:step", 1),
        ("item  transformer_engine/pytorch/optimizers/fused_adam.py:1:step", 1),
        ("tolist  megatron_opd/train/update.py:1:update", 1),
    ],
)
def test_waits_of_the_optimizer_are_no_more_with_more_micro_batches(where: str, times: int) -> None:
    assert whole_step(replace(FOUND, waits={where: 6}), 10).waits == times * 6


def test_time_grows_with_arithmetic_and_messages() -> None:
    recipe = load_recipe("opd_8b", [])
    arch = student_of(recipe).arch
    assert arch is not None
    layout = Layout.of(recipe.train, 8)
    step = whole_step(FOUND, 10)
    time = predict(step, arch, recipe.train, layout, GPUS["h100"])
    assert time.compute.low == pytest.approx(
        predict(replace(step, flops=2 * step.flops), arch, recipe.train, layout, GPUS["h100"]).compute.low / 2
    )
    near = predict(replace(step, over_nodes=frozenset()), arch, recipe.train, layout, GPUS["h100"])
    assert near.total.high < time.total.high


def test_a_place_names_files_of_ours_from_their_package_on() -> None:
    scope: dict[str, Any] = {"place": place}
    for path, name in (
        ("/x/megatron_opd/train/step.py", "outer"),
        ("/x/megatron_opd/simulate/y.py", "hidden"),
        ("/x/megatron/core/z.py", "inner"),
    ):
        body = {"outer": "hidden()", "hidden": "inner()", "inner": "place()"}[name]
        exec(compile(f"def {name}():\n    return {body}", path, "exec"), scope)
    assert scope["outer"]() == "megatron/core/z.py:2:inner < megatron_opd/train/step.py:2:outer"


def test_devices_are_those_whose_capability_is_known() -> None:
    assert {name: device_of(gpu).capability for name, gpu in GPUS.items()} == {
        "a100": (8, 0),
        "h100": (9, 0),
        "h200": (9, 0),
        "b200": (10, 0),
    }
    assert device_of(GPUS["h200"]).memory == 140 * GIB
    with pytest.raises(UserError, match="a T4 can't be simulated"):
        device_of(replace(GPUS["h100"], name="T4"))


def test_a_torch_built_for_cuda_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "torch_folder", lambda: tmp_path)
    version = tmp_path / "version.py"
    version.write_text("__all__ = ['cuda', 'hip']\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    needs.check_torch()
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    with pytest.raises(UserError, match=r"needs a PyTorch without CUDA, this one is built for CUDA 13\.0: install torch's CPU build"):
        needs.build_guard()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler .*apt-get install g\+\+"):
        needs.build_guard()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="looked for no-such-compiler"):
        needs.build_guard()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'error: no such standard' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UserError, match=r"could not compile .*guard\.cpp for this torch: error: no such standard"):
        needs.build_guard()
    assert not list((tmp_path / "megatron_opd").iterdir())


def test_a_cache_that_can_t_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't be made .*set XDG_CACHE_HOME"):
        needs.build_guard()


def test_torch_must_come_later() -> None:
    code = "import torch; import megatron_opd.simulate.gpu"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "must be imported before torch" in result.stderr


def test_another_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(UserError, match=r"Transformer Engine 9\.9 is installed.*tools/te_signatures\.py"):
        needs.check_transformer_engine()


def test_the_checkout_s_transformer_engine_goes_before_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = "9.9"
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(needs.importlib.metadata, "version", lambda name: installed)
    monkeypatch.setattr(needs, "CHECKOUT", tmp_path)
    assert needs.find_transformer_engine() == ""
    made = tmp_path / f".te-{needs.TABLE_VERSION}"
    (made / "transformer_engine").mkdir(parents=True)
    assert needs.find_transformer_engine() == str(made)
    monkeypatch.setattr(check, "build_guard", lambda: Path())
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    request = check.Request("opd_8b", [], 8, GPUS["h100"])
    assert check._environment(request) == f"{made}{os.pathsep}/elsewhere"
    installed = needs.TABLE_VERSION
    assert needs.find_transformer_engine() == ""


def test_without_a_checkout_the_command_of_make_te_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "make te;" in needs.no_transformer_engine()
    monkeypatch.setattr(needs, "CHECKOUT", tmp_path)
    command = f"pip install --no-deps --target FOLDER transformer-engine=={needs.TABLE_VERSION} "
    assert command in needs.no_transformer_engine()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the simulations that `check` starts, which are answered with FOUND."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        rank = int(command[command.index("--rank") + 1])
        Path(command[command.index("--json") + 1]).write_text(json.dumps(replace(FOUND, rank=rank).to_json()))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(check, "build_guard", lambda: Path())
    monkeypatch.setattr(needs, "find_transformer_engine", lambda: "/te")
    monkeypatch.setattr(check.subprocess, "run", run)
    return commands


def test_check_simulates_the_first_rank_of_each_pipeline_stage(simulated: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "opd_8b", "--gpus", "16", "--simulate", "train.parallel.pp=2", "train.lr=1e-6"]) == 0
    ranks = [(command[6], command[command.index("--rank") + 1]) for command in simulated]
    assert ranks == [("sft", "0"), ("train", "0"), ("train", "8")]
    assert all({"train.parallel.pp=2", "train.lr=1e-6", "--save"} <= set(command) and "--no-te" not in command for command in simulated)
    written = capsys.readouterr()
    assert "closed form, pipeline stage 2 of 2" in written.out
    assert "a whole step has about" in written.out
    assert "[3/3] simulating train as rank 8 of 16" in written.err


def test_check_simulates_the_rank_that_is_asked_for(simulated: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "opd_8b", "--nodes", "1", "--simulate", "--rank", "3", "--no-te", "--layers", "2"]) == 0
    assert [command[command.index("--rank") + 1] for command in simulated] == ["3", "3"]
    assert all("--no-te" in command and command[command.index("--layers") + 1] == "2" for command in simulated)


def test_what_does_not_fit_is_an_error(
    simulated: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {"phase": "step 0", "bytes": 78 * GIB, "place": "x.py:1:y"}
    monkeypatch.setattr(Simulation, "from_json", staticmethod(lambda tree: replace(FOUND, runs_out=out)))
    assert main(["check", "opd_8b", "--gpus", "8", "--simulate"]) == 2
    assert "train: rank 0 runs out of memory in 'step 0', at x.py:1:y" in capsys.readouterr().err


def test_a_simulation_that_fails_shows_its_last_words(
    simulated: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.subprocess, "run", lambda command, **options: SimpleNamespace(returncode=1, stderr="a\nKeyError: 'x'\n"))
    assert main(["check", "opd_8b", "--gpus", "8", "--simulate"]) == 1
    assert "KeyError: 'x'" in capsys.readouterr().err
    monkeypatch.setattr(check.subprocess, "run", lambda command, **options: SimpleNamespace(returncode=2, stderr="no Blackwell\n"))
    assert main(["check", "opd_8b", "--gpus", "8", "--simulate"]) == 2
    assert "sft, rank 0: no Blackwell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--simulate"], "--simulate needs the number of GPUs: add --gpus N"),
        (["--gpus", "8", "--rank", "0"], "--rank is for a simulation: add --simulate"),
        (["--gpus", "8", "--no-te"], "--no-te is for a simulation: add --simulate"),
        (["--gpus", "8", "--layers", "2"], "--layers is for a simulation: add --simulate"),
        (["--gpus", "8", "--simulate", "--rank", "8"], "--rank 8 is none of 8 ranks, which count from 0"),
        (["--gpus", "6", "--simulate"], "the recipe does not fit 6 GPUs: "),
        (["--gpus", "8", "--simulate", "train.global_batch=1"], "train.global_batch = 1 is smaller than 4 data-parallel ranks"),
        (["--gpus", "8", "--simulate", "--node-memory", "64"], "--node-memory is for the estimate"),
        (["--gpus", "8", "--simulate", "models.student=models/unheard-of"], "no model whose sizes are known"),
    ],
)
def test_what_can_t_be_simulated_is_refused(
    arguments: list[str], message: str, simulated: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "opd_8b", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not simulated


def test_a_missing_transformer_engine_is_never_silent(
    simulated: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs, "find_transformer_engine", lambda: None)
    assert main(["check", "opd_8b", "--gpus", "8", "--simulate"]) == 2
    assert "make te" in capsys.readouterr().err
    assert not simulated
    assert main(["check", "opd_8b", "--gpus", "8", "--simulate", "--no-te"]) == 0


@pytest.mark.parametrize(
    ("vpp", "global_batch", "micro_batches"),
    [
        (1, 64, 3),  # what fills two stages
        (2, 64, 4),
        (1, 12, 3),  # the recipe's own
        (2, 12, 4),  # an interleaved schedule takes two at a time
        (2, 8, 2),
    ],
)
def test_micro_batches_fill_the_pipeline_and_are_no_more_than_the_recipe_s(
    vpp: int, global_batch: int, micro_batches: int, simulated: list[list[str]]
) -> None:
    fields = ["train.parallel.pp=2", f"train.parallel.vpp={vpp}", f"train.global_batch={global_batch}"]
    assert main(["check", "opd_8b", "--gpus", "8", "--simulate", *fields]) == 0
    numbers = {command[6]: int(command[command.index("--micro-batches") + 1]) for command in simulated}
    assert numbers == {"sft": 2, "train": micro_batches}
