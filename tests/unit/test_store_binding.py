"""A part belongs to its store, and its rollouts to it: what was copied in from elsewhere, renamed, doubled or left out is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.store_parts import fill, make_manifest, make_rollouts, score

from megatron_opd.data import location as location_module
from megatron_opd.data.location import Location, checksum
from megatron_opd.data.manifests import part_group, read_manifest, score_group
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.errors import StoreError
from megatron_opd.records import PromptFile, SamplingParams
from megatron_opd.safety.redact import public_address
from megatron_opd.show.inspect import inspect_store
from megatron_opd.store_records import Excluded


def small(**changes: Any) -> Any:
    return make_manifest(num_prompts=6, samples=2, per_part=2, **changes)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "pristine"
    fill(str(path), small(), longest=20)
    score(str(path))
    return path


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of the same prompts at another temperature."""
    path = tmp_path_factory.mktemp("stores") / "other"
    fill(str(path), small(sampling=SamplingParams(samples_per_prompt=2, max_new_tokens=60, temperature=0.5)), longest=20)
    score(str(path))
    return path


def unbind(store: Path) -> None:
    """As an older version wrote it: no manifest has a checksum of itself, or says which store it is of."""
    for path in store.rglob("zarr.json"):
        content = json.loads(path.read_text())
        if content["attributes"].pop("opd_crc32c", None) is not None:
            content["attributes"]["opd"].pop("store_id", None)
            path.write_text(json.dumps(content))


def rewrite(store: Path, part: int, change: Callable[[dict[str, np.ndarray], dict[str, Any]], object]) -> None:
    """Write a part again with other small arrays or another manifest, every checksum right."""
    location, group = Location(str(store)), part_group(part)
    names = ("tokens", "offsets", "prompt_len", "prompt_index", "sample_index", "finish", "student_logp")
    arrays, record = {name: location.read_array(group, name) for name in names}, location.read_attributes(group)
    assert record is not None
    change(arrays, record)
    record["crc32c"] = {name: checksum(array) for name, array in arrays.items()}
    shutil.rmtree(store / group)
    location.write_sealed_group(group, arrays, record)


def test_identity_is_what_decides_the_content(tmp_path: Path) -> None:
    def identity(name: str, **changes: Any) -> str:
        return read_manifest(create_store(str(tmp_path / name), small(**changes)))[1]

    same = identity("first")
    assert identity("first") == same
    assert identity("again", engine={"kind": "sglang"}, provenance={"git_commit": "abc"}) == same
    assert identity("moved", prompts=PromptFile(name="elsewhere.jsonl", sha256="0" * 64, num_prompts=6)) == same
    for number, changes in enumerate(
        (
            {"prompts": PromptFile(name="prompts.jsonl", sha256="1" * 64, num_prompts=6)},
            {"stop_ids": [3]},
            {"encoding": {"system": "Be brief."}},
        )
    ):
        assert identity(f"other{number}", **changes) != same


