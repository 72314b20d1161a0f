"""Model directories that say one thing twice, or are not what they seem: one meaning for every engine, or refused with file and field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from megatron_opd.convert.source import open_source
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.hf.model_config import check_version_reads, read_config, read_rope, remote_code, spell_for_all
from megatron_opd.model.architecture import Architecture, parse_architecture, read_architecture
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.serve.loaded import check_loaded
from megatron_opd.serve.transformers_engine import TransformersEngine

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
LLAMA = QWEN3 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MIXTURE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}  # fmt: skip


def parse(config: dict[str, Any]) -> Architecture:
    return parse_architecture(config, "config.json")


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_theta": 1000000, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_scaling": {}, "rope_theta": 1000000}, 1e6),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0}}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
    ],
)
def test_spellings_of_plain_rope(fields: dict[str, Any], theta: float) -> None:
    arch = parse(QWEN3 | fields)
    assert (arch.rope_theta, arch.rope_scaling_factor) == (theta, None)
    spelled = spell_for_all(QWEN3 | fields, "config.json")
    assert (spelled["rope_theta"], spelled["rope_scaling"]) == (theta, None)
    assert spelled["rope_parameters"] == {"rope_theta": theta, "rope_type": "default"}
    assert parse(spelled) == arch


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3 | {"factor": 8, "type": "llama3"}},
    ],
)
def test_spellings_of_llama3_rope(fields: dict[str, Any]) -> None:
    arch = parse(LLAMA | fields)
    assert (arch.rope_theta, arch.rope_scaling_factor) == (5e5, 8.0)
    spelled = spell_for_all(LLAMA | fields, "config.json")
    options = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    assert spelled["rope_theta"] == 5e5
    assert read_rope(spelled, "").options == options
    assert spelled["rope_parameters"] == {"rope_theta": 5e5, **spelled["rope_scaling"]} == {"rope_theta": 5e5, **LLAMA3}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_scaling": YARN}, r"rope_parameters \(default\) and rope_scaling \(yarn, factor = 4.0"),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 32.0}}, "factor = 8.0.* and .*factor = 32.0.* differ"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 10000.0}}, r"rope_theta = 1000000.0 and rope_parameters.rope_theta = 10000.0 differ"),
        ({"rope_theta": 1e6, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}}, r"rope_theta = 1000000.0 and rope_scaling.rope_theta = 500000.0 differ"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "linear"}}, "rope_type = 'llama3' and type = 'linear' differ"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, "original_max_position_embeddings = 4096, but rope_scaling has 8192"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\], but a table is expected"),
        ({"rope_scaling": YARN}, "RoPE type 'yarn' is not supported; supported: default, llama3"),
        ({"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}}, "llama3 RoPE with no original_max_position"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, "llama3 RoPE with high_freq_factor = 8.0"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 1.2}}, "'llama3' with attention_factor = 1.2"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}}, "'default' with mrope_section"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6'"),
        ({"rope_theta": -1}, "rope_theta = -1"),
    ],
)  # fmt: skip
def test_rope_that_is_said_twice_or_is_another(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(LLAMA | fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mistral"}, r"model_type = 'mistral', but architectures = \['LlamaForCausalLM'\] goes with 'llama'"),
        ({"model_type": "granite", "embedding_multiplier": 12.0}, "model_type = 'granite'"),
        ({"model_type": "abacus"}, "model_type = 'abacus'"),
        ({"model_type": None}, "model_type = None"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": []}, r"architectures is \[\]"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "a list of one name is expected"),
        ({"architectures": "LlamaForCausalLM"}, "a list of one name is expected"),
        ({"architectures": [3]}, "a list of one name is expected"),
        ({"embedding_multiplier": 12.0, "logits_scaling": 8.0}, "embedding_multiplier = 12.0 .*; logits_scaling = 8.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"attention_multiplier": 0.015625}, "attention_multiplier"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"layer_types": 3}, "layer_types has 3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_attention_heads": 5}, "num_key_value_heads = 2 does not divide num_attention_heads = 5"),
        ({"num_attention_heads": 6, "head_dim": None}, "num_attention_heads = 6 does not divide hidden_size = 32"),
        ({"head_dim": 15}, "heads of 15 dimensions"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, but no model has more than 10000"),
        ({"num_key_value_heads": 10**12, "num_attention_heads": 10**12}, "no model has more"),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0, but a whole number is expected"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false', but true or false is expected"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
    ],
)  # fmt: skip
def test_a_llama_that_is_another_model(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(LLAMA | fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts_per_tok": 1}, "norm_topk_prob with num_experts_per_tok = 1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5, but there are 4 experts"),
        ({"num_local_experts": 8}, "num_experts = 4 and num_local_experts = 8 differ"),
        ({"num_experts": None}, "num_experts = None"),
        ({"num_experts": 10**9}, "num_experts = 1000000000, but no model has more"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes'"),
    ],
)
def test_a_mixture_that_is_another_model(fields: dict[str, Any], said: str) -> None:
    assert parse(MIXTURE).num_experts == parse(MIXTURE | {"num_local_experts": 4}).num_experts == 4
    with pytest.raises(UserError, match=said):
        parse(MIXTURE | fields)


def test_published_configs_of_both_generations() -> None:
    """Fields at their neutral values, as Qwen2.5 (4.x), Llama 3 (4.x) and Qwen3 (5.x) write them."""
    qwen2 = QWEN3 | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
    assert parse(qwen2 | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28, "rope_theta": 1e6}).head_dim == 8
    assert parse(
        LLAMA | {"pretraining_tp": 1, "mlp_bias": False, "attention_bias": False, "attention_dropout": 0.0, "rope_scaling": LLAMA3}
    )
    written = {
        "layer_types": ["full_attention"] * 2,
        "sliding_window": None,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    }
    assert parse(QWEN3 | written | {"dtype": "bfloat16", "transformers_version": "5.0.0"}).rope_theta == 1e6


@pytest.mark.parametrize("field", ["tie_word_embeddings", "num_key_value_heads", "head_dim", "rope_theta", "norm_topk_prob"])
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "Qwen3Config", "Qwen3MoeConfig"])
def test_a_field_that_is_not_there_is_what_transformers_takes(kind: str, field: str) -> None:
    config_class: Any = getattr(transformers, kind)
    name = kind.removesuffix("Config") + "ForCausalLM"
    sizes = {"num_attention_heads": 32, "hidden_size": 4096, "num_key_value_heads": 8, "head_dim": 64, "norm_topk_prob": True}
    config = MIXTURE | sizes | {"architectures": [name], "model_type": config_class.model_type} | {"tie_word_embeddings": True}
    if "Moe" not in name:
        config = {key: value for key, value in config.items() if "expert" not in key}
    config = {key: value for key, value in config.items() if key != field}
    arch, truth = parse(config), config_class(**config)
    assert arch.tied_embeddings == truth.tie_word_embeddings
    assert arch.num_kv_heads == truth.num_key_value_heads
    assert arch.head_dim == (getattr(truth, "head_dim", None) or truth.hidden_size // truth.num_attention_heads)
    theta = truth.rope_parameters["rope_theta"] if hasattr(truth, "rope_parameters") else truth.rope_theta
    assert arch.rope_theta == theta
    if "Moe" in name:
        assert arch.renormalized_router == truth.norm_topk_prob


@pytest.mark.parametrize(
    ("text", "said"),
    [("[" * 100_000, "levels deep"), ('{"a":' * 100_000, "levels deep"), ("NaN", "must be a JSON object, not float"), ('{"vocab_size": 0}', "vocab_size is 0"), ("\ufeff{}", "not JSON|vocab_size")],
)  # fmt: skip
def test_a_config_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / kind, kind) for kind in ("qwen3", "qwen3-tied", "llama")}


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A model with other fields in config.json (None: without) and with its tensors changed by a function."""

    def make(kind: str, change: Callable[[dict[str, torch.Tensor]], object] | None = None, /, **fields: Any) -> Path:
        folder = Path(
            shutil.copytree(models[kind], tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}", ignore=shutil.ignore_patterns(".*"))
        )
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def opened(folder: Path) -> object:
    return open_source(folder, read_architecture(folder))


