"""`torch.cuda` of a simulated GPU: the functions that PyTorch, Megatron-Core, Transformer Engine and the project call."""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Callable
from typing import Any

import torch

from megatron_opd.simulate import ledger
from megatron_opd.simulate.devices import GPUS_PER_NODE, Device

_CUDA_VERSION = "13.0"
_RNG_BYTES = 16  # of a CUDA generator's state: seed and offset
_current = 0
_guard: ctypes.CDLL | None = None


class Stream:
    """Work on a simulated GPU is done when the call returns, so ordering needs nothing; waiting for it on the host is written down."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.device, self.device_index, self.device_type = torch.device("cuda", _current), _current, 1
        self.cuda_stream = self.stream_id = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        ledger.note_wait("stream.synchronize")


class Event:
    """See `Stream`."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        ledger.note_wait("event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class _Generator:
    """One of torch.cuda.default_generators."""

    def get_state(self) -> torch.Tensor:
        return torch.zeros(_RNG_BYTES, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        if state.numel() != _RNG_BYTES:
            raise RuntimeError(f"a CUDA generator's state has {_RNG_BYTES} bytes, this has {state.numel()}")

    def graphsafe_get_state(self) -> _Generator:
        return self

    def graphsafe_set_state(self, state: _Generator) -> None:
        pass

    def manual_seed(self, seed: int) -> _Generator:
        return self

    def initial_seed(self) -> int:
        return 0


def use_guard(guard: ctypes.CDLL) -> None:
    """The compiled guard, which is told of the current device."""
    global _guard
    _guard = guard


def current_device() -> int:
    return _current


def set_device(device: Any) -> None:
    global _current
    index = device if isinstance(device, int) else torch.device(device).index
    _current = index or 0
    assert _guard is not None
    _guard.simulated_gpu_set_device(_current)


def _properties(device: Device) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=device.name,
        major=device.capability[0],
        minor=device.capability[1],
        total_memory=device.memory,
        multi_processor_count=device.multiprocessors,
        warp_size=32,
        uuid="00000000-0000-0000-0000-000000000000",
        L2_cache_size=50 << 20,
        is_integrated=0,
        is_multi_gpu_board=0,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10,
        shared_memory_per_multiprocessor=228 << 10,
        gcnArchName="",
    )


def _rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(_RNG_BYTES, dtype=torch.uint8)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def install(device: Device) -> None:
    """Let `torch.cuda` answer as `device`; again for another one."""
    stream, properties = Stream(), _properties(device)
    nothing, yes = _constant(None), _constant(True)
    allocated, peak = lambda *args: ledger.bytes_now(), lambda *args: ledger.bytes_peak()
    replacements: dict[str, Any] = {
        # is there a device, and which
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), yes),
        **dict.fromkeys(("init", "_lazy_init", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_stream"), nothing),
        **dict.fromkeys(("device_count", "_device_count_nvml"), _constant(GPUS_PER_NODE)),
        "is_current_stream_capturing": _constant(False),
        "current_device": current_device,
        "set_device": set_device,
        "device": lambda index: contextlib.nullcontext(),
        "get_device_capability": _constant(device.capability),
        "get_device_name": _constant(device.name),
        "get_device_properties": _constant(properties),
        "get_arch_list": _constant([f"sm_{device.capability[0]}{device.capability[1]}"]),
        # streams
        "Stream": Stream,
        "Event": Event,
        "stream": lambda other: contextlib.nullcontext(),
        **dict.fromkeys(("current_stream", "default_stream"), _constant(stream)),
        "synchronize": lambda *args: ledger.note_wait("cuda.synchronize"),
        # random numbers
        "get_rng_state": _rng_state,
        **dict.fromkeys(("set_rng_state", "manual_seed", "manual_seed_all"), nothing),
        "initial_seed": _constant(0),
        "default_generators": (_Generator(),) * GPUS_PER_NODE,
        # memory
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), peak),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), allocated),
        "memory_stats": lambda *args: {},
        "mem_get_info": lambda *args: (device.memory - ledger.bytes_now(), device.memory),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, replacements[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, nothing)
    inner: Any = torch._C
    inner._cuda_getCurrentRawStream = _constant(0)
    inner._cuda_setStream = nothing
    version: Any = torch.version
    version.cuda = version.cuda or _CUDA_VERSION
