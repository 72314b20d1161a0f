"""`megatron-opd check STORE --model MODEL`: the noise between the engines is measured, recorded, and training holds to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from serve.stub_server import StubServer
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.calibration import read_calibration
from megatron_opd.data.location import Location


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    make_model(folder / "student", seed=0)
    make_model(folder / "teacher", seed=1)
    write_prompts(folder / "prompts.jsonl", 12)
    for stage in ("rollout", "score"):
        assert main(arguments(folder, stage)) == 0
    return folder


def arguments(folder: Path, stage: str, *more: str) -> list[str]:
    settings = {
        "run_dir": folder / "run",
        "models.teacher": folder / "teacher",
        "models.student": folder / "student",
        "rollout.model": folder / "student",
        "rollout.sft_teacher": folder / "teacher",
        "rollout.prompts": folder / "prompts.jsonl",
        "train.init": folder / "student",
    }
    return [stage, "tiny", *(f"{key}={value}" for key, value in settings.items()), *more]


def test_the_floor_is_measured_recorded_and_held(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, student = str(folder / "run" / "rollouts.opd.zarr"), str(folder / "student")
    assert main(arguments(folder, "check")) == 0
    assert "is not known; measure it: megatron-opd check" in capsys.readouterr().out
    assert main(["check", store, "--model", student, "--rollouts", "20"]) == 0
    record = read_calibration(Location(store))
    assert record is not None
    assert record.floor is not None
    assert record.stored is not None
    assert 0 <= record.floor.mean < 1e-4  # transformers and Megatron, both fp32: the very same bits here
    assert 0 < record.stored.mean < 1e-4
    assert record.floor.mean <= record.floor.p99 <= record.floor.max
    assert record.num_rollouts == 20
    capsys.readouterr()
    assert main(arguments(folder, "check")) == 0
    assert "noise between serving and training engine: mean" in capsys.readouterr().out
    for stage in ("check", "train"):
        assert main(arguments(folder, stage, "train.max_engine_gap=1e-12")) == 2
        assert "over train.max_engine_gap = 1e-12" in capsys.readouterr().err


def test_a_served_model_that_is_not_the_sampler(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, teacher = str(folder / "run" / "rollouts.opd.zarr"), str(folder / "teacher")
    assert main(["check", store, "--model", teacher]) == 2
    assert "give the sampler as --model" in capsys.readouterr().err
    with StubServer(folder / "teacher") as first, StubServer(folder / "teacher") as second:
        assert main(["check", store, "--model", teacher, "--url", first.url, "--url", second.url, "engine.dtype=float32"]) == 0
    assert "with each other: mean 0, p99 0" in capsys.readouterr().out
    record = read_calibration(Location(store))
    assert record is not None
    assert len(record.replicas) == 1
    with StubServer(folder / "student") as server:  # its numbers are not the student's at all
        assert main(["check", store, "--model", str(folder / "student"), "--url", server.url, "engine.dtype=float32"]) == 0
    assert main(arguments(folder, "check")) == 2
    assert "scores of the serving engine and of Megatron differ by" in capsys.readouterr().err
