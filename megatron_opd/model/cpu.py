"""Runs the real Megatron-Core on a machine without CUDA, over gloo.

Megatron-Core names `torch.cuda` in a few places that no configuration reaches. `install()` gives the modules named
`megatron.core.*`, and nobody else, a stand-in for those: each is listed below with what needs it. It does nothing where CUDA is
available, and it must run before `megatron.core` is first imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")


class _Nothing:
    """A stream or event: work on a CPU is done when the call returns, so ordering needs nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., _Nothing]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


class _Overlay(types.ModuleType):
    """A module that answers with replacements first and with the real module's attributes otherwise."""

    def __init__(self, target: types.ModuleType, replacements: dict[str, Any]):
        super().__init__(target.__name__)
        self.__dict__.update(replacements, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that reads device="cuda" as the CPU (RNG tracker, DDP buffers, clip_grads) and pins no memory (RoPE)."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_CUDA_REPLACEMENTS: dict[str, Any] = {
    "current_device": lambda: _CPU,  # layers, DDP buffers, optimizer, checkpointing
    "device_count": lambda: 1,  # checkpointing: ranks a node
    "set_device": lambda device: None,
    "synchronize": lambda *args, **kwargs: None,  # pipeline schedules
    "empty_cache": lambda: None,
    "Stream": _Nothing,
    "Event": _Nothing,
    "current_stream": lambda *args: _Nothing(),
    "default_stream": lambda *args: _Nothing(),
    "stream": lambda stream: contextlib.nullcontext(),
    # The "device generator" of a CPU is the default generator.
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
}
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")


def _patch_module(module: types.ModuleType, overlay: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = overlay
    if module.__name__.endswith("tensor_parallel.random"):
        module.__dict__["_get_cuda_rng_state"] = lambda *args, **kwargs: torch.get_rng_state()
        module.__dict__["_set_cuda_rng_state"] = lambda state, *args, **kwargs: torch.set_rng_state(state)
        # Both generators are one here, so this warning would come at every fork.
        logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    elif module.__name__.endswith("moe.moe_utils"):
        # It makes split sizes numbers on their way from the GPU; here they are on the CPU already, and would stay tensors.
        move = module.__dict__["maybe_move_tensor_to_cpu"]
        module.__dict__["maybe_move_tensor_to_cpu"] = lambda tensor, as_numpy=False, record_stream=False: (
            tensor.numpy() if as_numpy and torch.is_tensor(tensor) else move(tensor)
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Patches each `megatron.core` module right after it is executed."""

    def __init__(self, overlay: types.ModuleType):
        self.overlay = overlay

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: types.ModuleType) -> None:
            execute(module)
            _patch_module(module, self.overlay)

        spec.loader.exec_module = execute_and_patch  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _called_from_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def install() -> None:
    """See the module's docstring. Calling it again does nothing."""
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    assert not any(name.startswith("megatron.core") for name in sys.modules), "install() must run before megatron.core is imported"
    # Transformer Engine's optimizer, which Megatron-Core takes where it can be imported, asks for a GPU.
    for name in ("transformer_engine", "transformer_engine_torch"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # an import of it raises ImportError
    # Megatron-Core's jit_fuser is torch.compile, which costs minutes at the start of a small CPU run and gains nothing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    overlay = _Overlay(torch, {"cuda": _Overlay(torch.cuda, _CUDA_REPLACEMENTS), **factories})
    sys.meta_path.insert(0, _Finder(overlay))
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron.core.optimizer compares the string with 'torch.cuda.FloatTensor'.
        result = real_type(self, *args, **kwargs)
        asked_for_name = not args and not kwargs and isinstance(result, str)
        return result.replace("torch.", "torch.cuda.", 1) if asked_for_name and _called_from_megatron() else result

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type = tensor_type  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = tensor_cuda
