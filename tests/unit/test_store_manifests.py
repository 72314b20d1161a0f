"""Manifests and the metadata of arrays: a changed bit is noticed, or is of no effect; what is odd is one line, whatever its type, size or depth."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.store_parts import fill, make_manifest, score

from megatron_opd.data.calibration import read_calibration, write_calibration
from megatron_opd.data.location import Location
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError
from megatron_opd.store_records import Calibration, Gap

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whoever changes a file of it puts it back."""
    path = tmp_path_factory.mktemp("stores") / "store"
    fill(str(path), make_manifest(num_prompts=4, samples=2, per_part=2), longest=20)
    score(str(path), top_k=2)
    gap = Gap(mean=0.1, p99=0.2, max=0.3, tokens=10)
    write_calibration(Location(str(path)), Calibration(floor=gap, replicas={"0" * 64: gap}, num_rollouts=4))
    return path


def content(store: Path) -> list[Any]:
    """All that a reader gives."""
    reader = StoreReader(str(store), memory_bytes=200)
    reader.check_complete("teacher")
    records = [
        *reader.parts.values(),
        *(reader.score_manifest(part, "teacher") for part in reader.parts),
        read_calibration(reader.location),
    ]
    arrays = []
    for index in range(len(reader)):
        rollout, scores = reader.rollout(index), reader.scores(index, "teacher", topk=True)
        arrays += [rollout.tokens, rollout.student_logp, scores.logp, scores.topk_ids, scores.topk_logp]
    return [reader.manifest, reader.store_id, reader.notes, records, [array.tobytes() for array in arrays if array is not None]]


def test_a_changed_bit_of_a_manifest_is_noticed_or_of_no_effect(store: Path) -> None:
    wanted, rng, messages = content(store), random.Random(0), []
    files = [path for path in store.rglob("*.json") if path.stat().st_size > 200]
    for _ in range(120):
        path = rng.choice(files)
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        try:
            assert content(store) == wanted, f"{path.relative_to(store)}, byte {at}"
        except StoreError as error:
            messages.append(str(error))
        finally:
            path.write_bytes(whole)
    assert len(messages) > 60
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("zarr.json", "delete this file and run the stage with the settings that it had, which writes it again"),
        ("parts/000001/zarr.json", "delete this group and make it again"),
        ("parts/000001/teacher/teacher/zarr.json", "delete this group and make it again"),
    ],
)
def test_an_edited_manifest_says_how_to_go_on(store: Path, name: str, remedy: str) -> None:
    path = store / name
    whole = path.read_text()
    tree = json.loads(whole)
    tree["attributes"]["opd"]["provenance"] = {"by": "hand"}
    try:
        path.write_text(json.dumps(tree))
        with pytest.raises(StoreError, match=rf"{name} is not as it was written .*{remedy}; if the change was meant, remove 'opd_crc32c'"):
            content(store)
        del tree["attributes"]["opd_crc32c"]
        path.write_text(json.dumps(tree))
        content(store)
    finally:
        path.write_text(whole)


def test_an_edited_calibration_is_refused_and_an_older_one_read(store: Path) -> None:
    path = store / "calibration.json"
    whole = path.read_text()
    record = json.loads(whole)
    try:
        path.write_text(json.dumps(record | {"num_rollouts": 5}))
        with pytest.raises(StoreError, match=r"calibration.json is not as it was written .* delete it and run"):
            read_calibration(Location(str(store)))
        del record["crc32c"]
        path.write_text(json.dumps(record))
        assert read_calibration(Location(str(store))) is not None
        for text in ("[]", "\0", DEEP, '{"floor": 3}'):
            path.write_text(text)
            with pytest.raises(StoreError, match=r"calibration\.json") as caught:
                read_calibration(Location(str(store)))
            assert "\n" not in str(caught.value)
    finally:
        path.write_text(whole)


ARRAY_FAULTS: list[tuple[tuple[str | int, ...], Any]] = [
    *((("shape",), value) for value in ([-1], [1 << 62], [10**30], [1.5], ["4"], [], [[4]], [4, 4, 4], "4", None, 4, {}, [True])),
    *((("data_type",), value) for value in ("object", "float64", "<i4", "int3", "complex128", None, 4, ["int32"], {"name": "int32"}, "\0")),
    *((("codecs", 0, "configuration", "chunk_shape"), value) for value in ([0], [-1], [1 << 40], [10**30], [], ["1"], None, [1, 1], [1.0])),
    *((("chunk_grid", "configuration", "chunk_shape"), value) for value in ([0], [1 << 50], [1], None, "x")),
    *((("codecs",), value) for value in ([], None, "x", 3, [None], [[]], [{}], {"name": "sharding_indexed"})),
    *((("codecs", 0, "configuration", "codecs"), value) for value in ([], None, [{"name": "bytes"}], [{"name": []}])),
    (("chunk_grid",), []),
    (("codecs", 0, "configuration", "index_location"), "start"),
]


