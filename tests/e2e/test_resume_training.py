"""A training run that is killed, or asked to stop, goes on to the same losses and the same weights as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.hf.lineage import hash_tensors

STEPS = 8
HORIZON = {"start": 4, "end": 64, "steps": 6}  # a schedule must go on where it was, too


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    return folder


def start(folder: Path, output: str, **options: Any) -> subprocess.Popen[str]:
    settings = {"steps": STEPS, "save_every": 2, "global_batch": 8, "micro_batch_tokens": 128, "lr": 1e-2, "parallel.tp": 2}
    settings |= {f"loss.horizon.{key}": value for key, value in HORIZON.items()} | options
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
    paths = [f"run_dir={str(folder / 'run')!r}", f"train.init={str(folder / 'student')!r}", f"train.store={str(folder / 'store')!r}"]
    command = [sys.executable, "-m", "megatron_opd", "train", "tiny", *paths, f"train.output={str(folder / output)!r}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output[-3000:]
    return output


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    path = folder / output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(folder: Path, output: str) -> list[tuple[int, float, float, float, int]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"], row["horizon"]) for row in rows(folder, output)]


def wait_for_step(folder: Path, output: str, step: int, run: subprocess.Popen[str]) -> None:
    end = time.time() + 200
    while len(rows(folder, output)) < step:
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.time() < end, "the run makes no progress"
        time.sleep(0.02)


def weights(folder: Path, output: str) -> dict[str, str]:
    target = folder / f"{output}-hf"
    subprocess.run(
        [sys.executable, "-m", "megatron_opd", "convert", "to-hf", str(folder / output), str(target)], check=True, capture_output=True
    )
    return hash_tensors(target)


def processes_of(output: Path) -> list[str]:
    """Command lines of live processes that work for `output`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(output) in text:
            found.append(text)
    return found


def test_killed_and_stopped_runs_end_like_an_undisturbed_one(folder: Path) -> None:
    finish(start(folder, "whole"))
    expected = results(folder, "whole")
    assert [(step, horizon) for step, *_, horizon in expected] == list(enumerate([4, 14, 24, 34, 44, 54, 64, 64], start=1))

    for step in (1, 5):  # before the first checkpoint, and after one: the fifth step comes when the save of the second is done
        run = start(folder, "killed")
        wait_for_step(folder, "killed", step, run)
        run.send_signal(signal.SIGKILL)
        run.wait(30)
        end = time.time() + 30
        while processes_of(folder / "killed"):
            assert time.time() < end, "ranks outlive their launcher"
            time.sleep(0.1)
    output = finish(start(folder, "killed"))
    assert "going on after step" in output
    assert results(folder, "killed") == expected

    run = start(folder, "stopped")
    wait_for_step(folder, "stopped", 3, run)
    run.send_signal(signal.SIGTERM)
    output = finish(run)
    assert "stopped after step" in output
    assert len(results(folder, "stopped")) < STEPS
    finish(start(folder, "stopped"))
    assert results(folder, "stopped") == expected

    assert weights(folder, "killed") == weights(folder, "stopped") == weights(folder, "whole")


def test_another_layout_goes_on_with_the_same_losses(folder: Path) -> None:
    finish(start(folder, "two", steps=4))
    finish(start(folder, "two", steps=STEPS, **{"parallel.tp": 1, "parallel.pp": 2}))
    finish(start(folder, "one", steps=STEPS))
    for there, here in zip(results(folder, "one"), results(folder, "two"), strict=True):
        assert here == pytest.approx(there, rel=2e-5)


def test_another_runs_checkpoint_is_refused(folder: Path) -> None:
    finish(start(folder, "mine", steps=2))
    run = start(folder, "mine", steps=4, global_batch=4)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 2
    assert "global_batch" in output
    assert "Traceback" not in output
