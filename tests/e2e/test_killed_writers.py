"""A process of a run that is killed, as the kernel does when memory is short, ends the run with a reason; nothing waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.checkpoints.saved import latest_checkpoint, read_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    return folder


def start(folder: Path, output: str, ranks: int, **options: object) -> subprocess.Popen[str]:
    """Two ranks of a launcher, or one in the process that is started; a save is always under way."""
    settings = {"save_every": 1, "global_batch": 4, "micro_batch_tokens": 128, "parallel.tp": ranks, "steps": 100_000} | options
    paths = {"run_dir": ".", "train.init": "student", "train.store": "store", "train.output": output}
    overrides = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    overrides += [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_opd", "train", "tiny", *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def children(parents: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for parent in parents:
        try:
            found += parent.children()
        except psutil.NoSuchProcess:
            continue
    return found


def kill_one(run: subprocess.Popen[str], find: Callable[[], list[psutil.Process]]) -> None:
    """Kill the first process that `find` finds."""
    end = time.monotonic() + 200
    while True:
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < end, "there is no such process"
        for process in find():
            try:
                process.kill()
                return
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.002)


def last_words(run: subprocess.Popen[str]) -> str:
    """What it printed, once no process of it is left."""
    printed, _ = run.communicate(timeout=200)
    end = time.monotonic() + 60
    while True:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return printed
        assert time.monotonic() < end, "processes of the run are left"
        time.sleep(0.1)


def addresses(process: psutil.Process) -> set[str]:
    """Where a process listens."""
    return {entry.laddr.ip for entry in process.net_connections("inet") if entry.status == psutil.CONN_LISTEN}  # pyright: ignore


@pytest.mark.parametrize(("generation", "ranks"), [("writer", 2), ("worker", 1)])
def test_who_writes_a_checkpoint_is_killed(folder: Path, generation: str, ranks: int) -> None:
    """A rank's writer, or one of the processes that it has for its files. The same command goes on."""
    output = folder / f"{generation}-{ranks}"
    run = start(folder, output.name, ranks)
    end = time.monotonic() + 200
    while latest_checkpoint(output) is None:
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < end, "nothing is saved"
        time.sleep(0.05)
    launcher = psutil.Process(run.pid)
    trainers = launcher.children() if ranks > 1 else [launcher]
    assert len(trainers) == ranks
    for trainer in trainers:
        assert addresses(trainer) <= {"127.0.0.1"}, "others on the network reach the run"
    kill_one(run, lambda: children(trainers) if generation == "writer" else children(children(trainers)))
    printed = last_words(run)
    assert run.returncode == 2, printed[-3000:]
    assert "the checkpoint of step" in printed
    assert "could not be written: rank " in printed
    assert "was ended by SIGKILL" in printed
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    assert f"the last whole checkpoint is {checkpoint}; fix this and run the same command again" in printed
    if ranks == 1:
        step = read_state(checkpoint)["step"]
        again, _ = start(folder, output.name, ranks, steps=step + 1).communicate(timeout=200)
        assert f"going on after step {step}" in again


def test_a_rank_is_killed(folder: Path) -> None:
    run = start(folder, "rank", 2)
    launcher = psutil.Process(run.pid)
    kill_one(run, lambda: launcher.children()[1:])
    printed = last_words(run)
    assert run.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL; no checkpoint was saved; the same command goes on" in printed
