"""Ctrl-C as a terminal gives it, to every process of the group: training saves and says so, other stages keep what is sealed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import make_scored_store
from tiny_models import make_model, write_prompts

from megatron_opd.checkpoints.saved import latest_checkpoint, read_state
from megatron_opd.errors import INTERRUPTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    write_prompts(folder / "prompts.jsonl", 64)
    return folder


def start(folder: Path, stage: str, *words: str, cwd: Path | None = None, **settings: Any) -> subprocess.Popen[str]:
    paths = {"run_dir": ".", "models.teacher": "teacher", "rollout.model": "student", "train.init": "student", "train.store": "store"}
    overrides = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    overrides += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_opd", stage, "tiny", *overrides, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, cwd=cwd,
    )  # fmt: skip


def train(folder: Path, output: str, *words: str, **settings: Any) -> subprocess.Popen[str]:
    shared = {"train.global_batch": 4, "train.micro_batch_tokens": 128, "train.steps": 100_000, "train.save_every": 100_000}
    return start(folder, "train", *words, **shared | {"train.output": str(folder / output)} | settings)


def rows(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_until(run: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.01)


def press(run: subprocess.Popen[str]) -> None:
    os.killpg(run.pid, signal.SIGINT)


def last_words(run: subprocess.Popen[str]) -> str:
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == INTERRUPTED, printed[-3000:]
    assert "Traceback" not in printed
    assert "KeyboardInterrupt" not in printed
    end = time.monotonic() + 60
    while is_alive(run.pid):
        assert time.monotonic() < end, "processes of the run are left"
        time.sleep(0.1)
    return printed


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_training_finishes_its_step_and_saves(folder: Path, ranks: str) -> None:
    output = folder / f"saves-{ranks}"
    run = train(folder, output.name, "--nproc", ranks)
    wait_until(run, lambda: len(rows(output)) >= 3)
    press(run)
    printed = last_words(run)
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    step = read_state(checkpoint)["step"]
    assert step == rows(output)[-1]["step"] >= 3
    assert f"train: stopped after step {step} as asked; the same command goes on from {checkpoint}" in printed
    assert printed.count("a second Ctrl-C ends at once") == 1


def test_writers_of_a_checkpoint_live_through_it(folder: Path) -> None:
    """With a save after every step there is always one under way."""
    output = folder / "writes"
    run = train(folder, output.name, **{"train.save_every": 1})
    wait_until(run, lambda: len(rows(output)) >= 8 and any((output / "checkpoints").glob(".step_*")))
    press(run)
    assert "could not be written" not in last_words(run)
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == rows(output)[-1]["step"]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_second_ends_at_once(folder: Path, ranks: str) -> None:
    """The first finds a save under way that takes a while; what is said to be saved is."""
    output = folder / f"twice-{ranks}"
    run = train(folder, output.name, "--nproc", ranks, **{"train.save_every": 4})
    wait_until(run, lambda: (output / "checkpoints/latest").exists())
    press(run)
    assert run.stdout is not None
    printed = ""
    while "a second Ctrl-C" not in printed:
        printed += run.stdout.readline()
    press(run)
    printed += last_words(run)
    if "ended at once" in printed:  # it had not saved yet
        assert f"the last whole checkpoint is {latest_checkpoint(output)}; steps that no checkpoint holds are lost" in printed
    else:
        assert "stopped after step" in printed


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("seconds", [0.5, 2.5, 5.0])
def test_before_training_has_started(folder: Path, ranks: str, seconds: float) -> None:
    """While Python imports, while the models are looked at, while the ranks find each other: one sentence."""
    run = train(folder, f"early-{ranks}-{seconds}", "--nproc", ranks)
    time.sleep(seconds)
    press(run)
    assert "interrupted" in last_words(run)


def test_sampling_keeps_sealed_parts(folder: Path) -> None:
    store = folder / "rollouts.opd.zarr"
    run = start(folder, "rollout", "--sft-teacher", str(folder / "teacher"), **{
        "rollout.prompts": str(folder / "prompts.jsonl"), "rollout.prompts_per_part": 4, "rollout.sampling.max_new_tokens": 100,
    })  # fmt: skip
    wait_until(run, lambda: any(store.glob("parts/0*/zarr.json")))
    press(run)
    assert "interrupted: parts that are sealed are kept, others are made again; the same command goes on" in last_words(run)
    assert 0 < len(list(store.glob("parts/0*/zarr.json"))) < 16


def test_ranks_start_from_any_folder(folder: Path, tmp_path: Path) -> None:
    """Where one stands, a folder is named as the package: a clone's parent."""
    (tmp_path / "megatron_opd").mkdir()
    (tmp_path / "megatron_opd/__init__.py").write_text("raise ImportError('not this one')\n")
    code = "import sys; sys.path.remove(''); from megatron_opd.__main__ import run; sys.exit(run())"  # as the installed command does
    paths = {"run_dir": "run", "models.teacher": "teacher", "train.init": "student", "train.store": "store", "train.output": "anywhere"}
    words = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    words += ["train.steps=1", "train.global_batch=4", "train.micro_batch_tokens=128", "--nproc", "2"]
    run = subprocess.run([sys.executable, "-c", code, "train", "tiny", *words], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(rows(folder / "anywhere")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.parallel.cp=64"], "the layout takes 64 ranks, and this machine has no GPU"),
        (["train.parallel.tp=8"], "tp=8 does not divide the model's 4 attention heads"),
        (["train.store=/nowhere"], "/nowhere"),
        (["train.parallel.pp=2", "--nproc", "3"], "train.parallel: 3 ranks do not fit tp=1 pp=2 cp=1 ep=1; start 2 ranks, or a multiple"),
        (["--nproc", "8"], "train.global_batch = 4 is smaller than 8 data-parallel ranks"),
        (["train.recompute=selective", 'train.recompute_modules=["moe"]'], "train.recompute_modules: a Qwen3ForCausalLM has no moe"),
    ],
)
def test_what_ranks_would_refuse_is_refused_before_there_are_any(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_opd.cli import main
    from megatron_opd.train import launch

    monkeypatch.setattr(launch.subprocess, "Popen", None)  # a process that were started would be an error of another kind
    paths = {"run_dir": "run", "models.teacher": "teacher", "train.init": "student", "train.store": "store"}
    overrides = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    assert main(["train", "tiny", *overrides, "train.global_batch=4", *words]) == 2
    assert message in capsys.readouterr().err
