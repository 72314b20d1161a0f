"""tools/gpu_wheels.py without an index: needs from wheels' metadata, portions, and an installation from them by the carried script."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
try:
    import gpu_wheels
finally:
    sys.path.remove(str(ROOT / "tools"))

HERE = ".".join(map(str, sys.version_info[:2]))


def make_wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = (), ballast: bytes = b"") -> Path:
    """A pure one, whose module says its version."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n".encode(),
        f"{name}_ballast.bin": ballast,
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs), ""]).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() for path, data in files.items()}
    rows = [f"{path},sha256={digests[path]},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of the index."""
    folder = tmp_path / "index"

    def download(need: Requirement, target: gpu_wheels.Target, where: Path) -> Path:
        found = [
            path for path in folder.glob("*.whl") if path.name.startswith(f"{need.name}-") and gpu_wheels._version(path) in need.specifier
        ]
        if not found:
            raise gpu_wheels.CollectError(f"{need}: no wheel")
        return max(found, key=gpu_wheels._version)

    monkeypatch.setattr(gpu_wheels, "download", download)
    return folder


def collected(needs: list[str], optional: list[str], tmp_path: Path, **have: str | None) -> tuple[set[str], dict[str, str]]:
    wheels, absent = gpu_wheels.collect(needs, optional, gpu_wheels.Target("3.12", "2.35", "x86_64", have), tmp_path)
    return {path.name.partition("-py3")[0] for path in wheels.values()}, absent


def test_what_is_needed_and_not_there_is_collected(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "a", "1.0", ("b>=1", "torch", "old; python_version < '3.12'", "c[fast]", "win; sys_platform == 'win32'"))
    make_wheel(index, "b", "2.0", ("d<2",))
    make_wheel(index, "c", "1.0", ("quick; extra == 'fast'", "slow; extra == 'other'"))
    make_wheel(index, "quick", "1.0")
    make_wheel(index, "d", "1.5")
    make_wheel(index, "d", "2.5")
    names, absent = collected(["a"], ["rival", "b"], tmp_path, torch=None)
    assert names == {"a-1.0", "b-2.0", "c-1.0", "quick-1.0", "d-1.5"}
    assert "no wheel" in absent["rival"]


def test_a_condition_known_late_brings_another_version(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "a", "1.0", ("d", "b"))
    make_wheel(index, "b", "1.0", ("d<2",))
    make_wheel(index, "d", "1.0")
    make_wheel(index, "d", "2.0")
    assert collected(["a"], [], tmp_path)[0] == {"a-1.0", "b-1.0", "d-1.0"}
    make_wheel(index, "b", "1.0", ("d<1",))
    with pytest.raises(gpu_wheels.CollectError, match="d"):
        collected(["a"], [], tmp_path)


def test_a_known_version_that_does_not_do_is_brought(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "a", "1.0", ("b>=2",))
    make_wheel(index, "b", "2.0")
    assert collected(["a"], [], tmp_path, b="1.0")[0] == {"a-1.0", "b-2.0"}
    assert collected(["a"], [], tmp_path, b="3.0")[0] == {"a-1.0"}
    assert collected(["a"], [], tmp_path, b=None)[0] == {"a-1.0"}


def test_what_the_target_has(tmp_path: Path) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("Foo_Bar==1.2  # why\n-e git+https://x\n\nlocal @ file:///wheels/x.whl\n")
    assert gpu_wheels.read_have([str(freeze), "torch,triton==3.6.0"]) == {"foo-bar": "1.2", "local": None, "torch": None, "triton": "3.6.0"}
    with pytest.raises(gpu_wheels.CollectError, match="neither"):
        gpu_wheels.read_have(["no/such/freeze.txt"])


@pytest.mark.parametrize(("text", "size"), [("60MiB", 60 << 20), ("50MB", 50_000_000), ("1000", 1000), ("1.5KiB", 1536), ("7B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert gpu_wheels.read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5MB", "60 bananas"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        gpu_wheels.read_bytes(text)


def packed(tmp_path: Path, portion: int) -> tuple[Path, dict[str, Any]]:
    """Three wheels, of which one is larger than a portion."""
    ballast = bytes(range(256)) * 400
    wheels = [
        make_wheel(tmp_path / "w", "large", "1.0", ballast=ballast * 2),
        make_wheel(tmp_path / "w", "middling", "1.0", ballast=ballast[:30000]),
        make_wheel(tmp_path / "w", "little", "1.0", ("large",)),
    ]
    output = tmp_path / "out"
    sizes = gpu_wheels.pack(wheels, output, portion, {"python": HERE})
    folders = sorted(output.glob("portion-*"))
    assert sizes == [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert max(sizes) <= portion
    return output, json.loads((folders[0] / "manifest.json").read_text())


def install(output: Path, venv: Path, *words: str, portion: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(output / f"portion-{portion}" / "install.py"), str(venv), *words], capture_output=True, text=True, timeout=300
    )


def test_portions_are_installed_without_an_index(tmp_path: Path) -> None:
    output, manifest = packed(tmp_path, 80_000)
    assert manifest["portions"] >= 3
    pieces = {file["name"].partition("-")[0]: len(file["pieces"]) for file in manifest["files"]}
    assert pieces["large"] >= 3
    assert pieces["little"] == 1
    last = output / f"portion-{manifest['portions']}"
    shutil.move(last, tmp_path / "elsewhere")
    done = install(output, tmp_path / "venv")
    assert done.returncode != 0
    assert last.name in done.stderr
    assert not (tmp_path / "venv").exists()
    shutil.move(tmp_path / "elsewhere", last)
    done = install(output, tmp_path / "venv", portion=2)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import large, little, middling, packaging, pytest; print(large.version, pytest.__file__)"  # pytest is the parent's
    python = tmp_path / "venv" / "bin" / "python"
    assert subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.startswith("1.0 ")


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    output, manifest = packed(tmp_path, 80_000)
    piece = manifest["files"][0]["pieces"][1]
    path = output / f"portion-{piece['portion']}" / piece["name"]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    done = install(output, tmp_path / "venv")
    assert done.returncode != 0
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_wheels_of_another_python_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    gpu_wheels.pack([make_wheel(tmp_path / "w", "little", "1.0")], output, 1 << 20, {"python": "2.7"})
    done = install(output, tmp_path / "venv")
    assert done.returncode != 0
    assert "Python 2.7" in done.stderr


def test_a_portion_too_small_for_its_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gpu_wheels.CollectError, match="too small"):
        gpu_wheels.pack([make_wheel(tmp_path / "w", "little", "1.0")], tmp_path / "out", 2000, {"python": HERE})


def test_the_projects_own_needs_are_read() -> None:
    names = {Requirement(need).name for need in gpu_wheels.own_needs()}
    assert {"megatron-core", "zarr", "torch", "pytest", "hypothesis", "nvidia-ml-py"} <= names
