"""A checkpoint with a changed, lost or hostile file is not used; an older whole one is. Weights are read before they are trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_older, sign_again
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.checkpoints import saved
from megatron_opd.checkpoints.checksums import CHECKSUM_FILE, check_files
from megatron_opd.checkpoints.saved import LATEST, find_checkpoint, read_state
from megatron_opd.cli import main
from megatron_opd.convert.pickles import check_common, check_extra_state
from megatron_opd.errors import DamagedCheckpoint
from megatron_opd.hf.lineage import CACHE_FILE

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, a checkpoint of each, in `whole`."""
    folder = tmp_path_factory.mktemp("damaged")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    assert train(folder, "whole") == 0
    return folder


def train(folder: Path, output: str, **settings: Any) -> int:
    settings = {"steps": STEPS, "save_every": 1, "keep_last": STEPS, "global_batch": 4, "micro_batch_tokens": 128} | settings
    paths = {"run_dir": ".", "train.init": "student", "train.store": "store", "train.output": output}
    overrides = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    return main(["train", "tiny", *overrides, *(f"train.{key}={json.dumps(value)}" for key, value in settings.items())])


def copy(folder: Path, output: str) -> tuple[Path, Path]:
    """A copy of the run and its last checkpoint."""
    shutil.copytree(folder / "whole", folder / output)
    return folder / output, folder / output / f"checkpoints/step_{STEPS:06d}"


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_is_noticed(folder: Path) -> None:
    """By what both training and conversion ask before they read anything else."""
    _, checkpoint = copy(folder, "bits")
    chooser = random.Random(0)
    files = files_of(checkpoint)
    assert len(files) > 10
    for path in files:
        for _ in range(12):
            bit = chooser.randrange(8 * path.stat().st_size)
            flip(path, bit)
            with pytest.raises(DamagedCheckpoint):
                check_files(checkpoint)
            flip(path, bit)
    check_files(checkpoint)


