"""What GPUs can do at most, from NVIDIA's data sheets (SXM modules)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense peaks in FLOP/s, memory in GiB as the driver reports it (rounded), and bytes a second.

    `bytes_per_second`: to and from the GPU's memory. `nvlink`: out of one GPU to the others of its node, one direction, which is half of
    the figure of the data sheet. `network`: out of one GPU to other nodes, one direction, by the adapter that a DGX has for each GPU.
    """

    name: str
    bf16_flops: float
    memory_gib: float
    bytes_per_second: float
    nvlink: float
    network: float


# Data sheets: NVIDIA A100 (2021), H100 (2023), H200 (2024), HGX B200 (2025); adapters: DGX A100 (HDR, 200 Gb/s), DGX H100, H200 and B200
# (NDR, 400 Gb/s). Figures "with sparsity" are halved.
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100", 312e12, 80.0, 2.04e12, 300e9, 25e9),
        Gpu("H100", 989e12, 80.0, 3.35e12, 450e9, 50e9),
        Gpu("H200", 989e12, 140.0, 4.8e12, 450e9, 50e9),
        Gpu("B200", 2250e12, 179.0, 7.7e12, 900e9, 50e9),
    )
}

_OTHERS = {"pcie", "nvl", "mig"}  # cards that run slower than the modules of their name, and slices of a GPU


def find_gpu(name: str) -> Gpu | None:
    """The one that the driver calls `name` ('NVIDIA H100 80GB HBM3'); None where its figures are not known."""
    words = set(re.findall(r"\w+", name.lower()))
    return None if words & _OTHERS else next((gpu for key, gpu in GPUS.items() if key in words), None)
