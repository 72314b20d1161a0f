"""What a simulation found, as a record that travels as JSON; no torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """One collective operation of a step: calls and bytes (the whole buffer) of one rank."""

    operation: str
    group: str
    ranks: int
    calls: int
    bytes: int
    spans_nodes: bool


@dataclass(frozen=True)
class Simulation:
    """What one rank holds, waits for, copies, computes and sends. Bytes, FLOPs and counts; those of a step are of the last one."""

    recipe: str
    stage: str
    ranks: int
    rank: int
    layers: int
    layout: dict[str, int]
    gpu: str
    gpu_bytes: int
    rest_bytes: int
    lengths: list[int]
    micro_batches: int
    steps: int
    parameters: int
    peak_bytes: int
    peak_phase: str
    peaks: dict[str, int]  # 'build', 'step', 'save' where it was asked for: bytes on the GPU
    host_peaks: dict[str, int]  # the same, of tensors in the host's memory
    by_place: list[tuple[str, int]]
    flops: float
    messages: list[Message]
    waits: dict[str, int]
    copies: dict[str, int]
    calls: dict[str, int]  # of Transformer Engine's compiled functions
    runs_out: dict[str, Any] | None  # phase, bytes and place where the GPU would have run out; None if it would not
    stood_in_for: list[str]
    versions: dict[str, str]
    seconds: float

    @property
    def blocking_copies(self) -> dict[str, int]:
        return {what: count for what, count in self.copies.items() if "BLOCKING" in what}

    @property
    def pageable_copies(self) -> dict[str, int]:
        return {what: count for what, count in self.copies.items() if "pageable" in what}

    def to_json(self) -> dict[str, Any]:
        """For json.dump; `from_json` reads it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Simulation:
        messages = [Message(**message) for message in tree["messages"]]
        places = [(place, size) for place, size in tree["by_place"]]
        return Simulation(**(tree | {"messages": messages, "by_place": places}))