@pytest.mark.parametrize("suffix", [".distcp", "hf/tokenizer.json", "opd_state.json", "opd_checksums.json", "opd_lineage.json"])
def test_an_older_whole_checkpoint_is_taken_and_said(folder: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    output, checkpoint = copy(folder, suffix.replace("/", "-").strip("."))
    path = next(path for path in files_of(checkpoint) if str(path).endswith(suffix))
    flip(path, 801)
    older = checkpoint.with_name(f"step_{STEPS - 1:06d}")
    capsys.readouterr()
    assert main(["convert", "to-hf", str(checkpoint), str(output / "hf")]) == 2
    assert f"error: {path}" in capsys.readouterr().err
    assert main(["convert", "to-hf", str(output), str(output / "hf")]) == 0
    printed = capsys.readouterr().out
    assert f"WARNING: {path}" in printed
    assert f"WARNING: the checkpoint that is taken is {older}" in printed
    assert json.loads((output / "hf/opd_converted.json").read_text())["step"] == STEPS - 1
    assert train(folder, output.name) == 0
    printed = capsys.readouterr().out
    assert f"WARNING: {path}" in printed
    assert f"going on after step {STEPS - 1} from {older}" in printed
    assert losses(output) == losses(folder / "whole")
    assert find_checkpoint(output).notes == []
    check_files(checkpoint)


def test_a_run_that_is_short_of_a_step_is_not_converted_for_the_next_stage(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, checkpoint = copy(folder, "short")
    words = ["convert", "trained", "tiny", f"run_dir={str(output)!r}", f"train.output={str(output)!r}", f"train.steps={STEPS}"]
    words += [f"train.store={str(folder / 'store')!r}"]
    flip(next(checkpoint.glob("*.distcp")), 8000)
    monkeypatch.setattr(saved, "_SMALL", 20_000)  # tensors of a real model are larger than what is read when one looks for a checkpoint
    assert main(words) == 2
    assert (
        ".distcp is damaged: its checksum is not that of what was written; make it again ('megatron-opd train')" in capsys.readouterr().err
    )
    (checkpoint / "opd_state.json").unlink()
    assert main(words) == 2
    assert f"{STEPS - 1} of {STEPS} steps; {checkpoint / 'opd_state.json'} is missing" in capsys.readouterr().err


def test_nothing_whole_is_an_error_that_names_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = copy(folder, "nothing")
    for checkpoint in output.glob("checkpoints/step_*"):
        (checkpoint / "common.pt").unlink()
    assert train(folder, "nothing") == 2
    error = capsys.readouterr().err
    assert error.count("common.pt is missing") == STEPS
    assert "is whole: copy one back, or begin again in another folder" in error


@pytest.mark.parametrize("name", ["../../other", "/etc", "step_000003\0", "..", ".step_000003", "a/b"])
def test_latest_leads_nowhere_else(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "pointed"
    shutil.rmtree(output, ignore_errors=True)
    copy(folder, "pointed")
    (output / "checkpoints" / LATEST).write_text(name)
    for command in (lambda: train(folder, "pointed"), lambda: main(["convert", "to-hf", str(output), str(output / "hf")])):
        assert command() == 2
        assert f"{output / 'checkpoints/latest'} holds " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "step_000009", "step_0\udcff", "step_000002"])
def test_latest_is_lost_or_behind(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    output, checkpoint = copy(folder, f"lost-{len(name)}-{name[-1:]!a}")
    (output / "checkpoints" / LATEST).write_bytes(name.encode(errors="surrogateescape"))
    step = 2 if name == "step_000002" else STEPS
    assert train(folder, output.name, steps=STEPS + 1) == 0
    printed = capsys.readouterr().out
    assert f"going on after step {step} from {checkpoint.with_name(f'step_{step:06d}')}" in printed
    assert ("WARNING: " in printed) == bool(name)


def test_older_versions_checkpoints_are_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checksums, said in ((True, "has no checksums of its side files"), (False, "has no checksums (")):
        output, checkpoint = copy(folder, f"old-{checksums}")
        make_older(checkpoint, checksums=checksums)
        assert read_state(checkpoint)["step"] == STEPS
        assert main(["convert", "to-hf", str(output), str(output / "hf")]) == 0
        assert f"{checkpoint} {said}" in capsys.readouterr().out
        assert train(folder, output.name, steps=STEPS + 1) == 0
        assert f"{checkpoint} {said}" in capsys.readouterr().out


class Command:
    """A pickle that runs a command."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def in_metadata(checkpoint: Path, command: Command) -> None:
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = command
    path.write_bytes(pickle.dumps(metadata))


def instead_of_metadata(checkpoint: Path, command: Command) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(command))


def in_common(checkpoint: Path, command: Command) -> None:
    content = torch.load(checkpoint / "common.pt")
    torch.save(content | {"more": command}, checkpoint / "common.pt")


def in_an_object(checkpoint: Path, command: Command, content: Callable[[Command], Any] = lambda command: command) -> None:
    """Put in the place of an extra state, whose entry in the index leads to a file of its own."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    buffer = io.BytesIO()
    torch.save([content(command)], buffer)
    (checkpoint / "__9_9.distcp").write_bytes(buffer.getvalue())
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "__9_9.distcp", 0, len(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_an_extra_state(checkpoint: Path, command: Command) -> None:
    """Transformer Engine unpickles the bytes of such a tensor."""
    in_an_object(checkpoint, command, lambda command: torch.frombuffer(bytearray(pickle.dumps(command)), dtype=torch.uint8))


def behind_the_folder(checkpoint: Path, command: Command) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../{checkpoint.name}/{place.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


HOSTILE = {
    in_metadata: (".metadata can't be read: it asks for posix.system", True),
    instead_of_metadata: (".metadata can't be read: it asks for posix.system", True),
    in_common: ("common.pt can't be read: it asks for posix.system", False),
    in_an_object: (" in __9_9.distcp can't be read: it asks for posix.system", False),
    in_an_extra_state: ("_extra_state can't be read: it asks for posix.system", False),
    behind_the_folder: (".metadata can't be read: it names the file '../step_000003/__0_", True),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_checkpoint_runs_nothing(folder: Path, attack: Callable[[Path, Command], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever made it has made its checksums, too. What conversion does not read it does not refuse."""
    output, checkpoint = copy(folder, attack.__name__)
    for older in checkpoint.parent.glob("step_*"):
        if older != checkpoint:
            shutil.rmtree(older)
    proof = folder / f"{attack.__name__}.proof"
    attack(checkpoint, Command(proof))
    sign_again(checkpoint)
    said, by_conversion = HOSTILE[attack]
    capsys.readouterr()
    assert train(folder, output.name, steps=STEPS + 1) == 2
    assert said in capsys.readouterr().err
    assert main(["convert", "to-hf", str(checkpoint), str(output / "hf")]) == (2 if by_conversion else 0)
    assert (said in capsys.readouterr().err) == by_conversion
    assert not proof.exists()


def test_classes_of_optimizers_are_read(folder: Path) -> None:
    """An offloading optimizer has its inner ones' classes among its settings, which Megatron-Core keeps with them."""
    _, checkpoint = copy(folder, "offloaded")
    groups = [{"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": torch.optim.Adam, "lr": 1e-3}]
    torch.save(torch.load(checkpoint / "common.pt") | {"optimizer": {"param_groups": groups}}, checkpoint / "common.pt")
    check_common(checkpoint)


@pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
def test_an_older_version_s_checkpoint_that_is_cut_is_damaged(folder: Path, name: str) -> None:
    """It has no checksums, so that it is found when the file is read."""
    _, checkpoint = copy(folder, f"cut-{name}")
    (checkpoint / CHECKSUM_FILE).unlink()
    os.truncate(checkpoint / name, 9)
    with pytest.raises(DamagedCheckpoint, match=name):
        check_common(checkpoint)


def test_a_damaged_checkpoint_is_none_of_the_last_ones(folder: Path) -> None:
    """Step 3 is damaged and passed over by step 4: of two that are kept, step 2 is the other."""
    output, checkpoint = copy(folder, "kept")
    flip(checkpoint / "common.pt", 801)
    assert train(folder, output.name, steps=STEPS + 1, save_every=STEPS + 1, keep_last=2) == 0
    assert sorted(path.name for path in checkpoint.parent.glob("step_*")) == [f"step_{step:06d}" for step in (STEPS - 1, STEPS + 1)]


def test_what_transformer_engine_keeps_of_fp8_is_read() -> None:
    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"num_gemms": 1, "sizes": (1, 2)}}
    check_extra_state("layer._extra_state", torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8))
    check_extra_state("layer._extra_state", torch.empty(0, dtype=torch.uint8))
    check_extra_state("layer._extra_state", None)


def test_weights_that_changed_behind_their_times_are_not_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a damaged disk changes them: sizes and times as they were. The cached hash goes by these."""
    model = folder / "student"
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    times = weights.stat()
    assert (model / CACHE_FILE).exists()
    flip(weights, 8 * (len(before) - 10))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    cache = json.loads((model / CACHE_FILE).read_text())
    cache["files"][0][3] = weights.stat().st_ctime_ns  # which only the kernel sets
    (model / CACHE_FILE).write_text(json.dumps(cache))
    try:
        assert train(folder, "untrue") == 2
        assert "and the files' sizes and times are as then" in capsys.readouterr().err
    finally:
        weights.write_bytes(before)
