"""The parts, the most valuable first: what each runs, for how long at most, and what of the machine it needs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = 77  # exit code of a program that lacks something; the last line of its output says what


@dataclass(frozen=True)
class Part:
    """A program. In `command` {python}, {out} (the JSON that it writes) and {work} (a folder for it) are filled in.

    needs: names as `gpu_check.machine` finds them: packages, or "gpu". least: seconds without which it is not begun. keep: its files
    that stay beside the record. always: also when it is done, since machines change between calls.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    least: float = 30.0
    keep: tuple[str, ...] = ()
    always: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def words(self, work: Path) -> list[str]:
        values = {"{python}": sys.executable, "{work}": str(work), "{out}": str(work / f"{self.name}.json")}
        words = list(self.command)
        for name, value in values.items():
            words = [word.replace(name, value) for word in words]
        return words

    def lacking(self, machine: dict[str, Any]) -> str:
        """Why it can't run on this machine; empty if it can."""
        return "; ".join(f"{need}: {machine['lacking'][need]}" for need in self.needs if need in machine.get("lacking", {}))


_TORCH = ("gpu", "torch", "triton")
_MEGATRON = (*_TORCH, "megatron-core", "transformers", "zarr")
_TRAIN = ("{python}", "tools/bench_train.py", "--model", "Qwen3-8B", "--layers", "4", "--micro-batch-tokens", "8192", "--global-batch", "32",
          "--steps", "3", "--recompute", "none", "--json", "{out}")  # fmt: skip
_LOSS = ("{python}", "tools/bench_loss.py", "--output", "{work}/")
_KERNEL_TESTS = ("tests/unit/test_vocab_parallel_stats.py", "tests/unit/test_linear_loss.py", "tests/unit/test_topk_overlap.py")
_MODULE = ("{python}", "-m")

PARTS: tuple[Part, ...] = (
    Part("machine", "what this machine has", (*_MODULE, "gpu_check.machine", "{out}"), 60, least=5, always=True),
    Part("kernels", "compiled kernels against float64 at real sizes", (*_MODULE, "gpu_check.kernels", "{out}"), 75, _TORCH),
    Part(
        "loss", "the kernel and the head beside others, at the bars' size",
        (*_LOSS[:-1], "{work}/loss", "--tokens", "16384", "--shards", "1", "--ids", "1"), 150, (*_MEGATRON, "matplotlib"), keep=("loss.png",),
    ),
    Part(
        "kernel-tests", "the kernels' tests on the GPU",
        (*_MODULE, "gpu_check.run_tests", "{out}", *_KERNEL_TESTS, "-k", "not interpreter and not (sequence_parallel and triton)"), 90, (*_MEGATRON, "pytest", "hypothesis"),
    ),
    Part("train", "a step of ours beside the reference's, bf16", _TRAIN, 150, _MEGATRON, least=60),
    Part(
        "train-fp8", "our step in FP8", (*_TRAIN, "--fp8", "blockwise", "--sides", "ours"), 75, (*_MEGATRON, "transformer-engine"), least=45,
    ),
    Part("gpu-tests", "tests that only a GPU can run", (*_MODULE, "gpu_check.run_tests", "{out}", "-m", "gpu", "tests/gpu"), 300, (*_MEGATRON, "pytest")),
    Part("step", "memory and waits of a step, measured", (*_MODULE, "gpu_check.step", "{out}"), 75, _MEGATRON),
    Part("simulated", "the same step, simulated", (*_MODULE, "gpu_check.simulated", "{out}"), 75, ("torch", "megatron-core")),
    Part("demo", "the demo, every stage on this GPU", (*_MODULE, "gpu_check.demo", "{out}", "{work}/demo"), 150, _MEGATRON, least=60),
    Part("sglang", "SGLang's scores and their speed", (*_MODULE, "gpu_check.sglang", "{out}"), 180, (*_MEGATRON, "sglang"), least=90),
    Part(
        "loss-sizes", "the kernel and the head at other sizes",
        (*_LOSS[:-1], "{work}/loss-sizes", "--tokens", "4096", "32768", "--shards", "1", "4", "--ids", "1", "64", "--repeats", "7"),
        150, (*_MEGATRON, "matplotlib"), keep=("loss-sizes.png",),
    ),
)  # fmt: skip


def environment(part: Part, root: Path = ROOT) -> dict[str, str]:
    """Of the part's process: this checkout's packages before what is installed, output unbuffered, no model hub."""
    paths = [
        str(root),
        *(str(root / name) for name in ("kernels", "tools", "tests/distributed")),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | part.environment
