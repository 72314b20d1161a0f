"""Sizes of published models and data sets, so that a recipe can be estimated before they are there. The models' from their config.json files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "tie_word_embeddings")
KNOWN: dict[str, dict[str, Any]] = {
    name: _QWEN3 | dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "Qwen3-0.6B": (1024, 28, 16, 3072, True),
        "Qwen3-1.7B": (2048, 28, 16, 6144, True),
        "Qwen3-4B": (2560, 36, 32, 9728, True),
        "Qwen3-8B": (4096, 36, 32, 12288, False),
        "Qwen3-14B": (5120, 40, 40, 17408, False),
        "Qwen3-32B": (5120, 64, 64, 25600, False),
    }.items()
}
_MIXTURE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
KNOWN |= {
    name: _MIXTURE | dict(zip((*_SIZES, "moe_intermediate_size"), sizes, strict=True))
    for name, sizes in {
        "Qwen3-30B-A3B": (2048, 48, 32, 6144, False, 768),
        "Qwen3-235B-A22B": (4096, 94, 64, 12288, False, 1536),
    }.items()
}
KNOWN["QwQ-32B"] = _QWEN3 | {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_POSITIONS = {"-Base": 32768, "-2507": 262144}  # by the ending of a name; of the others 40960
# Prompts of the data sets in docs/data.md, roughly, as their own names say; each but once.
KNOWN_PROMPTS = {
    "openthoughts3": 1_200_000,
    "dapo_math_17k": 17_000,
    "epicoder_func_380k": 380_000,
    "aime24": 30,
    "aime25": 30,
    "hmmt25": 30,
}


def known_config(directory: str) -> dict[str, Any] | None:
    """config.json of the published model that a directory's name begins with ("Qwen3-4B-Base" is a Qwen3-4B); None if there is none."""
    name = Path(directory).name
    fitting = [known for known in KNOWN if name == known or name.startswith(f"{known}-")]
    if not fitting:
        return None
    positions = next((count for ending, count in _POSITIONS.items() if name.endswith(ending)), 40960)
    return KNOWN[max(fitting, key=len)] | {"max_position_embeddings": positions}


def known_prompts(path: str) -> int | None:
    """About how many prompts the published data set of this file or folder name holds; None for others."""
    return KNOWN_PROMPTS.get(Path(path).name.partition(".")[0])
