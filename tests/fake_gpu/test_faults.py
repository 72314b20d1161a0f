"""The harness itself: a fault of the kind that only a GPU shows is found, each in a step that runs without it."""

from __future__ import annotations

import allowed
import pytest
from cases import CASES, OLDEST
from simulator import Simulators, Step, TaskFailed

CASE = next(case for case in CASES if case.id == "tp4")


def faulty_step(simulators: Simulators, fault: str) -> Step:
    return Step(simulators(OLDEST).ask("step", case=CASE.to_json(), fault=fault))


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("wrong keyword", "TypeError", "no_such_option"),
        ("CPU tensor for attention", "RuntimeError", "is on cpu"),
        ("CPU tensor for the loss kernel", "RuntimeError", "is on cpu|found at least two devices"),
    ],
)
def test_what_a_gpu_would_refuse_fails(fault: str, error: str, text: str, simulators: Simulators) -> None:
    with pytest.raises(TaskFailed, match=text) as caught:
        faulty_step(simulators, fault)
    assert caught.value.error == error


@pytest.mark.parametrize(("fault", "place"), [("item in the loop", "item"), ("tensor of a number", "cpu->cuda BLOCKING")])
def test_what_would_slow_the_loop_fails(fault: str, place: str, simulators: Simulators) -> None:
    found = allowed.faults(faulty_step(simulators, fault).waits_and_slow_copies, CASE, OLDEST)
    new = [line for line in found if line.startswith("no entry") and f"{CASE.micro_batches} x {place}" in line]
    assert len(new) == 1, found
