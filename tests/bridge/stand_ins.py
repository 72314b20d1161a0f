"""Importing this makes the imports of megatron-bridge succeed on a CPU; it must come before `megatron.core`.

Transformer Engine is stood in for: its modules can be imported, its layers hold parameters under its names, and nothing computes.
megatron-bridge imports that package without asking whether it is there, and names parameters as its layers do; conversion copies
parameters, so layers without a forward pass (calling one raises NotImplementedError) are enough.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import typing
from typing import Any

import torch

VERSION = "2.10.0"  # the oldest that megatron-bridge 0.3.1 asks for
_ROOT = "transformer_engine"


class _Layer(torch.nn.Module):
    """Anything without parameters."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__()

    def get_extra_state(self) -> torch.Tensor:
        """Empty, as without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


class RMSNorm(_Layer):
    def __init__(self, *, params_dtype: torch.dtype, **options: Any):
        super().__init__()
        size = options["normalized_shape" if "normalized_shape" in options else "hidden_size"]  # Megatron-Core 0.19 has the first
        self.weight = _parameter(size, dtype=params_dtype)


class Linear(_Layer):
    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp_size: int, params_dtype: torch.dtype, **options: Any):
        assert tp_size == 1
        super().__init__()
        self.weight = _parameter(out_features, in_features, dtype=params_dtype)
        self.bias = _parameter(out_features, dtype=params_dtype) if bias else None


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, params_dtype: torch.dtype, **options: Any):
        super().__init__(in_features, out_features, params_dtype=params_dtype, **options)
        self.layer_norm_weight = _parameter(in_features, dtype=params_dtype)


class GroupedLinear(_Layer):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, tp_size: int, params_dtype: torch.dtype, **options: Any
    ):
        assert tp_size == 1
        assert not bias
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for gemm in range(num_gemms):
            self.register_parameter(f"weight{gemm}", _parameter(out_features, in_features, dtype=params_dtype))

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass


def _parameter(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype))  # what is not filled differs from everything


class _Module(types.ModuleType):
    """A module that has every name: a class where it is capitalised, a submodule (which can't be called) otherwise."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.lstrip("_")[:1].isupper():
            value: Any = type(name, (_Layer,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == _ROOT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == _ROOT:
            module.__dict__["__version__"] = VERSION
        elif module.__name__ == f"{_ROOT}.pytorch":
            module.__dict__.update(RMSNorm=RMSNorm, Linear=Linear, LayerNormLinear=LayerNormLinear, GroupedLinear=GroupedLinear)
        elif module.__name__ == f"{_ROOT}.pytorch.cpu_offload":  # asked for by every model that is built
            module.__dict__["get_cpu_offload_context"] = lambda *args, **options: (None, None)


assert not any(name.startswith("megatron.core") for name in sys.modules)
sys.meta_path.insert(0, _Finder())
importlib.import_module(_ROOT)  # already imported: megatron_opd.model hides, on a CPU, one that is not
if not hasattr(typing, "override"):  # a decorator of Python 3.12 that megatron-bridge 0.6 uses; it does nothing at run time
    typing.override = lambda method: method  # pyright: ignore[reportAttributeAccessIssue]
