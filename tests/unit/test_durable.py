"""What is published is whole; nothing else is left of it."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_opd import durable
from megatron_opd.durable import publish_folder, write_file, write_json


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": "é"})
    assert path.read_text("utf-8") == '{\n  "a": "\\u00e9"\n}\n'
    assert write_file(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_one_makes_the_file(tmp_path, monkeypatch, links):
    if not links:

        def link(source, target):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: write_file(path, str(number), exclusive=True), range(40)))
    assert sum(made) == 1
    assert path.read_text("utf-8") == str(made.index(True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, "old")

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
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
