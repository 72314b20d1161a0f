"""config.json of a Hugging Face model directory: what it says, and whether it says it once. No torch needed.

Serving engines and versions of transformers read the same fact from different fields (`rope_theta`, `rope_scaling`, `rope_parameters`;
`architectures`, `model_type`). Where the fields agree every engine reads one model; where they don't, the directory is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.safety.untrusted import read_object

# The model type that belongs to each architecture: transformers chooses the code by the one, SGLang and vLLM by the other.
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
DEFAULT_THETA = 10000.0  # of these architectures, in transformers 4 and 5 alike
EXPERT_FIELDS = ("num_experts", "num_local_experts")  # of version 4 and of version 5
# No model has more: a slip that would be counted through for hours, or fill the memory.
MOST: dict[str, int] = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", *EXPERT_FIELDS), 10_000)
MOST_OF_ALL = 1 << 31
_SIZES = re.compile(r"(_size|_dim|_rank|layers|heads|experts|positions|embeddings)$")
ADAPTER_CONFIG = "adapter_config.json"
# Files that quantisers leave beside config.json, and the field that names their work in it.
_QUANTISER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISER_FIELDS = ("quantization_config", "compression_config")
_SCALED_ROPE = ("llama3", "yarn", "longrope")  # transformers prefers a field at top level to the table's for these


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `kind` is transformers' rope_type; `options` are the table's other fields that are set."""

    theta: Any
    kind: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join([self.kind, *(f"{key} = {value!r}" for key, value in sorted(self.options.items()))])


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises UserError, also for an adapter and where fields contradict each other."""
    directory = Path(directory)
    path = directory / "config.json"
    _refuse_adapter(directory)
    try:
        config = read_plainly(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; a Hugging Face model directory is expected (config.json, *.safetensors, tokenizer)"
        ) from None
    if "vocab_size" not in config:
        raise UserError(f"{path}: no 'vocab_size'; only text models are supported")
    vocab_size = config["vocab_size"]
    if type(vocab_size) is not int or vocab_size < 1:
        raise UserError(f"{path}: vocab_size is {vocab_size!r:.100}, not a whole number above 0")
    check_model_type(config, str(path))
    read_rope(config, str(path))
    return config


def read_context_length(directory: str | Path) -> int:
    """Tokens that a model takes, 2^20 where its config.json does not say. Raises UserError."""
    longest = read_config(directory).get("max_position_embeddings", 1 << 20)
    if type(longest) is not int or longest < 1:
        raise UserError(f"{directory}/config.json: max_position_embeddings = {longest!r:.100}, but a whole number above 0 is expected")
    return longest


def read_plainly(path: Path) -> dict[str, Any]:
    """A config.json whose numbers are of a model's size; nothing else is looked at. Raises UserError, OSError if it isn't there."""
    config = read_object(path)
    for key, value in config.items():
        most = MOST.get(key, MOST_OF_ALL if _SIZES.search(key) else math.inf)
        if isinstance(value, int) and value > most:
            raise UserError(
                f"{path}: {key} = {value!r}, but no model has more than {most}; copy the file again from where the model is from"
            )
    return config


def _refuse_adapter(directory: Path) -> None:
    """transformers loads an adapter on top of whatever lies beside it, other engines don't."""
    path = directory / ADAPTER_CONFIG
    if path.exists():
        base = read_object(path).get("base_model_name_or_path")
        raise UserError(
            f"{path}: a LoRA adapter{f' of {base}' if base else ''}, not a whole model; merge it into its base "
            "(peft: merge_and_unload, then save_pretrained) and give that directory"
        )


def architecture_name(config: dict[str, Any], where: str) -> str:
    """The one entry of `architectures`. Raises UserError."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        what = "missing" if names is None else f"{names!r}"
        raise UserError(f"{where}: architectures is {what}, but a list of one name is expected")
    return names[0]


def check_model_type(config: dict[str, Any], where: str) -> None:
    """Raise UserError if `model_type` belongs to another architecture than a supported one in `architectures`."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    wanted = MODEL_TYPES.get(name) if isinstance(name, str) else None
    if wanted is not None and config.get("model_type") != wanted:
        raise UserError(
            f"{where}: model_type = {config.get('model_type')!r}, but architectures = [{name!r}] goes with {wanted!r}: transformers follows the "
            "one field, SGLang the other; is the model's own config.json meant?"
        )


