"""Whatever the locale, text is UTF-8: recipes, prompts, names of files, the command line, and what is stored and printed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_base
from transformers import AutoTokenizer

from megatron_opd.data.store import StoreReader

ROOT = Path(__file__).resolve().parents[2]
TEXT = "für 你好"
# Python would put UTF-8 in the place of the C locale by itself.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def latin1(folder: Path) -> dict[str, str]:
    """Variables of a Latin-1 locale made in `folder`."""
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/charmaps/ISO-8859-1.gz").exists():
        pytest.skip("no Latin-1 locale can be made: Debian's package 'locales' is not installed")
    subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")], check=False, capture_output=True)
    return {"LC_ALL": "de_DE.ISO-8859-1", "LOCPATH": str(folder), "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("name", ["ascii", "latin1"])
def test_text_is_utf8_whatever_the_locale(tmp_path: Path, name: str) -> None:
    environment = latin1(tmp_path) if name == "latin1" else ASCII
    probe = [sys.executable, "-c", "import locale; print(locale.getencoding())"]
    found = subprocess.run(probe, capture_output=True, text=True, check=True, env=os.environ | environment).stdout
    assert "UTF-8" not in found  # or the test shows nothing
    folder = tmp_path / TEXT
    folder.mkdir()
    make_base(folder / "student", layers=1)
    (folder / "prompts.jsonl").write_bytes(json.dumps({"prompt": [{"role": "user", "content": TEXT}]}, ensure_ascii=False).encode() + b"\n")
    recipe = (
        f'name = "t"\nrun_dir = "{folder}/run"\n[models]\nteacher = "{folder}/student"\nstudent = "{folder}/student"\n'
        f'[rollout]\nmodel = "{folder}/student"\nprompts = "{folder}/prompts.jsonl"\nsampling = {{ max_new_tokens = 2 }}\n'
    )
    (folder / "recipe.toml").write_bytes(recipe.encode())
    command = [sys.executable, "-m", "megatron_opd", "rollout", str(folder / "recipe.toml"), f"rollout.encoding.system='{TEXT}!'"]
    run = subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=300)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    assert f"prompts of {folder}/prompts.jsonl" in run.stdout.decode()
    reader = StoreReader(str(folder / "run" / "rollouts.opd.zarr"))
    assert reader.manifest.encoding["system"] == f"{TEXT}!"
    rollout = reader.rollout(0)
    text = AutoTokenizer.from_pretrained(str(folder / "student")).decode(rollout.tokens[: rollout.prompt_len])
    assert text == f"<|im_start|>system\n{TEXT}!<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"


def opens_text_by_locale(call: ast.Call) -> bool:
    """read_text, write_text and open in text mode without an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (0 if name == "read_text" else 1)
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
    return name == "open" and any(mode in ("r", "w", "a", "x", "r+", "w+", "a+") for mode in modes)


def test_no_text_is_read_or_written_by_the_locale() -> None:
    """Programs that use the package from Python are not begun anew in UTF-8 mode."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("megatron_opd", "kernels", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and opens_text_by_locale(node)
    ]
    assert found == []
