"""What is missing, cut, changed or half-written in a store is an error that names it, or is made again; it is never other data."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.store_parts import PART_ARRAYS, SMALL_ARRAYS, fill, make_manifest, make_rollouts, same_rollout, same_scores, score

from megatron_opd.data.location import Location
from megatron_opd.data.manifests import part_group, score_group
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store
from megatron_opd.errors import StoreError
from megatron_opd.records import Rollout, TeacherScores
from megatron_opd.store_records import StoreManifest

SCORE_ARRAYS = ("logp", "topk_ids", "topk_logp")
ARRAYS = [(part_group(1), name) for name in PART_ARRAYS] + [(score_group(1, "teacher"), name) for name in SCORE_ARRAYS]
SMALL = [(part_group(1), name) for name in SMALL_ARRAYS]


def small_manifest() -> StoreManifest:
    return make_manifest(num_prompts=6, samples=2, per_part=2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of four rollouts, scored with top-k; never written to."""
    path = tmp_path_factory.mktemp("stores") / "pristine.opd.zarr"
    fill(str(path), small_manifest(), longest=20)
    score(str(path), top_k=4)
    return path


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "store.opd.zarr"))


def data_file(store: Path, group: str, name: str) -> Path:
    (path,) = [path for path in (store / group / name / "c").rglob("*") if path.is_file()]
    return path


