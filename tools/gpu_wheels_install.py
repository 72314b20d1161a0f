#!/usr/bin/env python3
"""Installs portions of wheels (tools/gpu_wheels.py) without a network: python portion-1/install.py VENV [--partial]

Looks at all portion-* folders beside its own. Checks every file against the manifest, joins wheels that were split, makes a virtual
environment that sees this Python's own packages, and installs the wheels into it as they are. --partial: those that are whole, when
portions are still to come. Needs this Python and its pip alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--partial", action="store_true")
    args = parser.parse_args()
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    version = ".".join(map(str, sys.version_info[:2]))
    if version != manifest["python"]:
        raise SystemExit(f"these wheels are for Python {manifest['python']}, this is {version}: run install.py with that Python")
    with tempfile.TemporaryDirectory() as folder:
        wheels, lacking = gather(manifest, Path(folder))
        if lacking and not args.partial:
            raise SystemExit(f"not here yet, or cut: {', '.join(lacking)}; bring these portions, or install the rest with --partial")
        make_venv(args.venv)
        install(args.venv, wheels)
    print(f"{len(wheels)} of {len(manifest['files'])} wheels are in {args.venv}{': to come: ' + ', '.join(lacking) if lacking else ''}")


def gather(manifest: dict[str, Any], folder: Path) -> tuple[list[Path], list[str]]:
    """The wheels that are whole, joined in `folder`, and which portions the others are waiting for. Raises SystemExit for changed bytes."""
    wheels, lacking = [], set()
    for file in manifest["files"]:
        paths = [HERE.parent / f"portion-{piece['portion']}" / piece["name"] for piece in file["pieces"]]
        missing = {piece["portion"] for piece, path in zip(file["pieces"], paths, strict=True) if size(path) != piece["bytes"]}
        if missing:
            lacking |= missing
            continue
        wheel, digest = folder / file["name"], hashlib.sha256()
        with wheel.open("wb") as joined:
            for path in paths:
                data = path.read_bytes()
                digest.update(data)
                joined.write(data)
        if digest.hexdigest() != file["sha256"]:
            raise SystemExit(f"{file['name']}: SHA-256 is not the manifest's; carry {', '.join(map(str, paths))} again")
        wheels.append(wheel)
    return wheels, [f"portion-{number}" for number in sorted(lacking)]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def make_venv(venv: Path) -> None:
    """Over this Python's packages, which come after its own."""
    python = venv / "bin" / "python"
    if python.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(venv)], check=True)
    if sys.prefix != sys.base_prefix:  # venv passes on the packages of the base Python, not those of an environment like this one
        own = Path(ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (own / "parent_environment.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")


def install(venv: Path, wheels: list[Path]) -> None:
    """With this Python's pip, into the other's folder. Wheels alone, no index, no needs: they were worked out before."""
    if not wheels:
        return
    options = ["--no-index", "--no-deps", "--no-cache-dir", "--no-compile", "--disable-pip-version-check", "--ignore-installed", "--quiet"]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise SystemExit(f"{sys.executable} has no pip: python -m ensurepip, or another Python with the same packages")
    command = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", *options, *map(str, wheels)]
    if subprocess.run(command).returncode:
        raise SystemExit("pip could not install the wheels; its message is above")


def ask(python: Path, code: str) -> str:
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
