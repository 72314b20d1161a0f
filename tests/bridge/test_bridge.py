"""Our conversion against NVIDIA's megatron-bridge: the same Megatron tensors, the same Hugging Face tensors, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, VOCAB, make_model
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_opd.cli import main

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("needs megatron-bridge: make test-bridge", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = [f"{kind}-{dtype}" for kind, dtype in itertools.product(ARCHITECTURES, DTYPES)]
VOCABULARIES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case: the model, what we make of it, and what the bridge makes (see bridge_worker.py)."""
    folder = tmp_path_factory.mktemp("bridge")
    for case in CASES:
        kind, _, dtype = case.rpartition("-")
        model = make_model(folder / case / "model", kind, layers=3, dtype=DTYPES[dtype])
        assert main(["convert", "to-mcore", str(model), str(folder / case / "mcore")]) == 0
        assert main(["convert", "to-hf", str(folder / case / "mcore"), str(folder / case / "hf")]) == 0
    worker = [sys.executable, str(Path(__file__).with_name("bridge_worker.py")), *(str(folder / case) for case in CASES)]
    result = subprocess.run(worker, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_bridge_fills_a_megatron_model_with_the_tensors_of_our_checkpoint(converted: Path, case: str) -> None:
    ours = stored_tensors(converted / case / "mcore")
    for key in VOCABULARIES:  # the bridge pads no vocabulary
        if key in ours:
            assert not ours[key][VOCAB:].any()
            ours[key] = ours[key][:VOCAB]
    assert differences(ours, load_file(converted / case / "bridge-mcore.safetensors")) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", ["bridge-hf", "loaded-hf"])
def test_the_bridge_exports_what_we_convert_to_hf(converted: Path, case: str, source: str) -> None:
    """From the model that the bridge filled, and from one of its models with our checkpoint loaded by Megatron-Core."""
    assert differences(load_file(converted / case / "hf/model.safetensors"), load_file(converted / case / f"{source}.safetensors")) == []


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, whole, read by torch alone."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(record.size, dtype=record.properties.dtype)
        for key, record in stored.items()
        if isinstance(record, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one side has, or whose dtype, shape or bits differ."""
    return sorted(ours.keys() ^ theirs.keys()) + [
        name for name in sorted(ours.keys() & theirs.keys()) if not same(ours[name], theirs[name])
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
