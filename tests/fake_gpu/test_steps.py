"""A step of every layout and precision: it runs, waits where the list says, holds what `check` says, sends and computes what docs/training.md says."""

from __future__ import annotations

import allowed
import oracle
import pytest
from cases import CASES, NEWEST, OLDEST, Case
from simulator import Simulators, Step

from megatron_opd.estimate.memory import GIB, stage_memory
from megatron_opd.estimate.traffic import step_work

MEMORY, TRAFFIC, FLOPS = 0.03, 0.01, 0.01  # relative tolerances
RUNS = [(version, case) for version in (OLDEST, NEWEST) for case in CASES if version in case.versions]


@pytest.fixture(params=RUNS, ids=[f"{version}-{case.id}" for version, case in RUNS])
def run(request: pytest.FixtureRequest, simulators: Simulators) -> tuple[str, Case, Step]:
    version, case = request.param
    return version, case, simulators(version, with_te=case.with_te).step(case)


def test_the_host_waits_only_where_the_list_says(run: tuple[str, Case, Step]) -> None:
    version, case, step = run
    assert allowed.faults(step.waits_and_slow_copies, case, version) == []


def test_memory_is_what_the_estimate_says(run: tuple[str, Case, Step]) -> None:
    version, case, step = run
    layout, stage = oracle.layout_of(case), case.pipeline_stage
    memory = stage_memory(case.arch, case.config, layout, stage, micro_batches=case.micro_batches, megatron_core=version)
    assert sum(memory.parts.values()) / GIB == pytest.approx(step.peak / GIB, rel=MEMORY), memory.parts


def test_messages_have_the_bytes_of_the_arithmetic(run: tuple[str, Case, Step]) -> None:
    _, case, step = run
    wanted, found = oracle.bytes_by_group(case), step.bytes_by_kind
    assert {kind: found.get(kind, 0) for kind in wanted} == pytest.approx(dict(wanted), rel=TRAFFIC)
    others = sum(size for kind, size in found.items() if kind not in wanted)
    assert others <= TRAFFIC * max(sum(wanted.values()), 1), found


def test_the_estimate_sends_what_the_step_sends(run: tuple[str, Case, Step]) -> None:
    _, case, step = run
    layout = oracle.layout_of(case)
    if layout.pp > 1:
        pytest.skip("the estimate of bytes is of the stage that sends most")
    micro_batch = sum(case.lengths)
    tokens, squared = (case.micro_batches * layout.dp * value for value in (micro_batch, sum(n * n for n in case.lengths)))
    work = step_work(case.arch, case.config, layout, tokens=tokens, squared=squared)
    found = step.sent_by_kind
    assert {kind: found.get(kind, 0.0) for kind in work.sent} == pytest.approx(work.sent, rel=TRAFFIC)


def test_arithmetic_is_what_the_docs_count(run: tuple[str, Case, Step]) -> None:
    _, case, step = run
    assert step.flops == pytest.approx(oracle.flops(case), rel=FLOPS)
