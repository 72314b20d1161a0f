"""The predicted time of a recipe's whole step, from what a few simulated micro-batches compute, send and wait for."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_opd.cost.gpus import Gpu
from megatron_opd.estimate.memory import Layout
from megatron_opd.estimate.step_time import StepTime, predict_step
from megatron_opd.estimate.traffic import sent_bytes, step_work
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.simulate.result import Simulation

if TYPE_CHECKING:
    from megatron_opd.model.architecture import Architecture

# Groups whose messages come with every micro-batch; others come once a step.
_EACH_MICRO_BATCH = {"tp", "cp", "ep", "pp", "tp-cp", "expert-tp"}

# Places of the optimizer, whose waits are as many with any number of micro-batches.
_ONCE_A_STEP = re.compile(r"/optimizers?/|train/update\.py")


@dataclass(frozen=True)
class WholeStep:
    """One rank's step of `micro_batches`: FLOPs, bytes that leave the GPU and calls by kind of group, host waits."""

    micro_batches: int
    flops: float
    sent: dict[str, float]
    calls: dict[str, float]
    over_nodes: frozenset[str]
    waits: int


def whole_step(found: Simulation, micro_batches: int) -> WholeStep:
    """`found` was of fewer micro-batches: what comes with each of them is scaled. What is received is another rank's to send."""
    ratio = micro_batches / found.micro_batches
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    messages = [message for message in found.messages if message.operation != "receive" and not message.group.endswith("on the host")]
    for message in messages:
        times = ratio if message.group in _EACH_MICRO_BATCH else 1.0
        sent[message.group] += sent_bytes(message.operation, message.bytes, message.ranks) * times  # pyright: ignore[reportArgumentType]
        calls[message.group] += message.calls * times  # pyright: ignore[reportArgumentType]
    waits = sum(
        round(count * ratio) if count % found.micro_batches == 0 and not _ONCE_A_STEP.search(where) else count
        for where, count in found.waits.items()
    )
    nodes = frozenset(message.group for message in messages if message.spans_nodes)
    return WholeStep(micro_batches, found.flops * ratio, dict(sent), dict(calls), nodes, waits)


def predict(step: WholeStep, arch: Architecture, config: TrainerConfig, layout: Layout, gpu: Gpu) -> StepTime:
    """Seconds, by the assumptions of estimate/step_time.py. The optimizer's part is the closed form's."""
    tokens = step.micro_batches * config.micro_batch_tokens * layout.dp
    update = step_work(arch, config, layout, tokens=tokens, squared=0.0)
    return predict_step(
        step.flops,
        step.sent,
        gpu=gpu,
        calls=step.calls,
        over_nodes=step.over_nodes,
        mixture=bool(arch.num_experts),
        fp8=config.fp8 is not None,
        pp=layout.pp,
        vpp=layout.vpp,
        micro_batches=step.micro_batches,
        waits=step.waits,
        updated=update.updated,
        offloaded=update.offloaded,
    )
