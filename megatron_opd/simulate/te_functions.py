"""Compiled functions of Transformer Engine as shapes: products, norms, RoPE, attention, optimizer. Arguments as in its C++ (2.20)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_opd.simulate.arithmetic import SEQUENCES, attention_flops
from megatron_opd.simulate.ledger import note_flops
from megatron_opd.simulate.te_shapes import as_matrix, empty, made_by, require, shape_of, torch_dtype

_CUDNN, _CUBLAS_LT = 92400, 130101  # versions


def stand_ins(module: Any) -> dict[str, Callable[..., Any]]:
    """By the names of the compiled functions; `module` has the enums."""

    def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
        backends = module.NVTE_Fused_Attn_Backend
        if torch.cuda.get_device_capability() < (9, 0):  # fused_attn.cpp: packed sequences (THD) need compute capability 9.0
            return backends.NVTE_No_Backend, "THD needs compute capability 9.0"
        return backends.NVTE_F16_arbitrary_seqlen, ""

    functions = {function.__name__: function for function in _SIMPLE} | {"get_fused_attn_backend": get_fused_attn_backend}
    return (
        functions
        | dict.fromkeys(("thd_second_half_lse_correction", "thd_out_correction", "thd_grad_correction"), _in_place)
        | dict.fromkeys(("multi_tensor_adam", "multi_tensor_adam_param_remainder", "multi_tensor_adam_fp8"), _adam)
        | dict.fromkeys(("multi_tensor_scale", "multi_tensor_scale_tensor"), _multi_tensor_scale)
        | {
            "get_cublasLt_version": lambda: _CUBLAS_LT,
            "get_cudnn_version": lambda: _CUDNN,
            "get_num_cublas_streams": lambda: 4,
            "get_grouped_gemm_setup_workspace_size": lambda count: 1024 * count,
        }
    )


def _in_place(*args: Any) -> None:
    """Writes into its arguments."""


# ---- products ---------------------------------------------------------------------------------------------------------------------------


def _product(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> tuple[int, ...]:
    """Shape of op(b) op(a), as cuBLAS counts in columns."""
    (a_rows, a_columns), (b_rows, b_columns) = as_matrix(shape_of(a)), as_matrix(shape_of(b))
    inner_a, inner_b = (a_columns if transpose_a else a_rows), (b_rows if transpose_b else b_columns)
    require(
        inner_a == inner_b,
        f"product of {shape_of(a)} (transposed: {transpose_a}) and {shape_of(b)} (transposed: {transpose_b}): {inner_a} and {inner_b}",
    )
    out = (*((b_columns,) if transpose_b else shape_of(b)[:-1]), a_rows if transpose_a else a_columns)
    rows, columns = as_matrix(out)
    note_flops(2 * rows * columns * inner_a)
    return out


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any, gelu: bool, gelu_in: Any,
    grad: bool, workspace: Any, workspace_size: int, accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> list[Any]:  # fmt: skip
    if gelu or comm_overlap is not None:
        raise NotImplementedError("products with GELU or with overlapped communication are not simulated")
    out = _product(A, transA, B, transB)
    if D is None:
        D = made_by(quantizer, out, torch_dtype(output_dtype) if output_dtype is not None else torch.bfloat16)
    else:
        require(as_matrix(shape_of(D)) == as_matrix(out), f"output {shape_of(D)} for a product of {out}")
    bias_gradient = empty(shape_of(B)[-1], dtype=torch_dtype(bias_type)) if grad and bias is not None else None
    return [D, bias_gradient, None, None]


def te_general_grouped_gemm(
    A: Sequence[Any], transa: bool, B: Sequence[Any], transb: bool, D: Any, D_type: Any, m_splits: Any, bias: Any, bias_type: Any, single_output: bool,
    pre_gelu_out: Any, grad: bool, workspace: Any, workspaceSize: int, accumulate: bool, use_split_accumulator: bool, math_sm_count: int,
) -> Any:  # fmt: skip
    outs = [_product(a, transa, b, transb) for a, b in zip(A, B, strict=True)]
    if D is None:
        for out in outs:
            empty(*out, dtype=torch_dtype(D_type))
    elif single_output:
        rows = sum(as_matrix(out)[0] for out in outs)
        require(rows == as_matrix(shape_of(D[0]))[0], f"output {shape_of(D[0])} for products of {rows} rows")
    else:
        for given, out in zip(D, outs, strict=True):
            require(as_matrix(shape_of(given)) == as_matrix(out), f"output {shape_of(given)} for a product of {out}")
    return bias


# ---- norms and RoPE ---------------------------------------------------------------------------------------------------------------------


def rmsnorm_fwd(
    input: Any, weight: Any, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int, zero_centered_gamma: bool
) -> list[Any]:
    require(input.is_contiguous(), f"rmsnorm_fwd: an input {shape_of(input)} that is not contiguous")
    out = ln_out if ln_out is not None else made_by(quantizer, shape_of(input), torch_dtype(otype))
    return [out, None, empty(as_matrix(shape_of(input))[0], dtype=torch.float32)]


def rmsnorm_bwd(dz: Any, x: Any, rsigma: Any, gamma: Any, sm_margin: int, zero_centered_gamma: bool) -> list[Any]:
    return [torch.empty_like(x), torch.empty_like(gamma)]


def fused_rope_forward(
    input: Any, freqs: Any, start_positions: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Any, cp_size: int, cp_rank: int
) -> Any:
    require(freqs.dim() == 4 and freqs.dtype == torch.float32, f"RoPE frequencies {shape_of(freqs)} {freqs.dtype}")
    return empty(*shape_of(input), dtype=input.dtype)


def fused_rope_backward(
    output_grads: Any, freqs: Any, start_positions: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Any, cp_size: int, cp_rank: int
) -> Any:
    return empty(*shape_of(output_grads), dtype=output_grads.dtype)


# ---- attention --------------------------------------------------------------------------------------------------------------------------


def _note_attention(q: torch.Tensor, k: torch.Tensor, mask: Any, *, products: int) -> None:
    note_flops(attention_flops(q, k.shape[0], SEQUENCES, products=products, causal="CAUSAL" in mask.name))


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float, set_zero: bool, qkv_layout: Any, o_format: Any,
    qkv_scale_inv_format: Any, bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any, bottom_right_diagonal: Any,
    cu_seqlens_q: Any, cu_seqlens_kv: Any, Q: Any, K: Any, V: Any, fake_dtype: Any, cu_seqlens_q_padded: Any, cu_seqlens_kv_padded: Any,
    page_table_k: Any, page_table_v: Any, s_quantizer: Any, o_quantizer: Any, Bias: Any, SoftmaxOffset: Any, rng_gen: Any, rng_elts_per_thread: int,
    return_max_logit: bool, cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    require(cu_seqlens_q.dtype == torch.int32, f"cu_seqlens_q is {cu_seqlens_q.dtype}, int32 is expected")
    require(K.shape == V.shape, f"keys {shape_of(K)} and values {shape_of(V)}")
    _note_attention(Q, K, attn_mask_type, products=2)
    out = [empty(*Q.shape[:-1], V.shape[-1], dtype=Q.dtype)]
    if is_training:  # softmax statistics [T,H,1], and the state of the random numbers
        out += [empty(Q.shape[0], Q.shape[-2], 1, dtype=torch.float32), empty(2, dtype=torch.int64)]
    return out


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, set_zero: bool, qkv_layout: Any, o_format: Any, do_format: Any,
    dqkv_layout: Any, qkv_scale_inv_format: Any, do_scale_inv_format: Any, bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any,
    bottom_right_diagonal: Any, deterministic: bool, cu_seqlens_q: Any, cu_seqlens_kv: Any, Q: Any, K: Any, V: Any, O: Any, dO: Any,  # noqa: E741
    fake_dtype: Any, Aux_CTX_Tensors: Any, cu_seqlens_q_padded: Any, cu_seqlens_kv_padded: Any, s_quantizer: Any, dp_quantizer: Any,
    dqkv_quantizer: Any, cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    _note_attention(Q, K, attn_mask_type, products=5)
    workspace = empty(Q.numel(), dtype=torch.float32)  # cuDNN accumulates the queries' gradient in fp32: at least this
    del workspace
    return [torch.empty_like(Q), torch.empty_like(K), torch.empty_like(V), None, None]


# Under context parallelism a rank has two chunks of every sequence, so halves of its pack.


def thd_read_half_tensor(tensor: Any, cu_seqlens: Any, half_idx: int) -> Any:
    shape = list(shape_of(tensor))
    shape[0 if tensor.dim() == 3 else 1] //= 2
    return empty(*shape, dtype=tensor.dtype)


def thd_read_second_half_lse(lse: Any, cu_seqlens: Any, lse_packed: bool, second_half_lse_seqlen: int) -> Any:
    shape = shape_of(lse)
    return empty(shape[0], shape[1] // 2, dtype=lse.dtype) if lse_packed else empty(*shape[:2], second_half_lse_seqlen, dtype=lse.dtype)


# ---- many tensors at once ---------------------------------------------------------------------------------------------------------------


def multi_tensor_l2norm(chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor_python: bool) -> tuple[Any, Any]:
    require(noop_flag.dtype == torch.int32, f"noop_flag is {noop_flag.dtype}, int32 is expected")
    norms = torch.zeros(len(tensor_lists[0]) if per_tensor_python else 0, device="cuda")
    return torch.zeros(1, dtype=torch.float32, device="cuda"), norms


def _multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: Any) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        require(source.shape == target.shape, f"multi_tensor_scale: {shape_of(source)} into {shape_of(target)}")


def _adam(chunk_size: int, noop_flag: Any, tensor_lists: Any, lr: float, *rest: Any) -> None:
    """4 or 5 lists: gradients, parameters, both moments, and with main weights of their own those."""
    require(len(tensor_lists) in (4, 5), f"Adam of {len(tensor_lists)} lists")
    for row in zip(*tensor_lists, strict=True):
        require(len({tensor.numel() for tensor in row}) == 1, f"Adam of tensors of several sizes: {[shape_of(tensor) for tensor in row]}")
        require(all(tensor.is_contiguous() for tensor in row), "Adam of a tensor that is not contiguous")
    require(isinstance(lr, float), f"Adam with a learning rate {lr!r}")


_SIMPLE: tuple[Callable[..., Any], ...] = (
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    fused_rope_forward,
    fused_rope_backward,
    fused_attn_fwd,
    fused_attn_bwd,
    thd_read_half_tensor,
    thd_read_second_half_lse,
    multi_tensor_l2norm,
)
