"""Hugging Face to Megatron-Core and back: the same tensors bit for bit, in the stored dtype, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, make_model

from megatron_opd.cli import main
from megatron_opd.lineage import fingerprint_model, hash_tensors


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_is_bit_exact(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "model", kind, dtype=dtype)
    assert main(["convert", "to-mcore", str(model), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert hash_tensors(tmp_path / "back") == hash_tensors(model)
    assert fingerprint_model(tmp_path / "back", name="x") == fingerprint_model(model, name="x")


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    assert main(["convert", "to-mcore", str(model), str(model)]) == 2
    assert "not empty" in capsys.readouterr().err
