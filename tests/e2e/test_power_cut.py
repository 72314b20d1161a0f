"""What was announced is whole after a power cut: on an ext4 file system that is cut off from its disk, and whose journal is replayed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.power_cut_worker import IS_CUT, cut_power
from stores import create_store, make_scored_store, random_rollout, write_part
from tiny_models import make_model, write_prompts

from megatron_opd.checkpoints.checksums import check_files
from megatron_opd.checkpoints.saved import latest_checkpoint, read_state
from megatron_opd.cli import main
from megatron_opd.convert.written import same_content
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import hash_tensors
from megatron_opd.recipe.files import load_recipe
from megatron_opd.safety.durable import make_folder, publish_folder, write_file

WORKER = Path(__file__).with_name("power_cut_worker.py")
STEPS = 3


class Disk:
    """An ext4 image, mounted; every case works in a folder of its own."""

    def __init__(self, folder: Path):
        self.image, self.path = folder / "image", folder / "disk"
        self.path.mkdir()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.path)], check=True, capture_output=True)

    def unmount(self) -> None:
        """Processes that have just been killed may hold it for a moment."""
        end = time.monotonic() + 20
        while subprocess.run(["umount", str(self.path)], capture_output=True).returncode:
            assert time.monotonic() < end, "the disk is still in use"
            time.sleep(0.05)

    def restart(self) -> None:
        self.unmount()
        self.mount()

    def cut(self) -> None:
        cut_power(str(self.path))
        self.restart()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    lacking = [name for name in ("mkfs.ext4", "mount", "losetup") if shutil.which(name) is None]
    if os.geteuid() or lacking:
        pytest.skip(f"to mount a disk takes root, mkfs.ext4 and mount; here {', '.join(lacking) or 'the user is not root'}")
    disk = Disk(tmp_path_factory.mktemp("power"))
    with disk.image.open("wb") as image:
        image.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk.image)], check=True)
    try:
        disk.mount()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no ext4 image can be mounted here: {error.stderr.decode().strip()}")
    try:
        yield disk
    finally:  # the loop device goes with its mount
        if subprocess.run(["umount", str(disk.path)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(disk.path)], check=False)


class Worker:
    def __init__(self, disk: Disk):
        self.disk, self.log = disk, disk.image.with_name("log")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = False

    def cut_at(self, announcement: str, *command: str) -> None:
        """Run a subcommand and cut the power the moment it prints this; then the disk is mounted again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not self.ready:
            assert self.process.stdout.readline() == "ready\n"
            self.ready = True
        order = {"command": command, "announcement": announcement, "disk": str(self.disk.path), "log": str(self.log)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(answer["group"], signal.SIGKILL)
        self.disk.restart()
        assert answer["code"] == IS_CUT, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def worker(disk: Disk) -> Iterator[Worker]:
    worker = Worker(disk)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies on another disk: models, a store, prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model(folder / "student", seed=5)
    make_model(folder / "teacher", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    write_prompts(folder / "prompts.jsonl", 4)
    return folder


def test_a_file_and_a_folder(worker: Worker, disk: Disk) -> None:
    """The worker imports meanwhile."""
    content = os.urandom(300_000)
    for number in range(5):
        folder = disk.path / f"durable{number}"
        make_folder(folder / "deep" / "er")
        assert write_file(folder / "deep" / "er" / "new", content, exclusive=True)
        disk.cut()
        assert (folder / "deep" / "er" / "new").read_bytes() == content
        write_file(folder / "replaced", b"old")
        write_file(folder / "replaced", content)
        disk.cut()
        assert (folder / "replaced").read_bytes() == content
        (folder / "staging" / "in" / "ner").mkdir(parents=True)
        for name in ("a", "in/b", "in/ner/c"):
            (folder / "staging" / name).write_bytes(content)
        publish_folder(folder / "staging", folder / "published")
        disk.cut()
        assert all((folder / "published" / name).read_bytes() == content for name in ("a", "in/b", "in/ner/c"))


def test_a_sealed_part(disk: Disk, inputs: Path) -> None:
    import numpy as np

    manifest = StoreReader(str(inputs / "store")).manifest
    location, rng = create_store(str(disk.path / "store"), manifest), np.random.default_rng(0)
    for part in range(manifest.num_parts):
        samples = range(manifest.sampling.samples_per_prompt)
        rollouts = [random_rollout(rng, p, s, vocab=manifest.vocab_size) for p in manifest.prompt_range(part) for s in samples]
        write_part(location, part, rollouts, [], {})
        disk.cut()
        reader = StoreReader(str(disk.path / "store"))
        assert sorted(reader.parts) == list(range(part + 1))
        assert reader.verify() == []


def test_a_conversion(worker: Worker, disk: Disk, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, mcore, back = inputs / "student", disk.path / "mcore", disk.path / "back"
    assert main(["convert", "to-mcore", str(model), str(inputs / "mcore")]) == 0
    assert main(["convert", "to-hf", str(inputs / "mcore"), str(inputs / "back")]) == 0
    worker.cut_at("^wrote", "convert", "to-mcore", str(model), str(mcore))
    assert same_content(inputs / "mcore", mcore)
    assert check_files(mcore)
    worker.cut_at("^wrote", "convert", "to-hf", str(mcore), str(back))
    assert same_content(inputs / "back", back)
    assert hash_tensors(back) == hash_tensors(model)
    assert all(path.stat().st_size for path in [*mcore.rglob("*"), *back.rglob("*")])


def test_an_evaluation(worker: Worker, disk: Disk, inputs: Path) -> None:
    run = disk.path / "evaluated"
    worker.cut_at(
        "^eval: ",
        "eval",
        "tiny",
        f"run_dir={run}",
        "eval.held_out.teacher=none",
        f"models.student={inputs / 'student'}",
        f"eval.held_out.prompts={inputs / 'prompts.jsonl'}",
        "--of",
        "base",
    )
    assert json.loads((run / "eval" / "held_out" / "base.json").read_text())["num_prompts"] == 4
    assert StoreReader(str(run / "eval" / "held_out" / "base.opd.zarr")).verify() == []


@pytest.mark.parametrize(("announcement", "asynchronous"), [(rf"^step +{STEPS}/", False), (rf"step_{STEPS:06d}", True)])
def test_a_checkpoint(worker: Worker, disk: Disk, inputs: Path, announcement: str, asynchronous: bool) -> None:
    """Of a training that keeps one alone: cut at the announcement of the step after it, and of the last one itself."""
    output = disk.path / f"trained-{asynchronous}"
    settings: dict[str, Any] = {"steps": STEPS, "save_every": 1, "keep_last": 1, "global_batch": 4, "micro_batch_tokens": 128, "lr": 1e-2}
    fields = [f"train.{key}={json.dumps(value)}" for key, value in (settings | {"async_save": asynchronous}).items()]
    paths = {
        "run_dir": output,
        "models.teacher": inputs / "teacher",
        "train.init": inputs / "student",
        "train.store": inputs / "store",
        "train.output": output,
    }
    command = ["train", "tiny", *fields, *(f"{key}={path}" for key, path in paths.items())]
    worker.cut_at(announcement, *command)
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    step = read_state(checkpoint)["step"]
    assert step >= (STEPS if asynchronous else STEPS - 1)
    assert check_files(checkpoint)
    assert all(path.stat().st_size for path in checkpoint.rglob("*"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:step]] == list(range(1, step + 1))
    assert load_recipe(str(output / "recipe.toml"), []).train.steps == STEPS
    assert main(["convert", "to-hf", str(output), str(inputs / output.name)]) == 0
