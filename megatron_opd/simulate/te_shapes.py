"""Shapes, dtypes and empty tensors for the stand-in of Transformer Engine's compiled half."""

from __future__ import annotations

import math
from typing import Any

import torch

CUDA = "cuda"  # the current device
TORCH_DTYPES: dict[int, torch.dtype] = {}  # Transformer Engine's DType -> torch's; filled when the module is made


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Of a tensor, or of quantized storage, which is none."""
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else tuple(tensor.size())


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns): all dimensions but the last are rows."""
    return math.prod(shape[:-1]), shape[-1]


def torch_dtype(kind: Any) -> torch.dtype:
    return kind if isinstance(kind, torch.dtype) else TORCH_DTYPES[int(kind)]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def made_by(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """An output: quantized if there is a quantizer."""
    return empty(*shape, dtype=dtype) if quantizer is None else quantizer.make_empty(shape, dtype=dtype, device=CUDA)


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def require(condition: bool, message: str) -> None:
    """Raise as a compiled function does that is called with what does not fit together."""
    if not condition:
        raise RuntimeError(message)
