"""docs/python.md and docs/explore_a_store.ipynb do what they say: every block and cell is run, in order, in an empty folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_all(blocks: list[str], name: str) -> dict[str, Any]:
    """One program in pieces; the namespace that it leaves."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), space)
    return space


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    space = run_all(BLOCKS, "docs/python.md")
    said = capsys.readouterr().out
    assert "declare it: sft_teacher=DIR" in said
    assert "<Store rollouts.opd.zarr: 12 rollouts, scored by teacher>" in said
    assert re.search(r"\[(True|False), (True|False)\]", said)
    assert 0 < abs(space["reverse_kl"]) < 5
    assert space["store"].reader.verify() == []
    section = (DOCS / "python.md").read_text(encoding="utf-8").partition("| by rollout |")[2].partition("\n\n")[0]
    named = [
        name.replace("NAME", "teacher")
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall("`(.*?)`", row)
    ]
    assert named == space["table"].column_names


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code cells as one program: nothing but figures needs Jupyter."""
    notebook = json.loads((DOCS / "explore_a_store.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "clear the outputs before you commit"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    space = run_all(["".join(cell["source"]) for cell in cells], "docs/explore_a_store.ipynb")
    said = capsys.readouterr().out
    assert "of 48 responses ended by themselves" in said
    assert "right: " in said
    html = space["worst"]._repr_html_()
    assert html.count("<p ") == 10
    assert "nats'>" in html


def test_the_package_alone_imports_nothing() -> None:
    code = "import sys, megatron_opd; print(sorted({'numpy', 'zarr', 'torch', 'pydantic'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout.strip()
    assert found == "[]"


def test_every_name_of_the_api_is_there() -> None:
    import megatron_opd

    assert all(getattr(megatron_opd, name).__name__ == name for name in megatron_opd.__all__)
    assert {*megatron_opd.__all__} <= {*dir(megatron_opd)}
    with pytest.raises(AttributeError, match="no attribute 'opn_store'"):
        _ = megatron_opd.opn_store