def test_a_head_beside_tied_embeddings(copy: Callable[..., Path]) -> None:
    opened(copy("qwen3-tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})))
    with pytest.raises(
        UserError, match=r"config.json: tie_word_embeddings = true, but model.safetensors has an lm_head.weight that is not the emb"
    ):
        opened(copy("qwen3-tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-6})))
    with pytest.raises(UserError, match="tie_word_embeddings = true"):
        opened(copy("qwen3", tie_word_embeddings=True))


def test_no_head_without_tied_embeddings(copy: Callable[..., Path]) -> None:
    for said in (False, None):
        with pytest.raises(UserError, match=r"tie_word_embeddings = false \(or not set\), but no file has an lm_head.weight"):
            opened(copy("qwen3-tied", tie_word_embeddings=said))


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"quantization_config \(fp8\)"),
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\)"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\)"),
        ({"load_in_4bit": True}, "of no named method"),
    ],
)
def test_quantised_weights_by_their_config(copy: Callable[..., Path], quantised: dict[str, Any], said: str) -> None:
    with pytest.raises(
        UserError, match=rf"{said}.*the weights are quantised, and training needs plain ones; use the model's unquantised weights"
    ):
        opened(copy("qwen3", quantization_config=quantised))


@pytest.mark.parametrize("mark", ["weight_scale_inv", "weight_scale", "qweight", "weight_packed", "weight.absmax", "SCB"])
def test_quantised_weights_by_their_tensors(copy: Callable[..., Path], mark: str) -> None:
    with pytest.raises(UserError, match=rf"quantised weights \(model.layers.0.mlp.up_proj.{mark} and the like\)"):
        opened(copy("qwen3", lambda t: t.update({f"model.layers.0.mlp.up_proj.{mark}": torch.ones(2)})))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_weights_of_another_type(copy: Callable[..., Path], dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match=rf"1 tensors are of type \w+ \(first: {name}\)"):
        opened(copy("qwen3", lambda t: t.update({name: t[name].to(dtype)})))


