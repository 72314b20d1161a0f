"""Time of a training step from what it computes, sends and waits for, each share from a best to a worst case.

The figures of the GPUs are from data sheets (cost/gpus.py); every share of them that a step reaches is an assumption, named below. None has been
compared with a step on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megatron_opd.cost.gpus import GPUS, Gpu
from megatron_opd.estimate.ranges import NOTHING, Range, between
from megatron_opd.estimate.traffic import StepWork

# Assumptions, each (worst, best).
# Share of the bf16 peak while a GPU computes: matrix products reach 60 to 70 %, what lies between them (norms, RoPE, activations) is bound
# by memory. A mixture's small products, and the sorting of its tokens, reach less.
COMPUTE_SHARE = {"dense": (0.30, 0.55), "mixture": (0.10, 0.30)}
FP8_SPEEDUP = (1.0, 1.4)  # of the computing of a whole step
LINK_SHARE = {"nvlink": (0.45, 0.80), "network": (0.50, 0.90)}  # of a link's bytes a second
CALL_SECONDS = (30e-6, 8e-6)  # of a collective, however short
WAIT_SECONDS = (200e-6, 30e-6)  # that the GPU idles after the host has waited for it
MEMORY_SHARE = (0.40, 0.75)  # of the GPU memory's bandwidth, in the optimizer
# Share of a kind's messages that computing does not hide. tp: of its 10 messages a layer, the backward pass runs two gathers and two scatters
# beside a matrix product. dp: all buckets but the last run beside the backward pass, and weights are gathered beside the forward pass.
# cp: the ring's messages run beside attention. pp: the first and last ones are part of the bubble.
EXPOSED = {
    "tp": (1.0, 0.6),
    "cp": (0.5, 0.0),
    "ep": (1.0, 1.0),
    "pp": (1.0, 0.2),
    "dp": (0.5, 0.1),
    "dp-cp": (0.5, 0.1),
    "expert-dp": (0.5, 0.1),
}
_OTHER_KINDS = (1.0, 1.0)
# The CPU's part of the optimizer, for each parameter: gradients down the bus and weights up (4 + 2 bytes), and 4 arrays in fp32 read and 3
# written by one node's memory, which its GPUs share.
BUS_BYTES, HOST_BYTES = 6, 28
BUS_BANDWIDTH = (20e9, 50e9)  # bytes a second of one GPU
HOST_BANDWIDTH = (10e9, 45e9)  # one GPU's share of the memory's bandwidth of a node of 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, from best to worst; `total` is the sum of all but `sent`.

    `sent`: messages by kind of group, if nothing ran beside them; `exposed`: what of these adds to the step. `bubble`: the pipeline's idle
    time. `waits`: after host waits. `optimizer`: the update on the GPU. `offloaded`: the update on the CPU.
    """

    compute: Range
    sent: dict[str, Range]
    exposed: dict[str, Range]
    bubble: Range = NOTHING
    waits: Range = NOTHING
    optimizer: Range = NOTHING
    offloaded: Range = NOTHING
    total: Range = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.compute, *self.exposed.values(), self.bubble, self.waits, self.optimizer, self.offloaded]
        object.__setattr__(self, "total", sum(parts, NOTHING))

    def until(self, worse: StepTime) -> StepTime:
        """From this one's best case to the worst case of another, of a step with more work; both have the same groups."""

        def span(low: Range, high: Range) -> Range:
            return Range(low.low, high.high)

        def spans(low: dict[str, Range], high: dict[str, Range]) -> dict[str, Range]:
            return {kind: span(low[kind], high[kind]) for kind in low}

        rest = {name: span(getattr(self, name), getattr(worse, name)) for name in ("bubble", "waits", "optimizer", "offloaded")}
        return StepTime(span(self.compute, worse.compute), spans(self.sent, worse.sent), spans(self.exposed, worse.exposed), **rest)

    def describe(self) -> str:
        """'compute 3.1 to 5.2 s, tp 0.2 to 0.6 s, ...': the parts that take time."""
        names = {"compute": self.compute, **self.exposed, "pipeline bubble": self.bubble, "host waits": self.waits}
        names |= {"optimizer": self.optimizer, "optimizer on the CPU": self.offloaded}
        return ", ".join(f"{name} {part.text()} s" for name, part in names.items() if part != NOTHING)


def predict_step(
    flops: float,
    comm: Mapping[str, float],
    *,
    gpu: str | Gpu,
    calls: Mapping[str, float] | None = None,
    over_nodes: Collection[str] = (),
    mixture: bool = False,
    fp8: bool = False,
    pp: int = 1,
    vpp: int = 1,
    micro_batches: float = 1.0,
    waits: int = 0,
    updated: float = 0.0,
    offloaded: float = 0.0,
) -> StepTime:
    """Time of a step of one rank.

    flops: with recomputation. comm: bytes that leave the rank, by kind of group (`traffic.sent_bytes` makes them of tensors' sizes).
    gpu: a name of `gpus.GPUS`, or figures. calls: messages by kind. over_nodes: kinds whose ranks are on several nodes. waits: of the host,
    in a step. updated: bytes of the GPU's memory that the optimizer reads and writes. offloaded: parameters that the CPU updates.
    """
    figures = GPUS[gpu.lower()] if isinstance(gpu, str) else gpu
    calls = calls or {}

    def compute(worst: bool) -> float:
        share = COMPUTE_SHARE["mixture" if mixture else "dense"][not worst] * (FP8_SPEEDUP[not worst] if fp8 else 1.0)
        return flops / (figures.bf16_flops * share)

    def message(kind: str, worst: bool) -> float:
        link, rate = ("network", figures.network) if kind in over_nodes else ("nvlink", figures.nvlink)
        return comm[kind] / (rate * LINK_SHARE[link][not worst]) + calls.get(kind, 0.0) * CALL_SECONDS[not worst]

    def visible(kind: str, worst: bool) -> float:
        return message(kind, worst) * EXPOSED.get(kind, _OTHER_KINDS)[not worst]

    def bubble(worst: bool) -> float:
        busy = compute(worst) + sum(visible(kind, worst) for kind in comm if kind in ("tp", "cp", "ep"))
        return busy * (pp - 1) / (micro_batches * vpp)

    return StepTime(
        compute=between(compute),
        sent={kind: between(lambda worst, kind=kind: message(kind, worst)) for kind in comm},
        exposed={kind: between(lambda worst, kind=kind: visible(kind, worst)) for kind in comm},
        bubble=between(bubble),
        waits=between(lambda worst: waits * WAIT_SECONDS[not worst]),
        optimizer=between(lambda worst: updated / (figures.bytes_per_second * MEMORY_SHARE[not worst])),
        offloaded=between(lambda worst: offloaded * (BUS_BYTES / BUS_BANDWIDTH[not worst] + HOST_BYTES / HOST_BANDWIDTH[not worst])),
    )


def predict_work(work: StepWork, *, gpu: Gpu, mixture: bool, fp8: bool, pp: int, vpp: int) -> StepTime:
    """Time of what `traffic.step_work` found."""
    return predict_step(
        work.flops,
        work.sent,
        gpu=gpu,
        calls=work.calls,
        over_nodes=work.over_nodes,
        mixture=mixture,
        fp8=fp8,
        pp=pp,
        vpp=vpp,
        micro_batches=work.micro_batches,
        updated=work.updated,
        offloaded=work.offloaded,
    )
