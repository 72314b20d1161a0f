"""What is published is whole; nothing else is left of it."""

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_opd.errors import UserError
from megatron_opd.safety import durable
from megatron_opd.safety.durable import make_folder, publish_folder, write_file, write_json


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": "é"})
    assert path.read_text("utf-8") == '{\n  "a": "\\u00e9"\n}\n'
    assert write_file(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def refuse(number):
    def call(*arguments):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("file_system", ["links", "no links", "neither links nor free renames"])
def test_of_many_writers_one_makes_the_file(tmp_path, monkeypatch, file_system):
    """The last is what a real exFAT through FUSE says."""
    if file_system != "links":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    if file_system.startswith("neither"):
        monkeypatch.setattr(durable, "_rename_to_free", refuse(errno.EINVAL))
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: write_file(path, str(number), exclusive=True), range(40)))
    assert sum(made) == 1
    assert path.read_text("utf-8") == str(made.index(True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_claim_that_a_killed_process_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(durable, "_rename_to_free", refuse(errno.EINVAL))
    monkeypatch.setattr(durable, "_CLAIM_SECONDS", 0.1)
    path, claim = tmp_path / "file", tmp_path / ".file.claim"
    claim.mkdir()
    with pytest.raises(
        UserError, match=re.escape(f"{path}: {claim} is in the way; ") + ".* at /.*; if none is at work, remove that folder"
    ):
        write_file(path, "mine", exclusive=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [claim.name]
    claim.rmdir()
    assert write_file(path, "mine", exclusive=True)
    claim.mkdir()
    assert not write_file(path, "other", exclusive=True)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, "old")

    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_file(path, "new")
    assert path.read_text("utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_files_and_directories_are_synced_before_a_folder_is_published(tmp_path, monkeypatch):
    staging, target, done = tmp_path / ".staging", tmp_path / "target", []
    (staging / "inner").mkdir(parents=True)
    (staging / "inner" / "file").write_text("x", "utf-8")
    monkeypatch.setattr(durable, "sync", lambda path: done.append((str(path), target.exists())))
    publish_folder(staging, target)
    names = [str(staging / "inner" / "file"), str(staging / "inner"), str(staging)]
    assert done == [*((name, False) for name in names), (str(tmp_path), True)]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        durable.open_new(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_new_folders_are_synced_into_those_that_were_there(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(durable, "sync", lambda path: done.append(str(path)))
    make_folder(tmp_path / "a" / "b" / "c")
    assert sorted(done) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(done) == 3
