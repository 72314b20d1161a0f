"""What a Hugging Face config.json says of the model, in one record; no torch needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.config import Fp8Config, ParallelConfig, TrainerConfig
from megatron_opd.errors import UserError
from megatron_opd.lineage import read_config

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
# Megatron-Core's llama3 RoPE scaling has these built in; another value would be silently another model.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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
        """Raise UserError for the faults of `layout_faults`, with the name of the recipe's section."""
        if faults := self.layout_faults(stage.parallel, stage.fp8):
            raise UserError(f"{name}: {'; '.join(faults)}; change {name}.parallel" + (f" or {name}.fp8" if stage.fp8 else ""))

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
    names = config.get("architectures") or ["(none)"]
    name = names[0] if isinstance(names, list) else names
    if name not in SUPPORTED:
        raise UserError(f"{where}: architecture {name} is not supported; supported: {', '.join(SUPPORTED)}")
    wanted = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1}
    mixture = name == "Qwen3MoeForCausalLM"
    if mixture:  # every layer is a mixture
        wanted |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if name != "Qwen2ForCausalLM":
        wanted["attention_bias"] = False
    for key, value in wanted.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"{where}: {key} = {config[key]!r} is not supported (only {value!r})")
    theta, factor = _rope(config, where)
    heads, hidden = _size(config, "num_attention_heads", where), _size(config, "hidden_size", where)
    has_head_dim, has_groups = config.get("head_dim") is not None, config.get("num_key_value_heads") is not None
    experts = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"  # transformers 4 and 5
    return Architecture(
        name=name,
        num_layers=_size(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", where) if has_groups else heads,
        head_dim=_size(config, "head_dim", where) if has_head_dim else hidden // heads,
        ffn_size=_size(config, "moe_intermediate_size" if mixture else "intermediate_size", where),
        vocab_size=_size(config, "vocab_size", where),
        max_positions=_size(config, "max_position_embeddings", where),
        norm_eps=_number(config, "rms_norm_eps", where),
        rope_theta=theta,
        rope_scaling_factor=factor,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        qkv_bias=name == "Qwen2ForCausalLM",
        num_experts=_size(config, experts, where) if mixture else 0,
        experts_per_token=_size(config, "num_experts_per_tok", where) if mixture else 0,
        renormalized_router=bool(config.get("norm_topk_prob", False)),
    )


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value = _number(config, key, where)
    if value != int(value):
        raise UserError(f"{where}: {key} = {config[key]!r}, but a whole number is expected")
    return int(value)


def _number(config: dict[str, Any], key: str, where: str) -> float:
    """A finite number above zero. Raises UserError naming file, field and value."""
    if key not in config:
        raise UserError(f"{where}: no {key!r} in it")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {key} = {value!r}, but a number above 0 is expected; copy the file again from where the model is from")
    return value


def _rope(config: dict[str, Any], where: str) -> tuple[float, float | None]:
    """(theta, llama3 scaling factor or None); transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    scaling = config.get(key) or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: {key} = {scaling!r}, but a table is expected")
    theta_from = next((table for table in (scaling, config) if table.get("rope_theta") is not None), {"rope_theta": 10000.0})
    theta = float(_number(theta_from, "rope_theta", where))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: RoPE type {kind!r} is not supported; supported: default, llama3")
    for name, value in _LLAMA3_ROPE.items():
        if scaling.get(name, value) != value:
            raise UserError(f"{where}: llama3 RoPE with {name} = {scaling[name]!r} is not supported (only {value})")
    return theta, float(_number(scaling, "factor", f"{where}, {key}"))
