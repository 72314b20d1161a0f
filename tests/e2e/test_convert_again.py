"""A directory that a conversion wrote is known again: whole, it stays; damaged, it is named; made twice at once, one is kept."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.cli import main
from megatron_opd.convert import staging
from megatron_opd.convert.staging import whole_directory
from megatron_opd.hf.lineage import CACHE_FILE, ORIGIN_FILE
from megatron_opd.safety.durable import publish_folder


class Finished:
    """A recipe whose `train` is finished; `convert trained` makes opd-hf of its checkpoint."""

    def __init__(self, folder: Path):
        student, teacher = make_model(folder / "student"), make_model(folder / "teacher", seed=1)
        make_scored_store(folder / "store", sampler=student, teacher=teacher)
        paths = {
            "run_dir": folder,
            "models.teacher": teacher,
            "train.init": student,
            "train.store": folder / "store",
            "eval.held_out.prompts": "p",
        }
        fields = ["tiny", *(f"{key}={path}" for key, path in paths.items()), "train.steps=1", "train.global_batch=4"]
        assert main(["train", *fields]) == 0
        (self.checkpoint,) = (folder / "opd/checkpoints").glob("step_*")
        self.target, self.command = folder / "opd-hf", ["convert", "trained", *fields]
        assert main(self.command) == 0

    def copy(self, place: Path) -> None:
        shutil.rmtree(self.target)
        shutil.copytree(place, self.target)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"))


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "cut": lambda content: content[:-7],
    "a bit": flip,
    "gone": lambda content: None,
}


def test_a_damaged_directory_is_named(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a power cut, say; the cached fingerprint goes by sizes and times, which may be right all the same."""
    whole = Path(shutil.copytree(finished.target, tmp_path / "whole"))
    names = sorted(path.name for path in whole.iterdir() if path.name != CACHE_FILE)
    assert {"config.json", "model.safetensors", "opd_lineage.json", "tokenizer.json", ORIGIN_FILE} <= set(names)
    for name in names:
        for damage, change in DAMAGES.items():
            content = change((whole / name).read_bytes())
            if (name, damage) == (ORIGIN_FILE, "gone") or (name, damage) == ("config.json", "gone"):
                continue  # the next test's; refused, as any directory that holds something and is no model
            if content is None:
                (finished.target / name).unlink()
            else:
                (finished.target / name).write_bytes(content)
            capsys.readouterr()
            code, error = main(finished.command), capsys.readouterr().err
            # A bit of the record itself may be one of its time or its names for people.
            if (name, damage) != (ORIGIN_FILE, "a bit"):
                assert (code, f"{finished.target / name} " in error, error.count("\n")) == (2, True, 1), (name, damage, error)
            finished.copy(whole)
    assert main(finished.command) == 0
    assert f"{finished.target} is there already, of step 1" in capsys.readouterr().out


def test_of_an_older_version_s_directory_the_weights_are_compared(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It records no sums; then it does."""
    whole = Path(shutil.copytree(finished.target, tmp_path / "whole"))
    origin = json.loads((whole / ORIGIN_FILE).read_text())
    files = origin.pop("files")
    (whole / ORIGIN_FILE).write_text(json.dumps(origin))
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        for damage in ("zeros", "empty", "cut"):
            finished.copy(whole)
            (finished.target / name).write_bytes(DAMAGES[damage]((whole / name).read_bytes()) or b"")
            assert main(finished.command) == 2
            assert str(finished.target) in capsys.readouterr().err
    finished.copy(whole)
    assert main(finished.command) == 0
    assert "does not record what was written" in capsys.readouterr().out
    assert json.loads((finished.target / ORIGIN_FILE).read_text())["files"] == files
    assert main(finished.command) == 0
    assert "does not record" not in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["to-hf", "to-mcore"])
def test_of_two_conversions_at_once_one_is_kept(
    direction: str, tmp_path: Path, finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is done while the first is about to publish: that ends well if it made the same, and with an error that says so if not."""
    other = make_model(tmp_path / "other", seed=3)
    assert main(["convert", "to-mcore", str(other), str(tmp_path / "other-mcore")]) == 0
    mine, others = (finished.target, other) if direction == "to-mcore" else (finished.checkpoint, tmp_path / "other-mcore")
    for source, code, said in (
        (mine, 0, " is there already: another process made it meanwhile, with the same content"),
        (others, 2, ": another process made it meanwhile, with other content, which is kept"),
    ):
        target = tmp_path / f"target-{code}"

        def publish(made: Path, place: Path, source: Path = source, target: Path = target) -> None:
            monkeypatch.undo()
            assert main(["convert", direction, str(source), str(target)]) == 0
            publish_folder(made, place)

        monkeypatch.setattr(staging, "publish_folder", publish)
        capsys.readouterr()
        assert main(["convert", direction, str(mine), str(target)]) == code
        printed = capsys.readouterr()
        assert f"{target}{said}" in (printed.err if code else printed.out)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_being_filled_is_not_a_leftover(tmp_path: Path) -> None:
    """Also where process ids say nothing: containers of one host, threads of one process."""
    target, go_on = tmp_path / "target", threading.Event()

    def fill() -> None:
        with whole_directory(target) as folder:
            (folder / "file").write_text("first")
            go_on.wait(30)

    thread = threading.Thread(target=fill)
    thread.start()
    end = time.monotonic() + 30
    while not list(tmp_path.glob(".target.*/file")):
        assert time.monotonic() < end
    with contextlib.suppress(RuntimeError), whole_directory(target) as folder:
        (folder / "file").write_text("second")
        raise RuntimeError
    go_on.set()
    thread.join()
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_empty_folder_behind_a_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with whole_directory(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "x"
