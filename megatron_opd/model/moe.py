"""Mixture of experts (Qwen3-MoE) in Megatron-Core: the router's arithmetic, where the experts live, and the marks on their parameters.

An expert is never cut by tensor parallelism: its width is small (768 in Qwen3-30B-A3B), so whole experts are spread over the ranks.
There is no load-balancing loss: the student starts from a balanced router, and an auxiliary loss would pull it off the teacher's
distribution, which is all that distillation asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_opd.model.architecture import Architecture
from megatron_opd.recipe.layout import ParallelConfig

# 0.16.1 imports the name only where Transformer Engine is, and then asks whether it is None.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


def moe_options(arch: Architecture, parallel: ParallelConfig, *, grouped: bool) -> dict[str, Any]:
    """TransformerConfig's fields for a mixture; `grouped`: one grouped matrix product for all experts of a rank (Transformer Engine)."""
    if not arch.num_experts:
        return {}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.ffn_size,
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped and _permutes(),  # without, two waits a layer for how many tokens were selected
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": 1,
        # Softmax over the chosen logits is the softmax over all of them, divided by the chosen ones' sum.
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not arch.renormalized_router,
        "moe_router_dtype": "fp32",  # transformers too takes the softmax in float32
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _permutes() -> bool:
    """Whether Transformer Engine has kernels that sort tokens by expert (2.1 and later); Megatron-Core asks for all of them."""
    names = (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
    )
    return all(getattr(moe_utils, name, None) is not None for name in names)


def mark_experts(model: torch.nn.Module) -> None:
    """Mark experts' parameters as reduced over the expert-data-parallel group alone, also where ep is 1.

    Megatron-Core marks them only where ep > 1. With ep 1 and tp > 1 each tensor-parallel rank routes its own tokens to its own copy of
    the experts, so without the mark its gradients would miss the other ranks' tokens; and the optimizer would be built of one part, not
    two, so that checkpoints could not move between ep 1 and more.
    """
    for module in model.modules():
        if isinstance(module, (SequentialMLP, TEGroupedMLP)):
            for parameter in module.parameters():
                parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
