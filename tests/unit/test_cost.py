"""What a stage cost is written down, also when it fails, and a cut line costs no other line."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megatron_opd.cost.meter import StageCost, append_jsonl, git_commit, open_meter, provenance, read_jsonl, read_stages, write_jsonl
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.serve.stage import engine_meter


def test_a_row_a_run(tmp_path: Path) -> None:
    with StageCost(tmp_path / "run", "rollout", num_gpus=2) as cost:
        cost.tokens += 7
        cost.facts["note"] = "x"
    with pytest.raises(ValueError, match="broken"), StageCost(tmp_path / "run", "score", tokens=3):
        raise ValueError("broken")
    with StageCost(tmp_path / "run", "score"):
        pass  # nothing was left to do: no row
    first, second = read_jsonl(tmp_path / "run" / "stages.jsonl")
    assert (first["stage"], first["tokens"], first["note"]) == ("rollout", 7, "x")
    assert first["gpu_hours"] == pytest.approx(2 * first["seconds"] / 3600)
    assert "error" not in first
    assert (second["tokens"], second["error"]) == (3, "ValueError: broken")


def test_a_killed_run_leaves_its_last_account(tmp_path: Path) -> None:
    """Two workers at once: one ends, the other is killed, which is to say that __exit__ is never called."""
    path = tmp_path / "stages.jsonl"
    append_jsonl(path, {"stage": "older", "tokens": 1})
    append_jsonl(path, {"stage": "older", "tokens": 2})
    killed = StageCost(tmp_path, "rollout", num_gpus=2).__enter__()
    with StageCost(tmp_path, "rollout") as ended:
        for cost in (killed, ended):
            cost.tokens += 5
            cost.keep()
            cost.tokens += 5
            cost.keep()  # too early
            cost.keep(every=0)
        assert [(row["tokens"], row["unfinished"]) for row in read_stages(path)[2:]] == [(10, True), (10, True)]
        ended.tokens += 1
    found = read_stages(path)
    assert [(row["tokens"], row.get("unfinished", False)) for row in found] == [(1, False), (2, False), (10, True), (11, False)]
    assert found[2]["gpu_hours"] == pytest.approx(2 * found[2]["seconds"] / 3600)
    assert len(read_jsonl(path)) == 2 + 4 + 1


class FakeNvml(types.ModuleType):
    """The part of pynvml that is used, with four GPUs: NVML itself needs NVIDIA's driver, which a CPU machine has not."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, energy: bool = True):
        super().__init__("pynvml")
        self.millijoules = {f"GPU-{n}": 1000 * n for n in range(4)}
        self.energy = energy

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"GPU-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.energy:
            raise self.NVMLError("not supported")
        return self.millijoules[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(used=(1 + int(handle[-1])) << 30)


def test_energy_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-3")
    meter = open_meter()
    assert meter is not None
    assert (meter.num_gpus, meter.energy_joules(), meter.memory_gib()) == (2, 4.0, 4.0)
    with StageCost(tmp_path, "score", num_gpus=2, meter=meter) as cost:
        cost.tokens = 5
        nvml.millijoules["GPU-1"] += 2500
        nvml.millijoules["GPU-2"] += 99  # of somebody else
    with StageCost(tmp_path, "train", num_gpus=16, meter=meter) as cost:
        cost.tokens = 5
        cost.facts["energy_joules"] = 80.0  # of all nodes
    with StageCost(tmp_path, "train", num_gpus=16, meter=meter, tokens=5) as cost:
        cost.keep()  # the meter is that of one rank
    first, second, third = read_stages(tmp_path / "stages.jsonl")
    assert "energy_joules" not in third
    assert (first["energy_joules"], first["num_gpus"]) == (2.5, 2)
    assert second["energy_joules"] == 80.0


@pytest.mark.parametrize(
    ("engine", "joules"),
    [
        ({"device": "auto"}, 2.0),  # transformers, on the first visible GPU
        ({"launch": {"servers": 1, "tp": 2}}, 5.0),
        ({"launch": {"servers": 1, "environment": {"CUDA_VISIBLE_DEVICES": "0"}}}, 0.0),
        ({"launch": {"servers": 2, "tp": 2}}, None),  # more than are visible
        ({"launch": {"servers": 2, "tp": 2, "teacher": {"servers": 1}, "student": {"tp": 1}}}, 5.0),
        ({"urls": ["http://127.0.0.1:1"]}, None),
        ({"device": "cpu"}, None),
    ],
)
def test_energy_is_that_of_the_gpus_an_engine_uses(engine: dict, joules: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,0")
    meter = engine_meter(EngineConfig.model_validate(engine).serving("teacher"))
    assert (None if meter is None else meter.energy_joules()) == joules


def test_no_energy_where_none_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_meter() is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(energy=False))
    meter = open_meter()
    assert meter is not None
    assert meter.num_gpus == 4
    with StageCost(tmp_path, "score", meter=meter, tokens=1):
        pass
    assert "energy_joules" not in read_jsonl(tmp_path / "stages.jsonl")[0]
    assert open_meter(["GPU-9"]) is None
    assert open_meter([]) is None


def test_the_real_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver it says so, and there is no meter; with one, energy goes up."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = open_meter()
    if not Path("/proc/driver/nvidia/version").exists():
        assert meter is None
    elif meter is not None and (energy := meter.energy_joules()) is not None:
        assert energy > 0
        assert meter.memory_gib() >= 0


def test_rows_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, [{"row": 0}, {"row": 1}])
    append_jsonl(path, {"row": 2})
    assert [row["row"] for row in read_jsonl(path)] == [0, 1, 2]
    write_jsonl(path, read_jsonl(path)[:1])
    assert read_jsonl(path) == [{"row": 0}]
    assert list(path.parent.iterdir()) == [path]