def read_rope(config: dict[str, Any], where: str) -> Rope:
    """RoPE as every engine reads it. Raises UserError if two fields that say it differ.

    transformers 5 writes theta and scaling into `rope_parameters`; version 4 reads `rope_theta` and `rope_scaling`.
    """
    tables: dict[str, tuple[str, dict[str, Any]]] = {}
    thetas = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key):
            tables[key] = _normal_rope(config[key], f"{where}: {key}")
            if config[key].get("rope_theta") is not None:
                thetas[f"{key}.rope_theta"] = config[key]["rope_theta"]
    for field, theta in thetas.items():
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < float("inf"):
            raise UserError(
                f"{where}: {field} = {theta!r:.100}, but a number above 0 is expected; copy the file again from where the model is from"
            )
    if len(tables) == 2 and tables["rope_parameters"] != tables["rope_scaling"]:
        said = " and ".join(f"{key} ({Rope(None, *table)})" for key, table in tables.items())
        raise UserError(f"{where}: {said} differ, and engines follow the one or the other; keep the one that the model was trained with")
    (first, theta), *others = thetas.items() or {"": DEFAULT_THETA}.items()
    for key, other in others:
        if other != theta:
            raise UserError(
                f"{where}: {first} = {theta!r} and {key} = {other!r} differ, and engines follow the one or the other; keep the right one"
            )
    kind, options = next(iter(tables.values()), ("default", {}))
    field = "original_max_position_embeddings"
    if kind in _SCALED_ROPE and config.get(field) is not None and options.get(field) not in (None, config[field]):
        raise UserError(f"{where}: {field} = {config[field]!r}, but {next(iter(tables))} has {options[field]!r}; keep the right one")
    return Rope(theta, kind, options)


def _normal_rope(table: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(kind, options) of a table, without theta and what is not set."""
    if not isinstance(table, dict):
        raise UserError(f"{where} = {table!r}, but a table is expected")
    kinds = {key: table[key] for key in ("rope_type", "type") if table.get(key) is not None}
    if len({str(kind) for kind in kinds.values()}) > 1:
        raise UserError(f"{where}: rope_type = {kinds['rope_type']!r} and type = {kinds['type']!r} differ; keep the right one")
    options = {key: value for key, value in table.items() if key not in ("rope_type", "type", "rope_theta") and value is not None}
    return str(next(iter(kinds.values()), "default")), {
        key: value for key, value in options.items() if not (key == "partial_rotary_factor" and value == 1)
    }


def check_version_reads(config: dict[str, Any], where: str, version: str) -> None:
    """Raise UserError if transformers `version` would read another RoPE than config.json says: before version 5 it knows two fields alone."""
    if int(version.split(".")[0]) >= 5 or config.get("model_type") not in MODEL_TYPES.values():
        return
    rope = read_rope(config, where)
    theta = DEFAULT_THETA if config.get("rope_theta") is None else config["rope_theta"]
    kind, options = _normal_rope(config.get("rope_scaling") or {}, f"{where}: rope_scaling")
    if (theta, kind, options) != (rope.theta, rope.kind, rope.options):
        raise UserError(
            f"{where}: rope_parameters has {rope} with theta {rope.theta!r}, but transformers {version} reads rope_theta and rope_scaling alone "
            f"({Rope(theta, kind, options)} with theta {theta!r}); write all three alike, or serve it with transformers 5"
        )


def spell_for_all(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config with RoPE and the number of experts in the fields of transformers 4 and in those of version 5. Raises UserError."""
    rope = read_rope(config, where)
    experts = next((config[key] for key in EXPERT_FIELDS if config.get(key) is not None), None)
    if config.get("model_type") == "qwen3_moe" and experts is not None:
        config = config | dict.fromkeys(EXPERT_FIELDS, experts)
    if any(isinstance(value, dict) for value in rope.options.values()):  # a table for each kind of layer: version 5 alone has it
        return config
    table = {"rope_type": rope.kind, **rope.options}
    scaling = table if rope.kind != "default" or rope.options else None
    return config | {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": {"rope_theta": rope.theta, **table}}


def carried_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json for weights that were converted: for every engine, no word of quantisation or remote code, which stay behind."""
    kept = {key: value for key, value in config.items() if key not in (*_QUANTISER_FIELDS, "auto_map")}
    return spell_for_all(kept, where)


def quantisation(directory: str | Path) -> str | None:
    """What says that a directory's weights are quantised, and how ("quantization_config (fp8)"); None if nothing does. Raises UserError."""
    directory = Path(directory)
    config = read_config(directory)
    for field in _QUANTISER_FIELDS:
        if config.get(field):
            method = config[field].get("quant_method") if isinstance(config[field], dict) else None
            return f"{field} ({method or 'of no named method'})"
    return next((name for name in _QUANTISER_FILES if (directory / name).exists()), None)


def refuse_quantised(directory: str | Path, who: str, remedy: str) -> None:
    """Raise UserError if the weights are quantised. `who` can't use them."""
    if (found := quantisation(directory)) is not None:
        raise UserError(f"{directory}: {found}: the weights are quantised, and {who} needs plain ones; {remedy}")


def remote_code(directory: str | Path) -> str | None:
    """A sentence about Python code that comes with the model, None if there is none. Raises UserError."""
    auto_map = read_config(directory).get("auto_map")
    if not auto_map:
        return None
    files = sorted({str(name).split("--")[-1].split(".")[0] + ".py" for name in (auto_map.values() if isinstance(auto_map, dict) else ())})
    return f"config.json has auto_map ({', '.join(files) or auto_map}): this code is not run; the model is read as its architecture says"
