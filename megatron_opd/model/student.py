"""Builds the student for this rank: Megatron-Core's GPTModel, stopped before the LM head, which the loss applies to chosen rows.

Legend: S packed tokens, N chosen rows, H hidden size, V vocabulary columns of this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from opd_kernels import ChunkLoss, linear_loss, topk_overlap
from opd_kernels.linear import Observer

from megatron_opd.errors import UserError
from megatron_opd.model.accumulation import Fusion, choose_fusion, fuse_accumulation_, has_apex
from megatron_opd.model.architecture import MADE_IN_PLACE, Architecture
from megatron_opd.model.attention import core_attention
from megatron_opd.model.fp8 import fp8_options, this_machine, uses_transformer_engine
from megatron_opd.model.layers import PackedAttention, RMSNorm, varlen_attention
from megatron_opd.model.moe import mark_experts, moe_options
from megatron_opd.model.rope import rotation
from megatron_opd.recipe.layout import Fp8Config, ParallelConfig
from megatron_opd.recipe.training_stages import TrainerConfig

logger = logging.getLogger(__name__)


class Student(GPTModel):
    """A GPTModel whose last stage returns hidden states [S(/tp with sequence parallel),1,H] after the final norm.

    `linear_loss` then applies the LM head and the loss to the rows that need it, so that logits of prompts are never made, those of
    all tokens never held, and nothing is upcast to fp32 on the way.
    """

    turns_by_position = False  # RoPE by the tokens' positions, in our attention (Transformer Engine has its own)

    def _preprocess(self, input_ids: Any, position_ids: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        if self.turns_by_position:
            if self.rotary_pos_emb.inv_freq.device != position_ids.device:
                self.rotary_pos_emb.inv_freq = self.rotary_pos_emb.inv_freq.to(position_ids.device)
            packed_seq_params.rotation = rotation(position_ids.view(-1), self.rotary_pos_emb.inv_freq, self.config.params_dtype)
        return super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def linear_loss(
        self,
        hidden_states: torch.Tensor,
        ids: torch.Tensor,
        loss: ChunkLoss,
        *,
        rows: torch.Tensor | None = None,
        vocab_size: int,
        chunk_tokens: int | None = None,
        observe: Observer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """LM head and loss of `rows` of the S packed tokens (all by default): see `opd_kernels.linear_loss`."""
        return linear_loss(
            hidden_states[:, 0],
            self._head_weight(),
            ids,
            loss,
            rows=rows,
            chunk_tokens=chunk_tokens,
            vocab_start=self.vocab_start,
            vocab_size=vocab_size,
            tp_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            observe=observe,
        )

    def topk_overlap(self, logits: torch.Tensor, ids: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
        """See `opd_kernels.topk_overlap`; logits are what `linear_loss` shows its observer."""
        return topk_overlap(logits, ids, vocab_start=self.vocab_start, vocab_size=vocab_size, tp_group=self.pg_collection.tp)

    def _head_weight(self) -> torch.Tensor:
        """This rank's shard [V,H] of the LM head; tied, it may be the embedding's own."""
        if self.share_embeddings_and_output_weights and self.pre_process:
            weight = self.shared_embedding_or_output_weight()
        else:
            # The module is not called, but Megatron's hook that waits for its gathered weights hangs on the call.
            for hook in self.output_layer._forward_pre_hooks.values():
                hook(self.output_layer, ())
            weight = self.output_layer.weight
        assert weight is not None
        return weight

    @property
    def vocab_start(self) -> int:
        """Global id of the first column of this rank's vocabulary shard."""
        return parallel_state.get_tensor_model_parallel_rank() * (self.vocab_size // parallel_state.get_tensor_model_parallel_world_size())


def transformer_config(
    arch: Architecture,
    *,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    recompute: str = "none",
    recompute_modules: Sequence[str] = (),
    fp8: Fp8Config | None = None,
    deterministic: bool = False,
) -> TransformerConfig:
    """Megatron-Core's configuration for `arch`. Raises UserError for sizes that do not divide, and for what this machine does not have."""
    arch.check_parallel(parallel)
    on_gpu = torch.cuda.is_available()
    if parallel.cp > 1 and on_gpu and not uses_transformer_engine():
        raise UserError(f"cp={parallel.cp} on a GPU needs Transformer Engine (its ring attention), which is not installed; set cp = 1")
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        add_qkv_bias=arch.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        autocast_dtype=None,
        enable_autocast=False,
        deterministic_mode=deterministic,
        tensor_model_parallel_size=parallel.tp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall",  # a dense model has none, but variable lengths check for this name
        calculate_per_token_loss=True,
        # All weights are loaded right after, but 0.16.1 marks tensor-parallel parameters only where it initialises them, and without
        # the mark the gradient norm leaves out every rank's shard but the first.
        perform_initialization=True,
        use_cpu_initialization=not on_gpu,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=uses_transformer_engine(),  # without it, our attention turns queries and keys
        masked_softmax_fusion=False,  # our attention and Transformer Engine's have no such softmax
        gradient_accumulation_fusion=_fusion(dtype) == "apex",  # Transformer Engine's: see build_chunks
        persist_layer_norm=False,
        # Interleaved over gloo (0.16.1), outputs were freed before they were sent.
        deallocate_pipeline_outputs=on_gpu or parallel.vpp == 1,
        **_pipeline_options(arch, parallel),
        **moe_options(arch, parallel, grouped=uses_transformer_engine()),
        **_recompute_options(arch, recompute, recompute_modules, fp8),
        **fp8_options(fp8, arch, parallel),
    )


