"""Peak memory and host waits of what a program does on the GPU."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

_WAITING = re.compile(r"cuda(Stream|Device|Event)Synchronize|^cudaMemcpy$")


def reset_peak(on_gpu: bool) -> None:
    """Peaks count from here, and reserved memory that nobody uses goes back."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def count_waits(run: Callable[[], None], on_gpu: bool) -> Counter[str]:
    """PyTorch's warnings of operations that wait for the GPU, by 'file:line'."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(found.filename).name}:{found.lineno}" for found in caught if "synchronizing CUDA operation" in str(found.message)
    )


def count_calls(run: Callable[[], None], on_gpu: bool) -> Counter[str]:
    """The CUDA runtime's waiting calls and copies by kind, as PyTorch's profiler names them."""
    if not on_gpu:
        run()
        return Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()  # one of the counted cudaDeviceSynchronize
    return Counter(
        {event.key: event.count for event in profile.key_averages() if _WAITING.search(event.key) or event.key.startswith("Memcpy")}
    )
