"""A training in a process that lives on leaves no models behind, and no process groups, whose threads would wake up all the time."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.cli import main


def test_what_a_training_leaves(tmp_path: Path) -> None:
    make_model(tmp_path / "student", "qwen3", seed=5)
    make_model(tmp_path / "teacher", "qwen3", seed=6)
    make_scored_store(tmp_path / "store", sampler=tmp_path / "student", teacher=tmp_path / "teacher")
    threads = [train(tmp_path, f"out-{number}") for number in range(3)]
    assert not [kept for kept in gc.get_objects() if type(kept).__name__ == "DistributedDataParallel"]
    assert threads[2] <= threads[1] <= threads[0]


def train(folder: Path, output: str) -> int:
    """The threads of this process after it."""
    paths = {"run_dir": folder, "train.init": folder / "student", "train.store": folder / "store", "train.output": folder / output}
    steps = ["train.steps=1", "train.global_batch=4", "train.micro_batch_tokens=128"]
    assert main(["train", "tiny", *(f"{name}={str(path)!r}" for name, path in paths.items()), *steps]) == 0
    for _ in range(2):  # what the optimizer held is only then seen as garbage
        gc.collect()
    return len(os.listdir("/proc/self/task"))
