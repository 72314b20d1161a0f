"""Our reader of shard files gives what Zarr's own reader gives, for any shape, chunk size and slice; and finds every changed byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opd.data import location as location_module
from megatron_opd.data.location import Location
from megatron_opd.errors import StoreError

DTYPES = (np.int32, np.float32, np.float16, np.int64, np.uint8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_agrees_with_zarr(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    monkeypatch.setattr(location_module, "CHUNK_ITEMS", data.draw(st.sampled_from([1, 7, 64, 1 << 15])))
    rows, columns = data.draw(st.integers(0, 200)), data.draw(st.none() | st.integers(1, 9))
    rng = np.random.default_rng(rows)
    shape = (rows,) if columns is None else (rows, columns)
    array = (rng.standard_normal(shape) * 50).astype(data.draw(st.sampled_from(DTYPES)))
    folder = tmp_path_factory.mktemp("shards")
    location = Location(str(folder) if data.draw(st.booleans()) else f"memory://{folder.name}")
    location.write_sealed_group("g", {"x": array}, {})
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    ours = location.read_array("g", "x", slice(start, stop))
    np.testing.assert_array_equal(ours, array[start:stop])
    assert ours.dtype == array.dtype
    np.testing.assert_array_equal(zarr.open_array(location.zarr_store("g"), path="x", mode="r")[start:stop], ours)


def test_every_changed_byte_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location_module, "CHUNK_ITEMS", 16)
    location = Location(str(tmp_path))
    location.write_sealed_group("g", {"x": np.arange(50, dtype=np.int32)}, {})
    file = tmp_path / "g" / "x" / "c" / "0"
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        with pytest.raises(StoreError, match="g/x is damaged"):
            location.read_array("g", "x")
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="g/x"):
            location.read_array("g", "x")


def test_a_chunk_that_was_never_written(tmp_path: Path) -> None:
    location = Location(str(tmp_path))
    location.write_sealed_group("g", {"x": np.arange(50, dtype=np.int32)}, {})
    array = zarr.open_array(str(tmp_path / "g"), path="x", mode="r+", config={"write_empty_chunks": False})
    array[:] = array.fill_value
    with pytest.raises(StoreError, match="g/x"):
        location.read_array("g", "x")
