"""What a simulated GPU says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.cost.gpus import Gpu
from megatron_opd.errors import UserError

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """Name as the driver gives it, compute capability, streaming multiprocessors, memory in bytes."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int


# From NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.
_KINDS = {
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 132),
    "H200": ("NVIDIA H200", (9, 0), 132),
    "B200": ("NVIDIA B200", (10, 0), 148),
}


def device_of(gpu: Gpu) -> Device:
    """The device to simulate for a GPU of cost/gpus.py. Raises UserError for one whose capability is not known here."""
    if gpu.name not in _KINDS:
        raise UserError(f"a {gpu.name} can't be simulated, as its compute capability is not known; take one of {', '.join(_KINDS)}")
    name, capability, multiprocessors = _KINDS[gpu.name]
    return Device(name, capability, multiprocessors, int(gpu.memory_gib * GIB))
