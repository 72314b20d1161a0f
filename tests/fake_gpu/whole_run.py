"""The whole `sft` and `train` of train/loop.py on a simulated GPU: readiness, store, weights, loop, metrics, NVML, saves, and a resume."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkpoint_shapes


@contextlib.contextmanager
def files_are_real(lengths: list[int]) -> Iterator[None]:
    """Weights and batches are read as real tensors, which become shapes on their way to the GPU; `lengths` gets the pack's."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from megatron_opd.convert.hf_files import HfTensors
    from megatron_opd.simulate.gpu import replaced
    from megatron_opd.train.batches import BatchSource

    read, build = HfTensors.read, BatchSource.build

    def read_real(self: Any, name: str) -> Any:
        with unset_fake_temporarily():
            return read(self, name)

    def build_real(self: Any, *args: Any) -> Any:
        with unset_fake_temporarily():
            made = build(self, *args)
        lengths[:] = [made.tokens.shape[1] * self.config.parallel.cp]
        return made

    with replaced(HfTensors, "read", read_real), replaced(BatchSource, "build", build_real):
        yield


def install_nvml(num_gpus: int = 8) -> None:
    """The calls that cost/meter.py makes; energy in millijoules."""
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = lambda: num_gpus
    nvml.nvmlDeviceGetHandleByIndex = nvml.nvmlDeviceGetHandleByUUID = lambda which: which
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1000
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=1 << 30)
    sys.modules["pynvml"] = nvml


@contextlib.contextmanager
def saves_without_tensors(shelf: checkpoint_shapes.Shelf) -> Iterator[None]:
    """A save stops where the tensors' files would be written, and is published; what is read of such files is taken as it is.

    What the first rank does for all, this one does: there is no other.
    """
    from megatron_opd.simulate.gpu import replaced
    from megatron_opd.train import checkpoint, loop

    real = checkpoint.CheckpointWriter.save

    def save(self: Any, trainee: Any, state: dict[str, Any]) -> Path:
        with contextlib.suppress(checkpoint_shapes.Shelved):
            real(self, trainee, state)
        self._publish_alone(shelf.folder, state)
        self._saving = None
        return checkpoint.checkpoint_folder(self.output) / checkpoint.step_name(state["step"])

    with (
        replaced(checkpoint.CheckpointWriter, "save", save),
        replaced(loop, "find_fault", lambda folder: None),
        replaced(loop, "on_first_rank", lambda function: function()),
    ):
        yield


@contextlib.contextmanager
def steps_are_watched(ledger: Any) -> Iterator[list[Counter[str]]]:
    """Yields counts of all waits and slow copies so far: at the start of each step and, at last, at the end of the run."""
    from megatron_opd.simulate.gpu import replaced
    from megatron_opd.train import loop

    counts: list[Counter[str]] = []
    real = loop.train_step

    def look() -> None:
        slow = {text: number for text, number in ledger.copies.items() if "pinned async" not in text}
        counts.append(Counter(ledger.waits) + Counter(slow))

    def step(*args: Any, **kwargs: Any) -> Any:
        look()
        return real(*args, **kwargs)

    with replaced(loop, "train_step", step):
        yield counts
    look()


def run(recipe: Any, stage: str, *, rank: int, size: int, shelf: checkpoint_shapes.Shelf) -> list[dict[str, int]]:
    """One start of a stage, from its checkpoint if it has one. Returns waits and slow copies of each step, up to the next or the end."""
    from megatron_opd.simulate.gpu import world
    from megatron_opd.simulate.stand_ins import stand_ins
    from megatron_opd.train import loop

    install_nvml()
    config = getattr(recipe, stage)
    lengths: list[int] = [0]
    with world(rank=rank, size=size) as ledger:
        import torch

        from megatron_opd.model.architecture import read_architecture

        arch = read_architecture(config.init)
        # The host reads 1 where sums are, so that means are numbers, and else 0.
        ledger.scalar = lambda tensor: 1.0 if tensor.dtype == torch.float64 else 0.0 if tensor.is_floating_point() else 0
        with (
            stand_ins(ledger, arch, config, lengths),
            files_are_real(lengths),
            saves_without_tensors(shelf),
            steps_are_watched(ledger) as counts,
        ):
            {"sft": loop.run_sft, "train": loop.run_train}[stage](recipe)
        return [dict(after - before) for before, after in pairwise(counts)]
