"""What a Hugging Face config.json says of the model, in one record; no torch needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.config import ParallelConfig
from megatron_opd.errors import UserError
from megatron_opd.lineage import read_config

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Megatron-Core's llama3 RoPE scaling has these built in; another value would be silently another model.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a dense decoder-only transformer."""

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

    @property
    def num_parameters(self) -> int:
        """Parameters, tied embeddings counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * (attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size) + self.hidden_size

    def train_flops(self, num_tokens: int, sum_squared_lengths: int) -> float:
        """Arithmetic of a forward and backward pass: 6 a token and matrix weight (the embedding lookup is none), and causal attention.

        `sum_squared_lengths` is the sum over sequences of length squared; half of the score matrix is computed.
        """
        matrix_weights = self.num_parameters - (0 if self.tied_embeddings else self.vocab_size * self.hidden_size)
        attention = 6.0 * self.num_layers * self.num_heads * self.head_dim * sum_squared_lengths
        return 6.0 * matrix_weights * num_tokens + attention

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding under tensor parallelism: a multiple of 16 a rank, for the loss kernel's wide loads."""
        return -(-self.vocab_size // (16 * tp)) * 16 * tp

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Raise UserError naming every size that a parallel group does not divide, and what would fit."""
        tp, pp = parallel.tp, parallel.pp
        sizes = {"attention heads": self.num_heads, "key-value heads": self.num_kv_heads, "feed-forward size": self.ffn_size}
        faults = [f"tp={tp} does not divide the model's {size} {what}" for what, size in sizes.items() if size % tp]
        if faults:
            fitting = [n for n in range(1, self.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
            faults[-1] += f" (tp may be {', '.join(map(str, fitting))})"
        if self.num_layers % pp:
            fitting = [n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]
            faults.append(f"pp={pp} does not divide the model's {self.num_layers} layers (pp may be {', '.join(map(str, fitting))})")
        if faults:
            raise UserError("; ".join(faults))


def read_architecture(directory: str | Path) -> Architecture:
    """Architecture of a Hugging Face model directory. Raises UserError naming the field that is not supported."""
    return parse_architecture(read_config(directory), f"{directory}/config.json")


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """See `read_architecture`; `where` names the file in errors."""
    name = (config.get("architectures") or ["(none)"])[0]
    if name not in SUPPORTED:
        raise UserError(f"{where}: architecture {name} is not supported; supported: {', '.join(SUPPORTED)}")
    wanted = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1}
    if name != "Qwen2ForCausalLM":
        wanted["attention_bias"] = False
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} = {config[key]!r} is not supported (only {value!r})")
    theta, factor = _rope(config, where)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Architecture(
            name=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            ffn_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=name == "Qwen3ForCausalLM",
            qkv_bias=name == "Qwen2ForCausalLM",
        )
    except KeyError as error:
        raise UserError(f"{where}: no {error} in it") from None


def _rope(config: dict[str, Any], where: str) -> tuple[float, float | None]:
    """(theta, llama3 scaling factor or None); transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: RoPE type {kind!r} is not supported; supported: default, llama3")
    for key, value in _LLAMA3_ROPE.items():
        if float(scaling.get(key, value)) != value:
            raise UserError(f"{where}: llama3 RoPE with {key} = {scaling[key]} is not supported (only {value})")
    return theta, float(scaling["factor"])
