"""The stages with the real SGLang, started by the stage itself and killed in the middle; and the engines compared, on a Llama."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import psutil
import pytest
from serve.sglang_server import HOW_TO_INSTALL, sglang_python
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.calibration import read_calibration
from megatron_opd.data.store import StoreReader

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
TOLERANCE = 1e-4
PROMPTS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sglang_python() is None:
        pytest.skip(HOW_TO_INSTALL)
    folder = tmp_path_factory.mktemp("stages")
    make_model(folder / "student", "llama", seed=0, max_position_embeddings=256)
    make_model(folder / "teacher", "llama", seed=1, max_position_embeddings=256)
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    return folder


def servers() -> list[str]:
    """Overrides with which a stage starts SGLang on a CPU."""
    environment = {"PYTHONPATH": "", "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in environment.items())
    command = [str(sglang_python()), "-m", "sglang.launch_server"]
    options = ["--device", "cpu", "--max-total-tokens", "8192", "--watchdog-timeout", "3600"]
    return [
        f"engine.launch.command={json.dumps(command)}",
        f"engine.launch.options={json.dumps(options)}",
        f"engine.launch.environment={{{table}}}",
        "engine.dtype=float32",
        "engine.tokens_under_way=300",
    ]


def arguments(folder: Path, stage: str, *more: str) -> list[str]:
    settings = {
        "run_dir": folder / "run",
        "models.teacher": folder / "teacher",
        "models.student": folder / "student",
        "rollout.model": folder / "student",
        "rollout.sft_teacher": folder / "teacher",
        "rollout.prompts": folder / "prompts.jsonl",
        "rollout.prompts_per_part": 2,
        "rollout.sampling.temperature": 0.7,
        "score.top_k": 4,
        "train.init": folder / "student",
    }
    return [stage, "tiny", *(f"{key}={value}" for key, value in settings.items()), *more]


def test_sampling_scoring_with_kills_and_calibration(folder: Path) -> None:
    store = str(folder / "run" / "rollouts.opd.zarr")
    assert main(arguments(folder, "rollout", *servers(), "--launch", "1")) == 0
    reader = StoreReader(store)
    reader.check_complete()
    # An undisturbed run of the other engine under another name, for comparison.
    assert main(arguments(folder, "score", "score.teacher=calm", "engine.kind=transformers")) == 0
    command = [sys.executable, "-m", "megatron_opd", *arguments(folder, "score", *servers(), "--launch", "1")]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    end = time.monotonic() + 900
    while not list(Path(store).glob("parts/0*/teacher/teacher/zarr.json")):
        assert worker.poll() is None, worker.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)
    for child in psutil.Process(worker.pid).children():
        child.kill()  # the server's parent process; the kernel ends its own
    output, _ = worker.communicate(timeout=900)
    assert worker.returncode == 0, output[-3000:]
    assert "starting it again" in output
    reader = StoreReader(store)
    reader.check_complete("teacher")
    assert reader.verify() == []
    assert all(not record.excluded for part in reader.parts if (record := reader.score_manifest(part, "teacher")))
    for index in range(len(reader)):
        start = reader.rollout(index).prompt_len
        have, want = (reader.scores(index, name, topk=True) for name in ("teacher", "calm"))
        np.testing.assert_allclose(have.logp[start:], want.logp[start:], atol=TOLERANCE, rtol=0)
        assert have.topk_logp is not None
        assert want.topk_logp is not None
        np.testing.assert_allclose(have.topk_logp[start:], want.topk_logp[start:], atol=TOLERANCE, rtol=0)
    # The rollouts' log-probs came from the server at temperature 0.7 and are those at temperature 1: Megatron agrees.
    assert main(["check", store, "--model", str(folder / "student"), "--launch", "1", *servers()]) == 0
    record = read_calibration(reader.location)
    assert record is not None
    assert record.floor is not None
    assert record.stored is not None
    assert record.engine["kind"] == "sglang"
    assert record.floor.max < TOLERANCE
    assert record.stored.max < TOLERANCE
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(arguments(folder, "check")) == 0
    assert "noise between serving and training engine" in printed.getvalue()