def test_the_stage_s_own_error_is_the_one_that_is_shown(tmp_path: Path) -> None:
    """The row can't be written either: its folder is a file."""
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="broken"), StageCost(tmp_path / "run", "score"):
        raise ValueError("broken")
    with pytest.raises(OSError, match="run"), StageCost(tmp_path / "run", "score", tokens=1):
        pass


def test_a_row_may_be_long_and_a_file_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"row": number, "text": "x" * (4 << 20)} for number in range(20)]
    write_jsonl(path, rows)
    assert [row["row"] for row in read_jsonl(path)] == list(range(20))
    path.write_bytes(b'{"row": 0}\n' + b"[" * (17 << 20) + b'\n{"row": 1}\nx\n')
    assert [row["row"] for row in read_jsonl(path)] == [0, 1]
    assert "lines 2, 4\n" in capsys.readouterr().out


def test_a_cut_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    for number in range(3):
        append_jsonl(path, {"row": number, "text": "é\u2028\n"})
    whole = path.read_bytes()
    assert len(read_jsonl(path)) == 3
    for kept in range(len(whole) - 8, len(whole)):
        path.write_bytes(whole[:kept])
        append_jsonl(path, {"row": 3})
        assert [row["row"] for row in read_jsonl(path)] in ([0, 1, 3], [0, 1, 2, 3])


@pytest.mark.parametrize(
    "damage", [b"5", b"null", b"[1]", b'"text"', b"\xff\xfe", b'{"row": "\xff"}', b"\x00\x00", b"[" * 100_000, b'{"step": 1.5}']
)
def test_a_line_that_is_no_row_is_left_out_and_named(damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"row": 0}\n' + damage + b'\n\n{"row": 1}\n')
    assert [row["row"] for row in read_jsonl(path, number="row")] == [0, 1]
    assert capsys.readouterr().out == f"WARNING: {path}: damaged rows are left out: line 2\n"
    path.write_bytes((b'{"row": 0}\n' + damage + b"\n") * 8 + b'{"row": 1}\n')
    assert len(read_jsonl(path, number="row")) == 9
    assert "lines 2, 4, 6, 8, 10 and 3 more" in capsys.readouterr().out
    path.write_bytes(b'{"row": 0}\n' + damage)  # a kill cut it off
    assert read_jsonl(path, number="row") == [{"row": 0}]
    assert not capsys.readouterr().out


def test_a_clock_that_is_set_back_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with StageCost(tmp_path, "score", tokens=1) as cost:
        monkeypatch.setattr(time, "time", lambda: now - 3600.0)
        assert 0 <= cost.seconds() < 60
    (row,) = read_stages(tmp_path / "stages.jsonl")
    assert abs(row["started"] - now) < 60


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("OPD_GIT_COMMIT", raising=False)
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("OPD_GIT_COMMIT", "of the image")
    assert git_commit(tmp_path) == "of the image"
    git("init", "-q", "-b", "main")
    assert git_commit(tmp_path) == "of the image"  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert not (tmp_path / ".git/refs/heads/main").exists()
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    git("worktree", "add", "-q", "-b", "other", "elsewhere")
    assert git_commit(tmp_path / "elsewhere") == git("rev-parse", "HEAD")
    git("checkout", "-q", "--detach")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")


def test_provenance_names_versions() -> None:
    record = provenance()
    assert record["versions"]["zarr"]
    assert record["created"].endswith("Z")
