"""Weight gradients added up in float32 by the matrix product itself, where a library has that, so that none is rounded to 16 bits first.

Otherwise each micro-batch's gradient of a matrix is made in 16 bits, and Megatron-Core's data-parallel wrapper adds it to the sum. The
fused product adds to the sum (`main_grad`) and hands autograd a stand-in, which the wrapper's hook leaves out. The LM head always
adds so (`opd_kernels.linear_loss`). The embedding's gradient is no matrix product, and those of norms and routers are small: they stay
as they were. Sources: `fuse_wgrad_accumulation` in Transformer Engine's linear layers, `gradient_accumulation_fusion` in
Megatron-Core's `tensor_parallel/layers.py`, which needs apex.
"""

from __future__ import annotations

from typing import Literal

import torch

Fusion = Literal["Transformer Engine", "apex"]


def choose_fusion(*, dtype: torch.dtype, on_gpu: bool, transformer_engine: bool, apex: bool) -> Fusion | None:
    """Whose product adds to the sum: that of the library whose layers these are. In float32 nothing is rounded, and none is needed."""
    if not on_gpu or dtype == torch.float32:
        return None
    return "Transformer Engine" if transformer_engine else "apex" if apex else None


def has_apex() -> bool:
    """Whether apex is here with the product that adds to its result; Megatron-Core looks for the same."""
    from megatron.core.tensor_parallel import layers

    return bool(layers._grad_accum_fusion_available)


def fuse_accumulation_(model: torch.nn.Module) -> int:
    """Let Transformer Engine's linear layers of `model` add to `main_grad`; returns how many they are.

    After they were built, as Megatron-Core's field for it is refused by its vocabulary layer where apex is missing, though that layer's
    gradient is made by our LM head.
    """
    layers = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True  # pyright: ignore[reportArgumentType]
    return len(layers)
