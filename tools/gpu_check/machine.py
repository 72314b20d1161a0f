"""What this machine has: `python -m gpu_check.machine OUTPUT.json` asks every package by importing it, in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Imported, since a package that is there may still not load. The others are asked for their version alone.
IMPORTED = {
    "torch": "torch",
    "triton": "triton",
    "megatron-core": "megatron.core",
    "transformers": "transformers",
    "zarr": "zarr",
    "matplotlib": "matplotlib",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "transformer-engine": "transformer_engine.pytorch",
}
ASKED = ("liger-kernel", "cut-cross-entropy", "verl", "sglang", "flash-attn", "apex", "nvidia-ml-py", "numcodecs", "numpy", "safetensors")
_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def has_gpu() -> bool:
    """Whether the kernel shows an NVIDIA GPU; starts nothing on it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def ask_driver(fields: tuple[str, ...] = _FIELDS) -> dict[str, str]:
    """nvidia-smi's answers for the first GPU; empty where it does not answer. Reads only."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().splitlines()[0].split(",")] if answer.strip() else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def clocks() -> dict[str, str]:
    """Clocks, temperature and power now."""
    return ask_driver(_CLOCKS)


def packages() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of what loads, and why the others don't."""
    versions, lacking = {}, {}
    for name, module in IMPORTED.items():
        try:
            importlib.import_module(module)
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
        except Exception as error:  # a broken package may raise anything
            first = next(iter(str(error).splitlines()), "")
            lacking[name] = f"{type(error).__name__}: {first}"
    for name in ASKED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking[name] = "not installed"
    if "sglang" in lacking and (other := os.environ.get("OPD_SGLANG_PYTHON")):  # an environment of its own, as SGLang pins its torch
        code = "from importlib import metadata; print(metadata.version('sglang'))"
        asked = subprocess.run([other, "-c", code], capture_output=True, text=True) if Path(other).exists() else None
        if asked is not None and not asked.returncode:
            versions["sglang"] = asked.stdout.strip()
            del lacking["sglang"]
        else:
            lacking["sglang"] = f"OPD_SGLANG_PYTHON={other}: {'no such file' if asked is None else 'has no sglang'}"
    return versions, lacking


def look() -> dict[str, Any]:
    """Everything, as JSON."""
    versions, lacking = packages()
    found: dict[str, Any] = {
        "driver": ask_driver(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "lacking": lacking,
        "gpus": 0,
    }
    if "torch" in versions:
        import torch

        found["cuda"] = torch.version.cuda
        found["gpus"] = torch.cuda.device_count()
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": properties.total_memory / 2**30,
                "multiprocessors": properties.multi_processor_count,
            }
    if not found["gpus"]:
        lacking["gpu"] = "this PyTorch sees no GPU"
    for name, reason in lacking.items():
        print(f"lacking: {name}: {reason}")
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(look()), encoding="utf-8")
