"""Compiled functions of Transformer Engine as shapes: tensors in FP8, by tensor, by block of 128 and by block of 32 (MXFP8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_opd.simulate.te_shapes import CUDA, as_matrix, empty, require, shape_of, torch_dtype, up

_BLOCK = 128  # values with one scale, of blockwise scaling


def stand_ins() -> dict[str, Callable[..., Any]]:
    """By the names of the compiled functions."""
    in_place = (
        "fused_amax_and_scale_update_after_reduction",
        "compute_amax",
        "mxfp8_scaling_compute_partial_amax",
        "mxfp8_scaling_partial_cast",
    )
    return {function.__name__: function for function in _FUNCTIONS} | dict.fromkeys(in_place, _in_place)


def _in_place(*args: Any) -> None:
    """Writes into its arguments."""


def create_empty_quantized_tensor(quantizer: Any, size: Sequence[int], kind: torch.dtype, device: Any, pin_memory: bool) -> Any:
    """Data and scales by rows, by columns or both, as the quantizer is asked for."""
    shape, make = tuple(size), _MAKERS.get(type(quantizer).__name__)
    if make is None:
        raise NotImplementedError(f"tensors of a {type(quantizer).__name__} are not simulated")
    return make(quantizer, shape, kind, device)


def _bytes(shape: Sequence[int], device: Any) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.uint8, device=device)


def _scales(shape: Sequence[int], device: Any) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device=device)


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def _by_tensor(quantizer: Any, shape: tuple[int, ...], kind: torch.dtype, device: Any) -> Any:
    """One scale. Before Blackwell products take rows alone, so data by columns are a transposed copy."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor, Float8TensorStorage  # pyright: ignore[reportMissingImports]

    copied = quantizer.columnwise_usage and torch.cuda.get_device_capability() < (10, 0)
    fields: dict[str, Any] = {
        "data": _bytes(shape, device) if quantizer.rowwise_usage or not copied else None,
        "data_transpose": _bytes(_transposed(shape), device) if copied else None,
        "fp8_scale_inv": _scales((1,), device),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**fields, fake_dtype=kind)
    return Float8Tensor(shape=shape, dtype=kind, **fields, device=device)


def _by_block(quantizer: Any, shape: tuple[int, ...], kind: torch.dtype, device: Any) -> Any:
    """A scale for each 128 values of a row, or for each block of 128 x 128."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (  # pyright: ignore[reportMissingImports]
        Float8BlockwiseQTensor,
        Float8BlockwiseQTensorStorage,
    )

    rows, columns = as_matrix(shape)
    square = quantizer.block_scaling_dim == 2
    row_blocks, column_blocks = up(rows, _BLOCK) // _BLOCK, up(columns, _BLOCK) // _BLOCK
    by_row = (row_blocks, up(column_blocks, 4)) if square else (column_blocks, up(rows, 4))
    by_column = (column_blocks, up(row_blocks, 4)) if square else (row_blocks, up(columns, 4))
    row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
    fields: dict[str, Any] = {
        "rowwise_data": _bytes(shape, device) if row else None,
        "rowwise_scale_inv": _scales(by_row, device) if row else None,
        "columnwise_data": _bytes(_transposed(shape), device) if column else None,
        "columnwise_scale_inv": _scales(by_column, device) if column else None,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": square,
    }
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(**fields, fake_dtype=kind)
    return Float8BlockwiseQTensor(shape=shape, dtype=kind, **fields, device=device)


def _by_small_block(quantizer: Any, shape: tuple[int, ...], kind: torch.dtype, device: Any) -> Any:
    """MXFP8: a scale of one byte for each 32 values; data by columns are not transposed."""
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor, MXFP8TensorStorage  # pyright: ignore[reportMissingImports]

    row, column = quantizer.rowwise_usage, quantizer.columnwise_usage
    fields: dict[str, Any] = {
        "rowwise_data": _bytes(shape, device) if row else None,
        "rowwise_scale_inv": _bytes(quantizer.get_scale_shape(shape, False), device) if row else None,
        "columnwise_data": _bytes(shape, device) if column else None,
        "columnwise_scale_inv": _bytes(quantizer.get_scale_shape(shape, True), device) if column else None,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "with_gemm_swizzled_scales": bool(getattr(quantizer, "optimize_for_gemm", False)),
    }
    if quantizer.internal:
        return MXFP8TensorStorage(**fields, fake_dtype=kind)
    return MXFP8Tensor(shape=shape, dtype=kind, **fields, device=device)


_MAKERS: dict[str, Callable[..., Any]] = {
    "Float8Quantizer": _by_tensor,
    "Float8CurrentScalingQuantizer": _by_tensor,
    "Float8BlockQuantizer": _by_block,
    "MXFP8Quantizer": _by_small_block,
}


def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    return output if output is not None else quantizer.make_empty(shape_of(tensor), dtype=tensor.dtype, device=CUDA)


def dequantize(input: Any, otype: Any) -> Any:
    return empty(*shape_of(input), dtype=torch_dtype(otype))


def split_quantize(
    tensor: Any, split_sections: Sequence[int], quantizer_list: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    rows, columns = as_matrix(shape_of(tensor))
    require(sum(split_sections) == rows, f"split_quantize: parts of {sum(split_sections)} rows of {rows}")
    pairs = zip(split_sections, quantizer_list, strict=True)
    return [quantizer.make_empty((part, columns), dtype=tensor.dtype, device=CUDA) for part, quantizer in pairs]


def multi_tensor_quantize(tensor_list: Sequence[Any], quantizer_list: Sequence[Any]) -> list[Any]:
    pairs = zip(tensor_list, quantizer_list, strict=True)
    return [quantizer.make_empty(shape_of(tensor), dtype=tensor.dtype, device=CUDA) for tensor, quantizer in pairs]


def fp8_transpose(input: Any, dtype: Any, *, out: Any = None) -> Any:
    return out if out is not None else _bytes(_transposed(shape_of(input)), CUDA)


def swap_first_dims(tensor: Any, *, out: Any = None) -> Any:
    first, second, *rest = shape_of(tensor)
    require(out is None or out.numel() == math.prod(shape_of(tensor)), f"swap_first_dims: {shape_of(tensor)}")
    return out if out is not None else empty(second, first, *rest, dtype=tensor.dtype)


def fp8_block_scaling_compute_partial_amax(tensor: Any, amax: Any, h: int, w: int, start_offset: int, block_len: int) -> None:
    wanted = (up(h, block_len) // block_len, up(w, block_len) // block_len)
    require(tuple(amax.shape) == wanted, f"largest values {tuple(amax.shape)} for blocks {wanted}")


def fp8_block_scaling_partial_cast(
    inp: Any, out: Any, scale: Any, h: int, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    require(inp.numel() == out.numel(), f"cast of {shape_of(inp)} into {shape_of(out)}")


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop_flag: Any, tensor_lists: Any, max_fp8: float, force_pow_2_scales: bool, epsilon: float
) -> None:
    require(len(tensor_lists) == 3, f"{len(tensor_lists)} lists, 3 are expected: largest values, scales, their inverses")


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    create_empty_quantized_tensor,
    quantize,
    dequantize,
    split_quantize,
    multi_tensor_quantize,
    fp8_transpose,
    swap_first_dims,
    fp8_block_scaling_compute_partial_amax,
    fp8_block_scaling_partial_cast,
    multi_tensor_compute_scale_and_scale_inv,
)