def read_all(store: Path, **options: int) -> list[tuple[Rollout, TeacherScores]]:
    reader = StoreReader(str(store), **options)
    return [(reader.rollout(index), reader.scores(index, "teacher", topk=True)) for index in range(len(reader))]


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("group", "name", "harm"),
    [
        *((group, name, harm) for group, name in ARRAYS for harm in ("flip", "delete")),
        *((group, name, harm) for group, name in (ARRAYS[0], SMALL[0], ARRAYS[-1]) for harm in ("cut", "empty")),
    ],
    ids=lambda value: value.rsplit("/", 1)[-1],
)
def test_a_damaged_array_is_named(store: Path, group: str, name: str, harm: str) -> None:
    before = StoreReader(str(store))
    path = data_file(store, group, name)
    if harm == "flip":
        flip(path, path.stat().st_size // 2)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    named = f"{group}/{name}"
    (problem,) = before.verify()
    assert named in problem
    assert "delete this group and make it again" in problem
    for memory_bytes in (200, 1 << 30):
        # An empty file is an array without data: seen by its values, which name the group, where no checksum is made.
        with pytest.raises(StoreError, match=group if harm == "empty" else named):
            read_all(store, memory_bytes=memory_bytes)
    if (group, name) not in SMALL:  # the other parts are read as ever
        reader, whole = StoreReader(str(store)), before
        for index in np.flatnonzero(reader.part_ids != 1):
            same_rollout(reader.rollout(int(index)), whole.rollout(int(index)))


@pytest.mark.parametrize(("group", "name"), ARRAYS, ids=lambda value: value.rsplit("/", 1)[-1])
def test_a_missing_chunk_is_never_zeros(store: Path, group: str, name: str) -> None:
    """The file stands and is whole, but holds no data: the same as an array that was created and never written."""
    array = zarr.open_array(str(store / group), path=name, mode="r")
    shape, chunks, dtype, fill_value = array.shape, array.chunks, array.dtype, array.fill_value
    assert fill_value != 0
    shutil.rmtree(store / group / name)
    lacking = zarr.create_array(
        store=str(store / group), name=name, shape=shape, dtype=dtype, chunks=chunks, shards=array.shards, fill_value=fill_value,
        compressors=array.compressors, config={"write_empty_chunks": True},
    )  # fmt: skip
    lacking[:] = fill_value
    named = f"{group}/{name}" if (group, name) in SMALL else group
    for memory_bytes in (200, 1 << 30):
        with pytest.raises(StoreError, match=named):
            read_all(store, memory_bytes=memory_bytes)


@pytest.mark.parametrize("group", ["", part_group(1), score_group(1, "teacher")])
@pytest.mark.parametrize(
    "content", ["", '{"zarr_format": 3, "attrib', "[]", "\x00\x00\x00", '{"attributes": null}', '{"attributes": {"opd": {}}}']
)
def test_a_damaged_manifest_is_named(store: Path, group: str, content: str) -> None:
    (store / group / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match=group or "store.opd.zarr"):
        read_all(store)


def test_an_unsealed_part_does_not_exist(store: Path) -> None:
    (store / part_group(1) / "zarr.json").unlink()
    reader = StoreReader(str(store))
    assert list(reader.parts) == [0, 2]
    assert reader.missing_parts() == [1]
    assert reader.verify() == []
    with pytest.raises(StoreError, match=r"1 of 3 parts are not sealed \(first: \[1\]\); run the stage again"):
        reader.check_complete()


def test_what_a_killed_writer_leaves_is_ignored_and_replaced(tmp_path: Path) -> None:
    url, manifest = str(tmp_path), small_manifest()
    create_store(url, manifest)
    fill(str(tmp_path / "other"), manifest, seed=9)
    leftover = tmp_path / ".000000.0123456789abcdef.tmp"
    for target in (tmp_path / "parts" / leftover.name, tmp_path / part_group(0)):
        shutil.copytree(tmp_path / "other" / part_group(0), target)
        if target.name == "000000":  # all arrays are there, but the manifest, which is written last, is not
            (target / "zarr.json").unlink()
    shutil.copytree(tmp_path / "other" / part_group(1) / "tokens", tmp_path / part_group(1) / "tokens")
    (tmp_path / part_group(2)).mkdir()
    assert StoreReader(url).parts == {}
    fill(url, manifest)
    reader = StoreReader(url)
    reader.check_complete()
    assert reader.verify() == []
    for part in range(3):
        for got, want in zip(reader.part_rollouts(part), make_rollouts(manifest, part), strict=True):
            same_rollout(got, want)


def test_old_leftovers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_store(str(tmp_path), make_manifest())
    old, new = (tmp_path / "parts" / f".000000.{name}.tmp" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "tokens").mkdir(parents=True)
    os.utime(old, (time.time() - 90000,) * 2)
    create_store(str(tmp_path), make_manifest())
    assert (old.exists(), new.exists()) == (False, True)  # the new one may be another worker's


def test_a_renamed_part_is_refused(store: Path) -> None:
    shutil.rmtree(store / part_group(0))
    (store / part_group(2)).rename(store / part_group(0))
    with pytest.raises(StoreError, match="parts/000000: holds part 2"):
        StoreReader(str(store))


def test_scores_of_other_rollouts_are_refused(store: Path, tmp_path: Path) -> None:
    fill(str(tmp_path / "other"), small_manifest(), seed=1)
    score(str(tmp_path / "other"), top_k=4)
    shutil.rmtree(store / score_group(1, "teacher"))
    shutil.copytree(tmp_path / "other" / score_group(1, "teacher"), store / score_group(1, "teacher"))
    reader = StoreReader(str(store))
    (problem,) = reader.verify()
    for check in (lambda: reader.check_scored("teacher"), lambda: reader.scores(4, "teacher"), lambda: reader.unscored_parts("teacher")):
        with pytest.raises(StoreError, match=r"parts/000001/teacher/teacher: scores of other rollouts than part 1 now holds"):
            check()
    assert "scores of other rollouts" in problem


def kind_of(path: Path) -> str:
    if path.name != "zarr.json":
        return "data"
    return "manifest" if json.loads(path.read_text())["node_type"] == "group" else "metadata"


def edit(store: Path, group: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as an older version could have written it: without its own checksum."""
    path = store / group / "zarr.json"
    content = json.loads(path.read_text())
    del content["attributes"]["opd_crc32c"]
    change(content["attributes"]["opd"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("field", ["num_rollouts", "num_tokens", "crc32c", "part"])
def test_a_manifest_that_does_not_fit_its_arrays(store: Path, field: str) -> None:
    def change(record: dict[str, Any]) -> None:
        if field == "crc32c":
            del record[field]["tokens"]
        else:
            record[field] += 1

    edit(store, part_group(1), change)
    with pytest.raises(StoreError, match="parts/000001"):
        StoreReader(str(store))


def test_scores_without_a_checksum(store: Path) -> None:
    edit(store, score_group(1, "teacher"), lambda record: record["crc32c"].pop("topk_ids"))
    with pytest.raises(StoreError, match="parts/000001/teacher/teacher: no checksum of topk_ids"):
        read_all(store)


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_random_damage_is_never_other_data(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any one file below a part, flipped, cut, emptied or deleted: a StoreError, a part that does not exist, or the very same arrays."""
    store = tmp_path / "damaged.opd.zarr"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(pristine, store)
    files = sorted(path for path in (store / "parts").rglob("*") if path.is_file())
    kind = data.draw(st.sampled_from(["manifest", "metadata", "data"]), label="kind")
    victim = data.draw(st.sampled_from([path for path in files if kind_of(path) == kind]), label="file")
    size = victim.stat().st_size
    harm = data.draw(st.sampled_from(["flip", "flip", "cut", "delete"]), label="harm")
    offset = data.draw(st.integers(0, size - 1), label="offset")
    if harm == "flip":
        flip(victim, offset, 1 << data.draw(st.integers(0, 7), label="bit"))
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:offset])
    else:
        victim.unlink()
    whole = StoreReader(str(pristine))
    wanted = {(int(p), int(s)): index for index, (p, s) in enumerate(zip(whole.prompt_indices, whole.sample_indices, strict=True))}
    for memory_bytes in (200, 1 << 30):
        try:
            reader = StoreReader(str(store), memory_bytes=memory_bytes)
            reader.check_scored("teacher")
        except StoreError:
            continue
        indices = list(range(len(reader)))
        random.Random(offset).shuffle(indices)
        for index in indices[:4]:
            try:
                rollout, scores = reader.rollout(index), reader.scores(index, "teacher", topk=True)
            except StoreError:
                continue
            same = wanted[rollout.prompt_index, rollout.sample_index]
            same_rollout(rollout, whole.rollout(same))
            same_scores(scores, whole.scores(same, "teacher", topk=True))


def test_manifests_hold_what_the_format_says(pristine: Path) -> None:
    """Readable without this program: plain Zarr v3 with the manifest in the group's attributes."""
    group = zarr.open_group(str(pristine), mode="r")
    assert group.attrs["opd"]["format_version"] == 1  # type: ignore[index]
    part = group["parts/000001"]
    assert part.attrs["opd"]["num_rollouts"] == 4  # type: ignore[index]
    assert {name: str(part[name].dtype) for name in PART_ARRAYS} == {  # type: ignore[index]
        "tokens": "int32", "offsets": "int64", "prompt_len": "int32", "prompt_index": "int64", "sample_index": "int32", "finish": "uint8", "student_logp": "float32",
    }  # fmt: skip
    assert part["teacher/teacher/topk_ids"].shape[1] == 4  # type: ignore[index]
    assert json.loads((pristine / "zarr.json").read_text())["zarr_format"] == 3
    assert Location(str(pristine)).children("parts") == ["000000", "000001", "000002"]