def test_odd_metadata_of_an_array_is_one_line(store: Path) -> None:
    """Nothing is allocated for a shape that the manifest or the file does not bear out."""
    path = store / "parts/000001/offsets/zarr.json"
    whole = path.read_text()
    texts = [
        "",
        "null",
        "[]",
        '"x"',
        "\0" * 9,
        DEEP,
        "[" * 100_000 + "]" * 100_000,
        whole[:90],
        whole.replace('"shape"', '"shape": [1], "shape"'),
    ]
    for where, value in ARRAY_FAULTS:
        tree = json.loads(whole)
        node = tree
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = value
        texts.append(json.dumps(tree))
    try:
        for text in texts:
            path.write_text(text)
            with pytest.raises(StoreError, match="parts/000001/offsets can't be opened") as caught:
                StoreReader(str(store))
            assert "\n" not in str(caught.value), text[:200]
            if '"shape"' in text and text.count('"shape"') == 1:  # without a manifest's word, too
                with pytest.raises(StoreError, match="offsets"):
                    Location(str(store)).read_array("parts/000001", "offsets", slice(0, 1 << 60))
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    ("group", "change"),
    [
        ("", {"prompts_per_part": 0}),
        ("", {"prompts_per_part": 10**30}),
        ("", {"prompts": {"name": "p", "sha256": "0", "num_prompts": 1 << 39}}),
        ("", {"sampling": {"samples_per_prompt": 1 << 62}}),
        ("", {"format_version": "\x1b[2J"}),
        ("", {"stop_ids": "\x1b[2J"}),
        ("parts/000001", {"num_rollouts": 1 << 39}),
        ("parts/000001", {"num_tokens": -1}),
        ("parts/000001", {"num_tokens": 10**30}),
        ("parts/000001", {"excluded": [{"prompt_index": 10**30, "sample_index": 0, "reason": ""}]}),
        ("parts/000001", {"store_id": "\x1b[2J"}),
        ("parts/000001", {"\x1b[2J": 1}),
        ("parts/000001/teacher/teacher", {"top_k": 1 << 30}),
        ("parts/000001/teacher/teacher", {"top_k": 1 << 19}),
        ("parts/000001/teacher/teacher", {"max_tokens": 0}),
        ("parts/000001/teacher/teacher", {"part": 0}),
    ],
)
def test_odd_values_in_a_manifest_are_one_line(store: Path, group: str, change: dict[str, Any]) -> None:
    path = store / group / "zarr.json"
    whole = path.read_text()
    try:
        Location(str(store)).write_attributes(group, json.loads(whole)["attributes"]["opd"] | change)
        with pytest.raises(StoreError) as caught:
            content(store)
        assert str(store) in str(caught.value)
        assert not any(letter in str(caught.value) for letter in "\n\x1b")
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("name", ["parts/000001/zarr.json", "parts/000001/tokens/zarr.json", "parts/000001/tokens/c/0"])
def test_a_named_pipe_or_a_folder_in_place_of_a_file_is_refused_at_once(store: Path, name: str, tmp_path: Path) -> None:
    path, aside = store / name, tmp_path / "aside"
    path.rename(aside)
    try:
        for make, remove in ((os.mkfifo, os.unlink), (os.mkdir, os.rmdir)):
            make(path)
            with pytest.raises(StoreError, match="parts/000001"):
                content(store)
            remove(path)
    finally:
        shutil.move(aside, path)


def test_a_chunk_that_unpacks_to_more_than_its_shape_is_refused(tmp_path: Path) -> None:
    """The checksums are right, as somebody who means it writes them."""
    location = Location(str(tmp_path))
    location.write_sealed_group("g", {"x": np.zeros(1 << 15, np.int32)}, {"a": 1})
    path = tmp_path / "g/x/zarr.json"
    path.write_text(path.read_text().replace(str(1 << 15), "8"))
    with pytest.raises(StoreError, match="chunk 0 is of another size"):
        location.read_array("g", "x")
