"""How a run ends: killed at any file operation of a save, asked to stop by a file, or because its loss is not a number."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_older
from fork_server import Ending, Job, shared_server
from safetensors.torch import load_file, save_file
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.checkpoints.saved import checkpoint_folder, last_saved, latest_checkpoint, read_state
from megatron_opd.cost.meter import read_stages
from megatron_opd.data.order import TrainingOrder
from megatron_opd.data.store import StoreReader
from megatron_opd.report.write import write_report

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    return folder


def run(folder: Path, output: str, *, kill_at: int | None = None, code: int = 0, **options: Any) -> Ending:
    settings = {"steps": STEPS, "save_every": 1, "keep_last": 1, "global_batch": 4, "micro_batch_tokens": 128, "lr": 1e-2} | options
    paths = {"run_dir": ".", "train.init": "student", "train.store": "store", "train.output": output}
    overrides = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    overrides += [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
    job = Job(["train", "tiny", *overrides], str(folder / f"{output}.log"), below="/checkpoints/", kill_at=kill_at)
    answer = shared_server().run(job)[0]
    assert answer.killed or answer.code == code, (folder / f"{output}.log").read_text()[-3000:]
    return answer


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    path = folder / output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder: Path, output: str) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder, output)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> int:
    """An undisturbed run named `whole`; how many file operations its checkpoints took."""
    return run(folder, "whole").operations


def kill_often(folder: Path, output: str, *, operations: int, kills: int, seed: int) -> None:
    """Kill run after run at a random operation of its first saves, then let one finish."""
    chooser, reached = random.Random(seed), 0
    per_save = operations // STEPS
    assert per_save > 8
    for _ in range(kills):
        run(folder, output, kill_at=chooser.randint(1, 2 * per_save))
        checkpoint = latest_checkpoint(folder / output)  # whole, or this raises
        step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        assert step >= reached, "a checkpoint was lost"
        reached = step
    run(folder, output)
    assert losses(folder, output) == losses(folder, "whole")
    names = sorted(path.name for path in checkpoint_folder(folder / output).iterdir())
    assert names == ["latest", f"step_{STEPS:06d}"], "something was left behind"


def test_killed_saves(folder: Path, whole: int) -> None:
    before = len(read_stages(folder / "stages.jsonl"))
    kill_often(folder, "killed", operations=whole, kills=5, seed=0)
    *killed, last = read_stages(folder / "stages.jsonl")[before:]
    assert killed, "runs that were killed after their first save leave an account"
    assert all(row["unfinished"] and row["tokens"] for row in killed)
    assert "unfinished" not in last


@pytest.mark.slow
def test_many_killed_saves(folder: Path, whole: int) -> None:
    for seed in range(1, 6):
        kill_often(folder, f"killed-{seed}", operations=whole, kills=12, seed=seed)


def test_which_checkpoints_are_kept(folder: Path, whole: int) -> None:
    run(folder, "kept", keep_last=2, keep_every=2, async_save=False)
    kept = sorted(path.name for path in checkpoint_folder(folder / "kept").glob("step_*"))
    assert kept == ["step_000002", "step_000004", "step_000005"]
    assert losses(folder, "kept") == losses(folder, "whole")


def test_the_stop_file(folder: Path) -> None:
    """It stops the run that is under way after a step, or the next one before its first; it is taken away, and the run goes on."""
    stop, log = folder / "asked" / "STOP", folder / "asked.log"
    stop.parent.mkdir()
    stop.touch()
    run(folder, "asked", steps=400, save_every=1000)
    assert "stopped after step 0 as asked; the same command goes on from the start" in log.read_text()
    assert not stop.exists()
    assert rows(folder, "asked") == []

    def ask() -> None:
        while len(rows(folder, "asked")) < 3:
            time.sleep(0.01)
        stop.touch()

    thread = threading.Thread(target=ask)
    thread.start()
    run(folder, "asked", steps=400, save_every=1000)
    thread.join()
    reached = len(rows(folder, "asked"))
    assert 3 <= reached < 400
    assert not stop.exists()
    checkpoint = latest_checkpoint(folder / "asked")
    assert checkpoint is not None
    assert f"stopped after step {reached} as asked; the same command goes on from {checkpoint}" in log.read_text()
    run(folder, "asked", steps=reached + 2, save_every=1000)
    assert f"going on after step {reached}" in log.read_text()
    assert len(rows(folder, "asked")) == reached + 2


def test_a_request_in_the_last_step_stops_no_later_run(folder: Path) -> None:
    stop = folder / "last" / "STOP"

    def ask() -> None:
        while not rows(folder, "last"):
            time.sleep(0.001)
        stop.touch()

    thread = threading.Thread(target=ask)
    thread.start()
    run(folder, "last", steps=1)
    thread.join()
    stop.unlink(missing_ok=True)  # it may have come after the end
    stop.touch()
    run(folder, "last", steps=1)
    assert not stop.exists()
    run(folder, "last", steps=2)
    assert len(rows(folder, "last")) == 2


def test_a_full_disk(folder: Path, whole: int) -> None:
    """The run ends with the reason and its last whole checkpoint; with room made, the same command goes on."""
    disk = folder / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root and mount")
    try:
        run(folder, "small", code=2)
        text = (folder / "small.log").read_text()
        assert "the checkpoint of step" in text
        assert "could not be written: " in text
        assert re.search(r"\(\d\.\d MiB are free there\)", text)
        assert f"{last_saved(disk)}; fix this and run the same command again" in text
        assert "Traceback" not in text
        subprocess.run([*mount[:4], "remount,size=64m", *mount[5:]], check=True)
        run(folder, "small")
        assert losses(folder, "small") == losses(folder, "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


DAMAGES = {
    "changed bytes": (".distcp", lambda path: change_bytes(path), " is damaged: its checksum is not that of what was written"),
    "cut": (".distcp", lambda path: os.truncate(path, 1000), " has 1000 bytes, but "),
    "lost": ("common.pt", lambda path: path.unlink(), " is missing"),
    "lost index": (".metadata", lambda path: path.unlink(), " is missing"),
}


def change_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 0x55 for byte in content[middle : middle + 40])
    path.write_bytes(content)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(folder: Path, whole: int, damage: str, checksums: bool) -> None:
    """It is refused with the file's name, in training and in conversion; without checksums as far as reading it fails."""
    output = folder / f"{damage}-{checksums}".replace(" ", "-")
    shutil.copytree(folder / "whole", output)
    suffix, spoil, said = DAMAGES[damage]
    checkpoint = checkpoint_folder(output) / f"step_{STEPS:06d}"
    files = [path for path in checkpoint.iterdir() if path.name.endswith(suffix)]
    if not files:
        pytest.skip(f"this version of Megatron-Core writes no {suffix}")
    file = max(files, key=lambda path: path.stat().st_size)
    spoil(file)
    if not checksums:
        make_older(checkpoint, checksums=False)
    unseen = damage == "changed bytes" and not checksums
    converted = subprocess.run(
        [sys.executable, "-m", "megatron_opd", "convert", "to-hf", str(checkpoint), str(folder / f"{output.name}-hf")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    needless = not checksums and suffix == "common.pt"  # conversion reads the tensors alone
    assert converted.returncode == (0 if unseen or needless else 2)
    run(folder, output.name, steps=STEPS + 1, code=0 if unseen else 2)
    for text in ((folder / f"{output.name}.log").read_text(), converted.stdout + converted.stderr):
        assert "Traceback" not in text
        if checksums:
            assert f"error: {file}{said}" in text
            assert "use another step folder" in text or f"no checkpoint in {checkpoint.parent} is whole" in text
        else:
            assert f"{checkpoint} has no checksums" in text


def test_a_run_whose_loss_is_not_a_number(folder: Path) -> None:
    """An absurd rate: the steps after the first are skipped and counted, then the run ends with the rollouts of the last."""
    options = {"steps": 30, "lr": 1e25, "clip_grad": 0.0, "max_skipped_steps": 2}
    run(folder, "diverges", code=2, save_every=100, **options)
    found = rows(folder, "diverges")
    first = next(row["step"] for row in found if row["skipped"])
    assert [row["skipped"] for row in found[first - 1 :]] == [True] * 3
    assert found[-1]["loss"] is None or found[-1]["grad_norm"] is None
    text = (folder / "diverges.log").read_text()
    order = TrainingOrder(np.ones(20, np.int64), 0, 4).rollouts(len(found) - 1)
    assert (
        f"after 2 skipped steps in a row; weights are those from before them. Look at the rollouts (global index) {', '.join(map(str, order))};"
        in text
    )
    assert "Traceback" not in text


def test_the_count_of_skipped_steps_survives_a_resume(folder: Path) -> None:
    options = {"steps": 30, "lr": 1e25, "clip_grad": 0.0, "max_skipped_steps": 3, "save_every": 1}
    run(folder, "skips", code=2, **options)
    checkpoint = latest_checkpoint(folder / "skips")
    assert checkpoint is not None
    state = read_state(checkpoint)
    assert (state["skipped"], state["skipped_in_a_row"]) == (3, 3)
    run(folder, "skips", code=2, **options)
    assert [row["skipped"] for row in rows(folder, "skips")[-4:]] == [True] * 4
    assert read_state(checkpoint)["step"] == state["step"]
    costs = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    assert costs[-1]["error"].startswith("UserError: train: loss or gradient of step")


def test_a_run_whose_every_step_is_skipped_has_nothing_to_save(folder: Path) -> None:
    """Weights that are infinite from the start: an optimizer that never made a step has no state for a checkpoint."""
    broken = make_model(folder / "broken", "qwen3", seed=5)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    make_scored_store(folder / "broken-store", sampler=broken, teacher=folder / "teacher")
    run(folder, "nothing", code=2, init=str(broken), store=str(folder / "broken-store"), steps=2, max_skipped_steps=5)
    assert "train: all 2 steps were skipped as their loss or gradient is not finite" in (folder / "nothing.log").read_text()
    assert latest_checkpoint(folder / "nothing") is None


def test_drift_stops_the_run_with_advice(folder: Path, whole: int) -> None:
    """The rollouts of the test's store are random tokens, so that nearly all of them are off from the first step."""
    limits = {"drift.max_off_share": 0.5, "drift.min_effective_share": 0.9, "drift.patience": 2}
    run(folder, "drifts", **limits)
    text = (folder / "drifts.log").read_text()
    assert text.count("the student has left its rollouts: ") == 1
    assert "of the tokens have pi_S / pi_ref beyond 2 (limit 50.0%) and the effective sample share is" in text
    assert f"megatron-opd convert to-hf {folder / 'drifts'} " in text
    assert losses(folder, "drifts") == losses(folder, "whole")
    run(folder, "drifts-and-stops", **limits, **{"drift.stop": True})
    assert "stopped after step 2 by the drift rule; the same command goes on from" in (folder / "drifts-and-stops.log").read_text()
    assert losses(folder, "drifts-and-stops") == losses(folder, "whole")[:2]
    checkpoint = latest_checkpoint(folder / "drifts-and-stops")
    assert checkpoint is not None
    assert read_state(checkpoint)["beyond_drift_limit"] == 2


def test_the_report_of_these_runs(folder: Path) -> None:
    """Two runs side by side; rows of skipped steps have no loss."""
    run(folder, "reported")
    run(folder, "reported-badly", code=2, lr=1e25, clip_grad=0.0, max_skipped_steps=1, steps=30)
    other = folder / "other"
    shutil.copytree(folder / "reported", other / "opd")
    shutil.copy(folder / "stages.jsonl", other)
    page = write_report([str(folder), str(other)], str(folder / "report")).read_text()
    assert "<h2>Training: reported</h2>" in page
    names = ("training-opd", "training-reported", "training-reported-badly", "cost")
    assert all((folder / "report" / f"{name}.{kind}").exists() for name in names for kind in ("png", "svg"))
    text = (folder / "report" / "report.md").read_text()
    rows_of = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|") for line in text.splitlines() if line.startswith("|")}
    cells = [cell.strip() for cell in rows_of["other", "opd"][3:-1]]
    assert cells[0] == f"{STEPS} (0)"
    found = rows(folder, "reported")
    assert cells[1] == f"{found[0]['loss']:.4f} -> {found[-1]['loss']:.4f}"
    assert cells[2] == f"{found[0]['reverse_kl']:.4f} -> {found[-1]['reverse_kl']:.4f}"
    by_position = found[-1]["reverse_kl_by_position"]
    assert len(by_position) == 6, "responses of the store have up to 60 tokens: 1, 2, 4, ... 32"
    assert cells[3] == f"{by_position[0]:.3f}, {by_position[4]:.3f}, -, -"
    assert rows_of[folder.name, "reported-badly"][3].strip().endswith("(2)")
    assert (folder.name, "all") in rows_of
    assert "nan" not in text


def test_position_means_add_up(folder: Path) -> None:
    """One response token in each class's mean: weighted by their numbers they are the mean of all."""
    run(folder, "positions", steps=1)
    row = rows(folder, "positions")[0]
    reader = StoreReader(str(folder / "store"))
    lengths = reader.response_lens[TrainingOrder(reader.lengths, 0, 4).rollouts(0)]
    counts = np.bincount(np.concatenate([np.floor(np.log2(np.arange(length) + 1)).astype(int) for length in lengths]))
    assert row["response_tokens"] == counts.sum() == lengths.sum()
    assert np.dot(row["reverse_kl_by_position"], counts) / counts.sum() == pytest.approx(row["reverse_kl"], rel=1e-6)