def _pipeline_options(arch: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"pipeline_model_parallel_size": parallel.pp}
    if parallel.vpp > 1:
        # Without overlapped sends, gradients over gloo were wrong with no error.
        options |= {"virtual_pipeline_model_parallel_size": parallel.vpp, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    stages = parallel.pp * parallel.vpp
    if arch.num_layers % stages:
        layout = [["decoder"] * count for count in arch.stage_layers(stages)]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        options["pipeline_model_parallel_layout"] = layout
    return options


def _recompute_options(arch: Architecture, recompute: str, modules: Sequence[str], fp8: Fp8Config | None) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "none":
        return {}
    if faults := arch.recompute_faults(modules, fp8):
        raise UserError(f"recompute_modules: {'; '.join(faults)}")
    in_place = sorted(MADE_IN_PLACE & set(modules))
    if in_place and not uses_transformer_engine():
        raise UserError(f"recompute_modules: {', '.join(in_place)} need a GPU with Transformer Engine")
    version = this_machine().transformer_engine
    if in_place and fp8 and version is not None and version < (2, 6):
        raise UserError(
            f"recompute_modules: {', '.join(in_place)} with fp8 need Transformer Engine 2.6 (this is {version[0]}.{version[1]})"
        )
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def build_chunks(arch: Architecture, config: TransformerConfig, *, longest: int | None = None) -> list[Student]:
    """This rank's pipeline stages, one but for an interleaved pipeline; parameters not yet loaded. Parallel state must be initialised.

    longest: tokens of the longest sequence that they will see (None: as many as the model takes). Raises UserError for context parallelism
    on GPUs whose attention would hold all S x S scores.
    """
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # 0.19 announces HybridModel at each build
    stages = config.virtual_pipeline_model_parallel_size
    chunks = [_build(arch, config, stage, longest) for stage in (range(stages) if stages else [None])]
    fusion = _fusion(config.params_dtype)
    if fusion == "Transformer Engine":
        fused = sum(map(fuse_accumulation_, chunks))
        assert fused, "no layer of Transformer Engine has fuse_wgrad_accumulation"
        config.gradient_accumulation_fusion = True
    return chunks


def describe_layers(arch: Architecture, stage: TrainerConfig) -> list[str]:
    """For people: which layers and attention this machine's GPU gets, and how weight gradients are added up. Raises as `build_chunks`."""
    dtype = getattr(torch, "bfloat16" if stage.dtype == "auto" else stage.dtype)
    if not uses_transformer_engine():
        layers = f"layers: Megatron-Core's, as Transformer Engine is not installed; attention: PyTorch's {_own_attention(dtype)}"
    else:
        p = stage.parallel
        chosen = core_attention(arch, tp=p.tp, cp=p.cp, dtype=dtype, deterministic=stage.deterministic, longest=stage.micro_batch_tokens)
        layers = f"{'WARNING: ' if chosen.ours else ''}layers: Transformer Engine's; attention: {chosen.why}"
    fusion = _fusion(dtype)
    if fusion:
        sums = f"by {fusion} in the matrix product"
    else:
        sums = "as they are" if dtype == torch.float32 else "rounded to 16 bits each, as neither Transformer Engine nor apex is installed"
    return [layers, f"weight gradients of micro-batches are added up {sums}"]


def _fusion(dtype: torch.dtype) -> Fusion | None:
    return choose_fusion(dtype=dtype, on_gpu=torch.cuda.is_available(), transformer_engine=uses_transformer_engine(), apex=has_apex())


def _build(arch: Architecture, config: TransformerConfig, vp_stage: int | None, longest: int | None) -> Student:
    student = Student(
        config=config,
        transformer_layer_spec=_layer_spec(arch, config, vp_stage, longest),
        vocab_size=arch.padded_vocab(config.tensor_model_parallel_size),
        max_sequence_length=arch.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,  # pyright: ignore[reportArgumentType]
        rope_scaling=arch.rope_scaling_factor is not None,
        rope_scaling_factor=arch.rope_scaling_factor or 8.0,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=vp_stage,
    )
    if not uses_transformer_engine():
        student.position_embedding_type = "none"
        student.turns_by_position = True
    mark_experts(student)
    return student


def _layer_spec(arch: Architecture, config: TransformerConfig, vp_stage: int | None, longest: int | None) -> Any:
    """Transformer Engine's layers on a GPU that has it, with our packed attention where its own would not do; else local ones with ours and our norm."""
    experts = arch.num_experts or None
    if uses_transformer_engine():
        chosen = core_attention(
            arch,
            tp=config.tensor_model_parallel_size,
            cp=config.context_parallel_size,
            dtype=config.params_dtype,
            deterministic=config.deterministic_mode,
            longest=longest,
        )
        logger.info("layers: Transformer Engine; attention: %s", chosen.why)
        block: Any = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=arch.qk_norm
        )
        if chosen.ours:
            block.submodules.self_attention.submodules.core_attention = ModuleSpec(module=PackedAttention)
        return block
    logger.info("layers: Megatron-Core local spec, attention by PyTorch's %s", _own_attention(config.params_dtype))
    layer = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    norm: Any = RMSNorm  # what a spec may hold differs between versions
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if experts:  # the norm before a router has a name of its own in a checkpoint, as with Transformer Engine
        parts.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=PackedAttention)
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm)


def _own_attention(dtype: torch.dtype) -> str:
    return "varlen_attn" if torch.cuda.is_available() and dtype != torch.float32 and varlen_attention() is not None else "SDPA"
