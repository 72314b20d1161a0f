"""A tensor that keeps its numbers in FP8, as Transformer Engine's quantized parameters do: a write rounds, everything else reads a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map


class Rounded(torch.Tensor):
    """Numbers rounded to e4m3 behind a bfloat16 or float32 face."""

    data_fp8: torch.Tensor

    @staticmethod
    def __new__(cls, data_fp8: torch.Tensor, dtype: torch.dtype) -> Rounded:
        made = torch.Tensor._make_wrapper_subclass(cls, data_fp8.shape, dtype=dtype)
        made.data_fp8 = data_fp8
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            target, source = args
            target.data_fp8.copy_(dequantized(source).to(torch.float8_e4m3fn))
            return target
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_fp8, args[0].dtype)
        return function(*tree_map(dequantized, args), **tree_map(dequantized, kwargs or {}))


def dequantized(value: Any) -> Any:
    return value.data_fp8.to(value.dtype) if isinstance(value, Rounded) else value


def quantize_matrices_(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Make the matrices of the layers FP8 parameters, with what Transformer Engine's have for the making of main weights."""
    made = []
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "weight" and parameter.dim() == 2 and type(module).__name__ in ("ColumnParallelLinear", "RowParallelLinear"):
                exact = torch.full_like(parameter, torch.nan).detach()
                rounded = torch.nn.Parameter(Rounded(torch.zeros(parameter.shape, dtype=torch.float8_e4m3fn), parameter.dtype))
                rounded.get_high_precision_init_val = lambda exact=exact: exact  # pyright: ignore[reportAttributeAccessIssue]
                setattr(module, name, rounded)
                made.append(rounded)
    return made
