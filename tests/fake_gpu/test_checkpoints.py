"""What a checkpoint of each kind of state holds, and that a run goes on from it: all but the files, on tensors that only have shapes."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from cases import CASES, NEWEST, OLDEST, Case
from simulator import Simulators

# One of each kind of state.
KINDS = [
    "tp4",
    "vpp2-last",
    "replicated-optimizer",
    "fp8-delayed",
    "fp8-blockwise-parameters",
    "moments-bf16",
    "moments-fp8",
    "offload-half",
    "moe",
    "moe-fp8-delayed",
]
RUNS = [(version, case) for version in (OLDEST, NEWEST) for case in CASES if case.id in KINDS]


@pytest.mark.parametrize(("version", "case"), RUNS, ids=[f"{version}-{case.id}" for version, case in RUNS])
def test_a_run_goes_on_from_its_checkpoint(version: str, case: Case, simulators: Simulators, tmp_path: Path) -> None:
    found = simulators(version).ask("save_and_load", case=case.to_json(), folder=str(tmp_path))
    model = {key: shape for key, shape in found["tensors"].items() if not key.startswith("optimizer.")}
    assert sum(prod(shape) for shape in model.values()) >= found["parameters"]
