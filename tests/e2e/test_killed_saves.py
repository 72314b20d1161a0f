"""kill -9 at any file operation of a save leaves a whole checkpoint, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.train.checkpoint import checkpoint_folder, latest_checkpoint, read_state

STEPS = 5
WORKER = Path(__file__).with_name("save_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate(timeout=60)


def run(worker: subprocess.Popen[str], folder: Path, output: str, *, kill_at: int | None = None, **options: Any) -> dict[str, Any]:
    settings = {"steps": STEPS, "save_every": 1, "keep_last": 1, "global_batch": 4, "micro_batch_tokens": 128, "lr": 1e-2} | options
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
    paths = {"run_dir": "run", "train.init": "student", "train.store": "store", "train.output": output}
    overrides += [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps({"recipe": overrides, "kill_at": kill_at, "log": str(folder / f"{output}.log")}) + "\n")
    worker.stdin.flush()
    answer = json.loads(worker.stdout.readline())
    assert answer["killed"] or answer["code"] == 0, (folder / f"{output}.log").read_text()[-3000:]
    return answer


def losses(folder: Path, output: str) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def kill_often(worker: subprocess.Popen[str], folder: Path, output: str, *, kills: int, seed: int) -> None:
    """Kill run after run at a random operation of its first saves, then let one finish."""
    chooser, reached = random.Random(seed), 0
    operations = run(worker, folder, "whole")["operations"]
    per_save = operations // STEPS
    assert per_save > 8
    for _ in range(kills):
        run(worker, folder, output, kill_at=chooser.randint(1, 2 * per_save))
        checkpoint = latest_checkpoint(folder / output)  # whole, or this raises
        step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        assert step >= reached, "a checkpoint was lost"
        reached = step
    run(worker, folder, output)
    assert losses(folder, output) == losses(folder, "whole")
    names = sorted(path.name for path in checkpoint_folder(folder / output).iterdir())
    assert names == ["latest", f"step_{STEPS:06d}"], "something was left behind"


def test_killed_saves(worker: subprocess.Popen[str], folder: Path) -> None:
    kill_often(worker, folder, "killed", kills=5, seed=0)


@pytest.mark.slow
def test_many_killed_saves(worker: subprocess.Popen[str], folder: Path) -> None:
    for seed in range(1, 6):
        kill_often(worker, folder, f"killed-{seed}", kills=12, seed=seed)


def test_which_checkpoints_are_kept(worker: subprocess.Popen[str], folder: Path) -> None:
    run(worker, folder, "kept", keep_last=2, keep_every=2, async_save=False)
    kept = sorted(path.name for path in checkpoint_folder(folder / "kept").glob("step_*"))
    assert kept == ["step_000002", "step_000004", "step_000005"]
    assert losses(folder, "kept") == losses(folder, "whole")
