"""A run that goes on with other settings, from another place, without its pointer, beside another; and errors of a single rank."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.data.order import TrainingOrder
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.safety.locks import Lock
from megatron_opd.train.identity import changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    assert "train: " in train(folder, "first", steps=2)
    return folder


def train(folder: Path, output: str, *, code: int = 0, ranks: int = 1, store: str = "store", **options: Any) -> str:
    settings = {"save_every": 1, "global_batch": 4, "micro_batch_tokens": 128, "lr": 1e-2} | options
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
    paths = {"run_dir": output, "train.init": "student", "train.store": store, "train.output": output}
    overrides += [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    command = [sys.executable, "-m", "megatron_opd", "train", "tiny", *overrides, "--nproc", str(ranks)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == code, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout + run.stderr


def resumed(folder: Path, name: str) -> str:
    """A copy of the run of two steps."""
    shutil.copytree(folder / "first", folder / name)
    return name


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_its_own_recipes_settings_and_says_which_are_new(folder: Path) -> None:
    train(folder, resumed(folder, "same"), steps=4)
    text = train(folder, resumed(folder, "other"), steps=4, lr=1e-3, adam_beta1=0.1)
    assert "settings that were others before: adam_beta1 0.9 -> 0.1, lr 0.01 -> 0.001, steps 2 -> 4" in text
    same, other = rows(folder, "same"), rows(folder, "other")
    assert [row["learning_rate"] for row in other] == [1e-2, 1e-2, 1e-3, 1e-3]
    assert other[2]["loss"] == same[2]["loss"]  # of the checkpoint's weights
    assert other[3]["loss"] != same[3]["loss"]
    slow = train(folder, resumed(folder, "slow"), steps=4, lr=1e-3)
    assert "adam_beta1" not in slow
    assert rows(folder, "slow")[3]["loss"] != other[3]["loss"]  # the betas are the recipe's, too


def test_what_a_resumed_run_can_not_change(folder: Path) -> None:
    output = resumed(folder, "fixed")
    assert "made with distributed_optimizer = True, now False" in train(folder, output, code=2, steps=4, distributed_optimizer=False)
    assert "made with global_batch = 4, now 8" in train(folder, output, code=2, steps=4, global_batch=8)
    make_scored_store(folder / "others", sampler=folder / "student", teacher=folder / "teacher", seed=1)
    assert "made with other rollouts than" in train(folder, output, code=2, steps=4, store="others")
    assert len(rows(folder, output)) == 2


def test_a_store_may_move_and_the_pointer_be_lost(folder: Path) -> None:
    output = resumed(folder, "moved")
    shutil.copytree(folder / "store", folder / "elsewhere")
    (folder / output / "checkpoints" / "latest").unlink()
    assert "going on after step 2" in train(folder, output, steps=3, store="elsewhere")
    text = train(folder, output, steps=2, store="elsewhere")
    assert "that is past the 2 steps asked for: nothing to do" in text
    assert [row["step"] for row in rows(folder, output)] == [1, 2, 3]


def test_a_batch_has_no_rollout_twice(folder: Path) -> None:
    assert "20 rollouts, fewer than global_batch = 21" in train(folder, "large", code=2, global_batch=21)


def test_an_error_that_one_rank_alone_has_is_seen(folder: Path) -> None:
    """The rank that reads the damaged part is not the first."""
    reader = StoreReader(str(folder / "store"), teacher="teacher")
    lengths = np.array([len(reader.rollout(index).tokens) for index in range(len(reader))])

    def second_alone_reads_the_last_part(seed: int) -> bool:
        long, short = sorted(TrainingOrder(lengths, seed, 2).rollouts(0), key=lambda index: -lengths[index])
        return lengths[long] > lengths[short] and reader.part_ids[long] != 2 and reader.part_ids[short] == 2

    seed = next(seed for seed in range(100) if second_alone_reads_the_last_part(seed))
    shutil.copytree(folder / "store", folder / "damaged")
    chunk = next((folder / "damaged/parts/000002/teacher/teacher/logp/c").rglob("0"))
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 0x10
    chunk.write_bytes(content)
    text = train(folder, "alone", code=2, ranks=2, store="damaged", global_batch=2, seed=seed, steps=1)
    assert "megatron-opd: error on rank 1: " in text
    assert "teacher/teacher/logp" in text


def test_the_number_of_ranks_is_above_zero(folder: Path) -> None:
    command = [sys.executable, "-m", "megatron_opd", "train", "tiny", "--nproc"]
    for text in ("-2", "0", "two"):
        run = subprocess.run([*command, text], capture_output=True, text=True)
        assert run.returncode == 2
        assert f"a whole number above 0 is expected, got {text!r}" in run.stderr


HOLD = """
import sys, time, pathlib
from megatron_opd.safety.locks import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another run writes there \\(process {holder.pid} on "):
            Lock(tmp_path, wait_seconds=0.6).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    start = time.monotonic()
    lock = Lock(tmp_path)
    lock.acquire()
    assert time.monotonic() - start < 5
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Lustre mounted without flock, NFS without lockd: none can be mounted on every machine that runs this."""

    def lockf(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=f"{tmp_path}: nothing can be locked there \\(.* at /.*: {os.strerror(number)}\\)"):
        Lock(tmp_path).acquire()


def test_changes_are_named_with_their_section() -> None:
    before, now = {"lr": 1.0, "loss": {"name": "opd", "clip": None}}, {"lr": 1.0, "loss": {"name": "vopd", "clip": None}, "new": 1}
    assert changes(before, now) == ["loss.name opd -> vopd", "new None -> 1"]
    assert changes(now, now) == []
