"""Memory and host waits of optimizer steps on the GPU: `python -m gpu_check.step OUTPUT.json [--tiny]`.

The step of step_shape.py, made as `train` makes it. Waits are PyTorch's own warnings of its synchronising operations
(torch.cuda.set_sync_debug_mode), with their places; beside them stand what its profiler counts of the CUDA runtime's waiting calls and
of copies by kind, which includes those of Transformer Engine. `--tiny`: a small model, to see on a CPU that the program works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_train  # pyright: ignore[reportMissingImports]  tools/ is on this program's path
import torch

from megatron_opd.model import parallel
from megatron_opd.recipe.files import load_recipe
from megatron_opd.train.loss import make_loss
from megatron_opd.train.step import train_step

from . import step_shape as shape
from .waits import count_calls, count_waits, reset_peak

_WARM = 2  # steps before what is measured: lazily made state, the kernels' compilation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", type=Path, metavar="CONFIG", help="config.json of a small model instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.tiny)
    args.output.write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if not isinstance(value, dict)}, indent=1))


def measure(folder: Path, tiny: Path | None) -> dict[str, Any]:
    """Bytes, waits and seconds; on a CPU those of them that it has."""
    layers, lengths = (1, [64, 64]) if tiny else (shape.LAYERS, shape.LENGTHS)
    steps = _WARM + 2
    model, store = folder / "model", folder / "store"
    bench_train.make_model(model, str(tiny) if tiny else shape.MODEL, layers)
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    prompt = shape.PROMPT if not tiny else 16
    bench_train.make_store(store, values["vocab_size"], [(prompt, length) for length in lengths] * shape.MICRO_BATCHES * steps)
    config: Any = load_recipe(shape.RECIPE, shape.OVERRIDES).train
    budget = sum(lengths)
    config = config.model_copy(
        update={"init": str(model), "store": str(store), "output": str(folder / "out"), "micro_batch_tokens": budget, "steps": steps}
    )
    trainee, arch, source, device = bench_train.prepare(config)
    loss, on_gpu = make_loss(config.loss), device.type == "cuda"
    reset_peak(on_gpu)
    losses = []

    def step(number: int) -> None:
        batches = bench_train.read_batches(source, number, device)
        assert [batch.num_tokens for batch in batches] == [budget] * shape.MICRO_BATCHES
        result = train_step(trainee, arch, loss, batches, seed=number, chunk_tokens=config.chunk_tokens)
        losses.append(result.sums.loss / result.sums.denominator)

    for number in range(_WARM):
        step(number)
    reset_peak(on_gpu)
    begin = time.perf_counter()
    waits = count_waits(lambda: step(_WARM), on_gpu)
    seconds = time.perf_counter() - begin
    memory = {"peak_bytes": None, "reserved_bytes": None, "other_bytes": None}
    if on_gpu:
        reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        memory = {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": reserved,
            "other_bytes": total - free - torch.cuda.memory_reserved(),
        }
    calls = count_calls(lambda: step(_WARM + 1), on_gpu)
    parallel.stop()
    layers_by = "Transformer Engine" if _uses_te(trainee.chunks[0]) else "local layers"
    return {
        "settings": None if tiny else shape.SETTINGS,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "layers_by": layers_by,
        "parameters": arch.num_parameters,
        "seconds": seconds,
        "loss": losses[0],
        **memory,
        "waits_total": sum(waits.values()) if on_gpu else None,
        "waits": dict(waits.most_common()),
        "calls": dict(calls.most_common()),
    }


def _uses_te(module: torch.nn.Module) -> bool:
    """Megatron-Core's layers on it are subclasses of its own."""
    return any(base.__module__.startswith("transformer_engine") for part in module.modules() for base in type(part).__mro__)


if __name__ == "__main__":
    main()