def test_every_fault_of_the_structure_is_said(copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.odd"] = torch.ones(1)
        tensors["lm_head.weight"] = torch.ones(3, 3)

    with pytest.raises(UserError) as error:
        opened(copy("qwen3", change))
    for said in (
        "1 tensors are missing: model.norm.weight",
        "model.odd (in model.safetensors)",
        "lm_head.weight has shape (3, 3); config.json asks for (300, 32)",
    ):
        assert said in str(error.value)
    with pytest.raises(UserError, match=r"num_hidden_layers = 10000, but all the weights have 25 tensors"):
        opened(copy("qwen3", num_hidden_layers=10_000, layer_types=None))


def test_an_adapter(copy: Callable[..., Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B-Base"}))
    beside = copy("qwen3")
    (beside / "adapter_config.json").write_text("{}")
    for folder, said in ((adapter, " of Qwen/Qwen3-8B-Base"), (beside, "")):
        with pytest.raises(UserError, match=f"adapter_config.json: a LoRA adapter{said}, not a whole model; merge it into its base"):
            fingerprint_model(folder)


def test_remote_code_is_said_aloud(copy: Callable[..., Path]) -> None:
    assert remote_code(copy("qwen3")) is None
    said = remote_code(
        copy(
            "qwen3",
            auto_map={"AutoModelForCausalLM": "modeling_abacus.AbacusForCausalLM", "AutoConfig": "org/repo--configuration_abacus.C"},
        )
    )
    assert said is not None
    assert "configuration_abacus.py, modeling_abacus.py): this code is not run" in said


def test_the_spelling_of_rope_is_no_other_model(copy: Callable[..., Path]) -> None:
    table = {"rope_theta": 1e6, "rope_type": "default"}
    spellings: list[dict[str, Any]] = [
        {"rope_parameters": table, "rope_theta": None}, {"rope_parameters": None, "rope_theta": 1e6}, {"rope_parameters": table, "rope_theta": 1e6},
    ]  # fmt: skip
    assert len({fingerprint_model(copy("qwen3", **fields)).config_sha256 for fields in spellings}) == 1


def test_what_transformers_loaded_is_compared_with_the_config(copy: Callable[..., Path]) -> None:
    """The loaded model stands for a version that reads other fields than the config's."""
    plain, tied = copy("qwen3"), copy("qwen3-tied")
    model = AutoModelForCausalLM.from_pretrained(plain)
    config = read_config(plain)
    for same in (config, spell_for_all(config, ""), {key: value for key, value in config.items() if key != "rope_parameters"}):
        check_loaded(model, same, "config.json")
    others: list[dict[str, Any]] = [{"rope_theta": 1e6, "rope_parameters": None}, {"rope_parameters": {"rope_theta": 10000.0} | YARN}]
    for other in others:
        with pytest.raises(UserError, match=rf"config.json: RoPE is .* but transformers {transformers.__version__} reads other fields"):
            check_loaded(model, config | other, "config.json")
    with pytest.raises(UserError, match="has an LM head of its own, but tie_word_embeddings = True"):
        check_loaded(model, config | {"tie_word_embeddings": True}, "config.json")
    with pytest.raises(UserError, match="ties the LM head to the embedding, but tie_word_embeddings = False"):
        check_loaded(AutoModelForCausalLM.from_pretrained(tied), read_config(tied) | {"tie_word_embeddings": False}, "config.json")


def test_a_teacher_may_have_what_a_student_may_not(copy: Callable[..., Path]) -> None:
    """YaRN is the engine's business, as long as every engine reads the same."""
    folder = copy("qwen3", rope_parameters=YARN | {"rope_theta": 1e6})
    with pytest.raises(UserError, match="RoPE type 'yarn' is not supported"):
        read_architecture(folder)
    TransformersEngine(EngineConfig(kind="transformers", device="cpu"), folder).close()
    with pytest.raises(UserError, match=r"rope_parameters \(yarn.*\) and rope_scaling \(default\) differ"):
        TransformersEngine(
            EngineConfig(kind="transformers", device="cpu"), copy("qwen3", rope_parameters=YARN, rope_scaling={"type": "default"})
        )


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, True),  # version 4's own default
        ({"rope_theta": 1e6, "rope_scaling": None}, True),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 5e5}, False),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": LLAMA3}, True),
        ({}, True),
    ],
)
def test_a_config_that_transformers_4_would_read_otherwise(fields: dict[str, object], same: bool) -> None:
    config = {"model_type": "qwen3", **fields}
    check_version_reads(config, "config.json", "5.19.0")
    check_version_reads(spell_for_all(config, "config.json"), "config.json", "4.57.3")  # as conversion writes it
    if same:
        check_version_reads(config, "config.json", "4.57.3")
    else:
        with pytest.raises(
            UserError, match=r"config.json: rope_parameters has .*transformers 4.57.3 reads rope_theta and rope_scaling alone"
        ):
            check_version_reads(config, "config.json", "4.57.3")
