"""Which attention a GPU gets: Transformer Engine's, or PyTorch's where Transformer Engine would hold all S x S scores.

Transformer Engine takes the first of FlashAttention (a package of its own), cuDNN's fused attention and an unfused one that can do what it is
asked for, and says nothing of it. For packed sequences cuDNN's needs compute capability 9.0 (Hopper); with deterministic kernels on Hopper
it is left out where the work is large. So its own chooser is asked at the start. Source: `get_attention_backend` in Transformer Engine's
`pytorch/attention/dot_product_attention/utils.py` (2.20.2).

Legend: S packed tokens.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from megatron_opd.errors import UserError
from megatron_opd.model.architecture import Architecture

Kind = Literal["FlashAttention", "cuDNN's fused attention", "unfused attention"]
_FLASH = "install flash-attn (pip install flash-attn --no-build-isolation)"


@dataclass(frozen=True)
class CoreAttention:
    """`ours`: our packed attention takes the place of Transformer Engine's within its layers. `why` is for people."""

    ours: bool
    why: str


def choose_attention(
    kind: Kind | None,
    *,
    capability: tuple[int, int],
    cp: int,
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    has_flash: bool = False,
) -> CoreAttention:
    """`kind`: what Transformer Engine would take, None where this version can't be asked; `has_flash`: flash-attn is installed.

    Raises UserError where nothing would do.
    """
    dotted = ".".join(map(str, capability))
    fault = "Transformer Engine would take unfused attention, which holds all S x S scores"
    if kind is None:
        if capability >= (9, 0) or has_flash:
            reason = "flash-attn is installed" if has_flash else f"compute capability {dotted} has a fused one"
            return CoreAttention(False, f"Transformer Engine's; this version can't be asked which, {reason}")
        fault = "this version of Transformer Engine can't be asked which attention it would take, and without flash-attn it may hold all S x S scores"
    elif kind != "unfused attention":
        return CoreAttention(False, f"Transformer Engine's: {kind}")
    fault += f" (compute capability {dotted}{', deterministic' if deterministic else ''})"
    remedy = _FLASH
    if dtype == torch.float32:
        fault += " in float32"
        remedy = 'set dtype = "bfloat16"'
    elif capability < (9, 0):
        remedy += ", or train on GPUs of compute capability 9.0 or higher"
    elif deterministic:
        remedy += ", or set deterministic = false"
    if cp > 1:
        raise UserError(f"parallel.cp = {cp}: {fault}; set cp = 1, {remedy}")
    return CoreAttention(True, f"PyTorch's, as {fault}; to have Transformer Engine's, {remedy}")


def core_attention(
    arch: Architecture, *, tp: int, cp: int, dtype: torch.dtype, deterministic: bool, longest: int | None = None
) -> CoreAttention:
    """The choice for this machine, which must have a GPU and Transformer Engine.

    longest: tokens of the longest sequence (None: as many as the model takes). Raises UserError for context parallelism without any.
    """
    kind = ask_transformer_engine(
        num_heads=arch.num_heads // tp,
        num_kv_heads=arch.num_kv_heads // tp,
        head_dim=arch.head_dim,
        cp=cp,
        dtype=dtype,
        deterministic=deterministic,
        longest=longest or arch.max_positions,
    )
    return choose_attention(
        kind,
        capability=torch.cuda.get_device_capability(),
        cp=cp,
        deterministic=deterministic,
        dtype=dtype,
        has_flash=importlib.util.find_spec("flash_attn") is not None,
    )


def ask_transformer_engine(
    *, num_heads: int, num_kv_heads: int, head_dim: int, cp: int, dtype: torch.dtype, deterministic: bool, longest: int
) -> Kind | None:
    """What Transformer Engine would take for a rank's share of packed causal sequences: the slowest, if that hangs on how many there are.

    None: its chooser is not where this was written for.
    """
    try:
        from transformer_engine.pytorch.attention.dot_product_attention import utils  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    known = {field.name for field in fields(utils.AttentionParams)}
    asked: dict[str, Any] = {
        "qkv_type": torch.Tensor,
        "qkv_dtype": dtype,
        "qkv_layout": "thd_thd_thd",
        "num_heads": num_heads,
        "num_gqa_groups": num_kv_heads,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "num_tokens_q": longest,
        "num_tokens_kv": longest,
        "head_dim_qk": head_dim,
        "head_dim_v": head_dim,
        "attn_mask_type": "padding_causal",
        "window_size": (-1, 0),
        "context_parallel": cp > 1,
        "cp_size": cp,
        "deterministic": deterministic,
    }
    kinds: list[Kind] = []
    # Deterministic kernels are left out where sequences x heads x longest^2 is large, and a pack may have many beside a long one.
    for sequences in (1, longest) if deterministic else (1,):
        params = {name: value for name, value in asked.items() if name in known} | {"batch_size": sequences}
        flash, _, fused, *_ = utils.get_attention_backend(utils.AttentionParams(**params))
        kinds.append("FlashAttention" if flash else "cuDNN's fused attention" if fused else "unfused attention")
    return kinds[-1]