def test_parts_of_another_store_are_refused(store: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(store / part_group(1))
    shutil.copytree(other / part_group(1), store / part_group(1))
    for look in (lambda: StoreReader(str(store)), lambda: inspect_store(str(store), verify=True)):
        with pytest.raises(StoreError, match=r"parts/000001 is of another store.*delete this part, and run the stage again"):
            look()
    shutil.rmtree(store / "parts")
    shutil.copytree(other / "parts", store / "parts")
    with pytest.raises(StoreError, match="parts/000000 is of another store"):
        StoreReader(str(store))
    shutil.copy(other / "zarr.json", store / "zarr.json")  # now it is the other store
    assert StoreReader(str(store)).verify() == []
    capsys.readouterr()


def test_scores_say_which_store_they_are_of(store: Path) -> None:
    path = store / score_group(1, "teacher") / "zarr.json"
    record = json.loads(path.read_text())["attributes"]["opd"]
    assert record["store_id"] == StoreReader(str(store)).store_id
    Location(str(store)).write_attributes(score_group(1, "teacher"), record | {"store_id": "0" * 16})
    with pytest.raises(StoreError, match="000001/teacher/teacher is of another store"):
        StoreReader(str(store)).check_scored("teacher")


def test_an_older_store_is_read_and_that_is_said(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unbind(store)
    reader = StoreReader(str(store), teacher="teacher")
    reader.check_complete("teacher")
    assert reader.verify() == []
    assert reader.notes == ["3 parts don't say which store they are of: an older version wrote them"]
    shutil.rmtree(store / part_group(2))
    fill(str(store), small(), parts=[2], longest=20)  # a newer version goes on
    assert inspect_store(str(store), verify=True) == 0
    assert "2 parts don't say which store" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["7", "²", "+1", "0000001", "٠٠٠٠٠١", "000001 (copy)", "lost+found"])
def test_a_folder_that_is_no_part_is_left_out_with_a_word(store: Path, name: str) -> None:
    shutil.copytree(store / part_group(1), store / "parts" / name)
    reader = StoreReader(str(store))
    reader.check_complete("teacher")
    assert reader.notes == [f"{store}/parts/{name} is not the name of a part (six digits) and left out"]


def test_a_part_beyond_the_last_is_refused(store: Path) -> None:
    shutil.copytree(store / part_group(1), store / part_group(3))
    with pytest.raises(StoreError, match=r"parts/000003: the store has 3 parts, from 000000 on; delete it, or move it away"):
        StoreReader(str(store))


def set_item(name: str, row: int, value: int) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        arrays[name][row] = value

    return change


def exclude(prompt: int, sample: int) -> Callable[[dict[str, np.ndarray], dict[str, Any]], object]:
    return lambda arrays, record: record["excluded"].append(
        {"prompt_index": prompt, "sample_index": sample, "reason": "x", "quarantined": False}
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_item("sample_index", 1, 0), "prompt 2, sample 0 is there twice"),
        (set_item("prompt_index", 0, 1), "prompt 1, sample 0 belongs to another part"),
        (set_item("prompt_index", 3, 4), "prompt 4, sample 1 belongs to another part"),
        (set_item("prompt_index", 3, -1), "prompt -1, sample 1 belongs to another part"),
        (set_item("sample_index", 1, 2), "prompt 2, sample 2 is none of the 2 samples"),
        (set_item("sample_index", 1, -1), "prompt 2, sample -1 is none of the 2 samples"),
        (set_item("prompt_len", 2, 0), "prompt 3, sample 0 has a prompt that is not a part of its tokens"),
        (set_item("prompt_len", 2, 1000), "prompt 3, sample 0 has a prompt that is not a part of its tokens"),
        (set_item("offsets", 1, 0), "prompt 2, sample 0 has a prompt that is not a part of its tokens"),
        (set_item("offsets", 0, 1), "its rollouts don't cover its tokens"),
        (set_item("offsets", 4, 5), "its rollouts don't cover its tokens"),
        (set_item("finish", 3, 3), "prompt 3, sample 1 ends for a reason that is none"),
        (exclude(2, 0), "prompt 2, sample 0 is there twice"),
        (exclude(0, 0), "prompt 0, sample 0 belongs to another part"),
    ],
)  # fmt: skip
def test_rollouts_that_are_not_the_parts_are_refused(store: Path, change: Any, named: str) -> None:
    rewrite(store, 1, change)
    with pytest.raises(StoreError, match=f"parts/000001: {named}.*delete this group and make it again"):
        StoreReader(str(store))


def test_rollouts_that_are_not_there_are_missed(tmp_path: Path) -> None:
    manifest, url = small(), str(tmp_path / "s")
    rollouts = make_rollouts(manifest, 0, longest=20)
    left_out = Excluded(prompt_index=1, sample_index=1, reason="x")
    write_part(create_store(url, manifest), 0, rollouts[:3], [left_out], {})
    assert len(StoreReader(url)) == 3
    rewrite(tmp_path / "s", 0, lambda arrays, record: record.update(excluded=[]))
    with pytest.raises(StoreError, match="parts/000000: 3 rollouts and exclusions, 4 belong to it"):
        StoreReader(url)


@pytest.mark.parametrize("change", [{"max_tokens": 1}, {"excluded": [{"prompt_index": 5, "sample_index": 0, "reason": "x"}]}])
def test_scores_that_exclude_what_is_not_there_are_refused(store: Path, change: dict[str, Any]) -> None:
    location, group = Location(str(store)), score_group(1, "teacher")
    record = location.read_attributes(group)
    assert record is not None
    location.write_attributes(group, record | change)
    with pytest.raises(StoreError, match="000001/teacher/teacher: what it excludes or cuts"):
        StoreReader(str(store), teacher="teacher")


