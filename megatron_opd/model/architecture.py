"""What a Hugging Face config.json says of the model, in one record; no torch needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.hf.model_config import (
    EXPERT_FIELDS,
    MODEL_TYPES,
    MOST,
    MOST_OF_ALL,
    architecture_name,
    check_model_type,
    read_config,
    read_rope,
)
from megatron_opd.recipe.layout import Fp8Config, ParallelConfig
from megatron_opd.recipe.training_stages import TrainerConfig

SUPPORTED = tuple(MODEL_TYPES)
# Megatron-Core's llama3 RoPE scaling has these built in; another value would be silently another model.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Fields that make another model unless they have this value (or null): of the architectures themselves ...
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1,
    # ... and of their relatives, which some engines read whatever the architecture is called.
    "alibi": False,
    "attention_multiplier": None,
    "attention_scaling": 1,
    "attn_logit_softcapping": None,
    "attn_output_gate": False,
    "clip_qkv": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "first_k_dense_replace": 0,
    "is_encoder_decoder": False,
    "logit_scale": 1,
    "logits_scaling": 1,
    "n_shared_experts": 0,
    "no_rope_layers": [],
    "num_nextn_predict_layers": 0,
    "parallel_attn": False,
    "qk_layernorm": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rope_interleaved": False,
    "routed_scaling_factor": 1,
    "scale_depth": None,
    "scale_emb": 1,
    "shared_expert_intermediate_size": 0,
    "use_mrope": False,
    "use_parallel_residual": False,
}
# These two discard an output and make it again in place, which Megatron-Core does with Transformer Engine's help alone.
MADE_IN_PLACE = {"layernorm", "moe_act"}
# What transformers takes for a field that config.json does not have, where it is not what the sizes say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"num_key_value_heads": 4},
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder-only transformer: dense, or in every layer a mixture of experts."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    num_experts: int = 0  # a layer; 0: dense. With experts, ffn_size is one expert's
    experts_per_token: int = 0
    renormalized_router: bool = True  # the chosen experts' probabilities are divided by their sum

    @property
    def num_parameters(self) -> int:
        """Parameters, tied embeddings counted once."""
        return self._count(max(1, self.num_experts))

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of a mixture, the experts that it is routed to."""
        return self._count(self.experts_per_token if self.num_experts else 1)

    def _count(self, experts: int) -> int:
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        attention += 2 * self.head_dim if self.qk_norm else 0
        attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        feed_forward = self.hidden_size * (3 * self.ffn_size * experts + self.num_experts)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * (attention + feed_forward + 2 * self.hidden_size) + self.hidden_size

    def train_flops(self, num_tokens: int, sum_squared_lengths: int) -> float:
        """Arithmetic of a forward and backward pass: 6 a token and matrix weight (the embedding lookup is none), and causal attention.

        `sum_squared_lengths` is the sum over sequences of length squared; half of the score matrix is computed.
        """
        matrix_weights = self.num_active_parameters - (0 if self.tied_embeddings else self.vocab_size * self.hidden_size)
        attention = 6.0 * self.num_layers * self.num_heads * self.head_dim * sum_squared_lengths
        return 6.0 * matrix_weights * num_tokens + attention

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding under tensor parallelism: a multiple of 16 a rank, for the loss kernel's wide loads."""
        return -(-self.vocab_size // (16 * tp)) * 16 * tp

    def check_stage(self, stage: TrainerConfig, name: str) -> None:
        """Raise UserError for the faults of `layout_faults` and `recompute_faults`, with the name of the recipe's section."""
        if faults := self.layout_faults(stage.parallel, stage.fp8):
            raise UserError(f"{name}: {'; '.join(faults)}; change {name}.parallel" + (f" or {name}.fp8" if stage.fp8 else ""))
        if stage.recompute == "selective" and (faults := self.recompute_faults(stage.recompute_modules, stage.fp8)):
            raise UserError(f"{name}.recompute_modules: {'; '.join(faults)}")

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Raise UserError for the faults of `layout_faults`."""
        if faults := self.layout_faults(parallel):
            raise UserError("; ".join(faults))

    def layout_faults(self, parallel: ParallelConfig, fp8: Fp8Config | None = None) -> list[str]:
        """Every size that a parallel group does not divide, and what would fit; layers kept from FP8 that no pipeline stage has."""
        tp, ep, stages = parallel.tp, parallel.ep, parallel.pp * parallel.vpp
        sizes = {"attention heads": self.num_heads, "key-value heads": self.num_kv_heads}
        if not self.num_experts:  # an expert is never cut
            sizes["feed-forward size"] = self.ffn_size
        faults = [f"tp={tp} does not divide the model's {size} {what}" for what, size in sizes.items() if size % tp]
        if faults:
            fitting = [n for n in range(1, self.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
            faults[-1] += f" (tp may be {', '.join(map(str, fitting))})"
        if stages > self.num_layers:
            faults.append(
                f"pp={parallel.pp} x vpp={parallel.vpp} makes {stages} stages, but the model has {self.num_layers} layer(s); pp * vpp may be at most {self.num_layers}"
            )
        if ep > 1 and not self.num_experts:
            faults.append(f"ep={ep}, but {self.name} has no experts (ep must be 1)")
        elif ep > 1 and self.num_experts % ep:
            fitting = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            faults.append(f"ep={ep} does not divide the model's {self.num_experts} experts (ep may be {', '.join(map(str, fitting))})")
        if self.num_experts and tp > 1 and not parallel.sequence_parallel:
            faults.append(f"tp={tp} with experts needs sequence_parallel = true: each rank routes its own tokens")
        return faults + (self.fp8_faults(fp8, parallel) if fp8 else [])

    def fp8_faults(self, fp8: Fp8Config, parallel: ParallelConfig) -> list[str]:
        """Megatron-Core counts the layers that stay in bfloat16 within one pipeline stage."""
        most = self.num_layers // parallel.pp
        kept = {field: getattr(fp8, field) for field in ("bf16_first_layers", "bf16_last_layers")}
        return [f"fp8.{field} = {count}, but a pipeline stage has {most} layers" for field, count in kept.items() if count > most]

    def recompute_faults(self, modules: Sequence[str], fp8: Fp8Config | None) -> list[str]:
        """Modules that can't be made again, whatever the machine."""
        absent = {"mlp"} if self.num_experts else {"moe", "moe_act"}
        found = sorted(absent & set(modules))
        faults = [f"a {self.name} has no {', '.join(found)}; take it out"] if found else []
        if fp8 and fp8.recipe == "delayed" and (in_place := sorted(MADE_IN_PLACE & set(modules))):
            faults.append(f"{', '.join(in_place)} can't be made again with fp8.recipe = 'delayed'; take another recipe")
        return faults

    def stage_layers(self, stages: int) -> list[int]:
        """Layers of each pipeline stage, in the order of the layers; those left over go to the middle, as the ends have the vocabulary."""
        layers = [self.num_layers // stages] * stages
        first = (stages - self.num_layers % stages) // 2
        for stage in range(first, first + self.num_layers % stages):
            layers[stage] += 1
        return layers


def read_architecture(directory: str | Path) -> Architecture:
    """Architecture of a Hugging Face model directory. Raises UserError naming the field that is not supported."""
    return parse_architecture(read_config(directory), f"{directory}/config.json")


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """See `read_architecture`; `where` names the file in errors."""
    name = architecture_name(config, where)
    if name not in SUPPORTED:
        raise UserError(f"{where}: architecture {name} is not supported; supported: {', '.join(SUPPORTED)}")
    check_model_type(config, where)
    mixture = name == "Qwen3MoeForCausalLM"
    if faults := _foreign_fields(config, name):
        raise UserError(f"{where}: {'; '.join(faults)}")
    config = {key: value for key, value in _DEFAULTS[name].items() if key not in config} | config
    theta, factor = _rope(config, where)
    heads, hidden = _size(config, "num_attention_heads", where), _size(config, "hidden_size", where)
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads", where)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    head_dim = hidden // heads if config.get("head_dim") is None else _size(config, "head_dim", where)
    if config.get("head_dim") is None and hidden % heads:
        raise UserError(f"{where}: num_attention_heads = {heads} does not divide hidden_size = {hidden}, and there is no head_dim")
    if head_dim % 2:
        raise UserError(f"{where}: heads of {head_dim} dimensions can't be rotated in pairs")
    arch = Architecture(
        name=name,
        num_layers=_size(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=_size(config, "moe_intermediate_size" if mixture else "intermediate_size", where),
        vocab_size=_size(config, "vocab_size", where),
        max_positions=_size(config, "max_position_embeddings", where),
        norm_eps=_number(config, "rms_norm_eps", where),
        rope_theta=theta,
        rope_scaling_factor=factor,
        tied_embeddings=_switch(config, "tie_word_embeddings", where),
        qk_norm=name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        qkv_bias=name == "Qwen2ForCausalLM",
        num_experts=_num_experts(config, where) if mixture else 0,
        experts_per_token=_size(config, "num_experts_per_tok", where) if mixture else 0,
        renormalized_router=_switch(config, "norm_topk_prob", where),
    )
    if arch.experts_per_token > arch.num_experts:
        raise UserError(f"{where}: num_experts_per_tok = {arch.experts_per_token}, but there are {arch.num_experts} experts")
    if arch.experts_per_token == 1 and arch.renormalized_router:
        raise UserError(
            f"{where}: norm_topk_prob with num_experts_per_tok = 1 is not supported: every weight is 1, and the router learns nothing"
        )
    return arch


def _foreign_fields(config: dict[str, Any], name: str) -> list[str]:
    """A sentence about each field that would make another model."""
    neutral = dict(_NEUTRAL)
    if name == "Qwen3MoeForCausalLM":  # every layer is a mixture
        neutral |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        neutral |= {"num_experts": 0, "num_local_experts": 0}
    if name != "Qwen2ForCausalLM":
        neutral["attention_bias"] = False
    if "Qwen3" not in name:
        neutral["use_qk_norm"] = False
    if name == "LlamaForCausalLM" and config.get("use_sliding_window") is not False:  # transformers ignores it, others don't
        neutral["sliding_window"] = None
    faults = [
        f"{key} = {config[key]!r} is not supported (only {value!r})"
        for key, value in neutral.items()
        if config.get(key) is not None and config[key] != value
    ]
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        other = next(kind for kind in kinds if kind != "full_attention") if isinstance(kinds, list) else kinds
        faults.append(f"layer_types has {other!r}, which is not supported (only 'full_attention')")
    return faults


def _num_experts(config: dict[str, Any], where: str) -> int:
    """Raises UserError if the two fields that say it differ."""
    found = {key: config[key] for key in EXPERT_FIELDS if config.get(key) is not None}
    if len(set(map(str, found.values()))) > 1:
        raise UserError(f"{where}: {' and '.join(f'{key} = {value!r}' for key, value in found.items())} differ; keep the right one")
    return _size({"num_experts": None} | config, next(iter(found), "num_experts"), where)


def _switch(config: dict[str, Any], key: str, where: str) -> bool:
    """A field that transformers takes for false where it is not there."""
    value = config.get(key)
    if value not in (None, True, False) or isinstance(value, int) != isinstance(value, bool):
        raise UserError(f"{where}: {key} = {value!r}, but true or false is expected")
    return bool(value)


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value, most = _number(config, key, where), MOST.get(key, MOST_OF_ALL)
    if not isinstance(value, int):
        raise UserError(f"{where}: {key} = {config[key]!r}, but a whole number is expected")
    if value > most:
        raise UserError(f"{where}: {key} = {value!r}, but no model has more than {most}; copy the file again from where the model is from")
    return value


def _number(config: dict[str, Any], key: str, where: str) -> float:
    """A finite number above zero. Raises UserError naming file, field and value."""
    if key not in config:
        raise UserError(f"{where}: no {key!r} in it")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {key} = {value!r}, but a number above 0 is expected; copy the file again from where the model is from")
    return value


def _rope(config: dict[str, Any], where: str) -> tuple[float, float | None]:
    """(theta, llama3 scaling factor or None)."""
    rope = read_rope(config, where)
    theta = float(_number({"rope_theta": rope.theta}, "rope_theta", where))
    known = {"factor", *_LLAMA3_ROPE} if rope.kind == "llama3" else set()
    if rope.kind not in ("default", "llama3"):
        raise UserError(f"{where}: RoPE type {rope.kind!r} is not supported; supported: default, llama3")
    if unknown := sorted(set(rope.options) - known):
        raise UserError(
            f"{where}: RoPE type {rope.kind!r} with {', '.join(f'{key} = {rope.options[key]!r}' for key in unknown)} is not supported"
        )
    if rope.kind == "default":
        return theta, None
    for name, value in _LLAMA3_ROPE.items():
        if rope.options.get(name) != value:
            said = f"{name} = {rope.options[name]!r}" if name in rope.options else f"no {name}"
            raise UserError(f"{where}: llama3 RoPE with {said} is not supported (only {value})")
    return theta, float(_number(rope.options, "factor", f"{where}, llama3 RoPE"))
