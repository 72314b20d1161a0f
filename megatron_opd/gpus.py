"""What GPUs can do at most, from NVIDIA's data sheets (SXM modules)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 peak in FLOP/s, memory in GiB as the driver reports it (rounded), and bytes a second to and from that memory."""

    name: str
    bf16_flops: float
    memory_gib: float
    bytes_per_second: float


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100", 312e12, 80.0, 2.04e12),
        Gpu("H100", 989e12, 80.0, 3.35e12),
        Gpu("H200", 989e12, 140.0, 4.8e12),
        Gpu("B200", 2250e12, 179.0, 7.7e12),
    )
}

_OTHERS = {"pcie", "nvl", "mig"}  # cards that run slower than the modules of their name, and slices of a GPU


def find_gpu(name: str) -> Gpu | None:
    """The one that the driver calls `name` ('NVIDIA H100 80GB HBM3'); None where its figures are not known."""
    words = set(re.findall(r"\w+", name.lower()))
    return None if words & _OTHERS else next((gpu for key, gpu in GPUS.items() if key in words), None)