@pytest.mark.parametrize("victim", ["tokens", "tokens/c/0", "offsets/zarr.json", "zarr.json", ""])
def test_what_vanished_while_it_was_written_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    real = location_module.durable.sync_tree

    def lose(folder: str) -> None:
        real(folder)
        path = Path(folder) / victim
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    manifest, url = small(), str(tmp_path / "s")
    location = create_store(url, manifest)
    monkeypatch.setattr(location_module.durable, "sync_tree", lose)
    with pytest.raises((StoreError, OSError), match=r"000000"):
        write_part(location, 0, make_rollouts(manifest, 0), [], {})
    monkeypatch.undo()
    assert StoreReader(url).parts == {}
    assert [path.name for path in (tmp_path / "s" / "parts").iterdir()] == ["zarr.json"]
    write_part(location, 0, make_rollouts(manifest, 0), [], {})
    assert StoreReader(url).verify() == []


def test_an_object_that_vanished_is_not_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = location_module._write_array

    def lose(store: Any, name: str, array: np.ndarray) -> None:
        real(store, name, array)
        if name == "finish":
            location.fs.rm(location.path(f"{part_group(0)}/tokens/c/0"))

    manifest = small()
    location = create_store("memory://vanishing/s", manifest)
    monkeypatch.setattr(location_module, "_write_array", lose)
    with pytest.raises(StoreError, match=r"parts/000000/tokens is not there as it was written .*Nothing was sealed"):
        write_part(location, 0, make_rollouts(manifest, 0), [], {})
    assert StoreReader("memory://vanishing/s").parts == {}


def test_a_sealed_folder_is_never_emptied(store: Path) -> None:
    folder = store / part_group(1)
    location_module._empty_unsealed(str(folder))
    assert StoreReader(str(store)).verify() == []
    (folder / "zarr.json").unlink()
    location_module._empty_unsealed(str(folder))
    assert list(folder.iterdir()) == []
    location_module._empty_unsealed(str(store / part_group(9)))


def test_a_complete_store_is_joined_without_writing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("write_file", "open_new", "publish_folder"):
        monkeypatch.setattr(location_module.durable, name, refuse)
    monkeypatch.setattr(location_module.os, "mkdir", refuse)
    create_store(str(store), small())


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/data/a@b:c?d", "/data/a@b:c?d"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://key:secret@bucket/run", "s3://bucket/run"),
        ("s3://key:se/cr@et@bucket/run", "s3://bucket/run"),
        ("https://user@host/x?token=abc#d", "https://host/x"),
        ("simplecache::s3://key:secret@bucket/run", "simplecache::s3://bucket/run"),
        ("memory://a/b@2", "memory://a/b@2"),
        ("/data/\x1b[31mred", "/data/\\x1b[31mred"),
    ],
)
def test_addresses_are_shown_without_credentials(address: str, shown: str) -> None:
    assert public_address(address) == shown


def test_names_with_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, url, evil = small(), str(tmp_path / "s"), "\x1b[2J\n\x07"
    sampler = manifest.sampler.model_copy(update={"name": evil})
    manifest = small(sampler=sampler)
    excluded = [Excluded(prompt_index=0, sample_index=0, reason=evil)]
    write_part(create_store(url, manifest), 0, make_rollouts(manifest, 0)[1:], excluded, {})
    score(url, teacher=evil)
    inspect_store(url)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed + sampler.short()
    assert printed.count("\\x1b[2J") == 7


def test_looking_into_a_store_takes_a_listing_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cost grows with the parts, not with their square."""
    calls: list[str] = []
    for name in ("children", "read_attributes"):
        real = getattr(Location, name)
        monkeypatch.setattr(Location, name, lambda self, group, real=real: (calls.append(group), real(self, group))[1])
    counts = []
    for parts in (2, 4, 6):
        url = str(tmp_path / str(parts))
        fill(url, make_manifest(num_prompts=parts, per_part=1))
        score(url)
        calls.clear()
        inspect_store(url, verify=True)
        counts.append(len(calls))
    assert counts[2] - counts[1] == counts[1] - counts[0] <= 2 * 5
