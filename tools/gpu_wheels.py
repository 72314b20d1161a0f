#!/usr/bin/env python3
"""Collects the wheels that `make gpu-check` wants on a machine without a network, in portions of a given size.

    python tools/gpu_wheels.py build/gpu-wheels --python 3.12 --have torch,triton,transformers,numpy
    python tools/gpu_wheels.py build/gpu-wheels --have freeze.txt --portion 60MiB          # `pip freeze` of that machine: versions count, too

OUTPUT/portion-1, portion-2, ... hold wheels, `manifest.json` (sizes, SHA-256) and `install.py`, which makes a virtual environment over the
machine's own packages: carry the portions into one folder and run `python portion-1/install.py VENV`. A wheel larger than a portion is
split, and joined again by install.py. Needs come from the wheels' own metadata, with the markers of the target's Python; what the target
has is left out, unless its version is known and does not do. Contestants of the benchmarks that have no wheel are named and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
INSTALLER = Path(__file__).with_name("gpu_wheels_install.py")
# Beside the project's own dependencies: what the checks are made with.
CHECKS = ("nvidia-ml-py>=12", "pytest>=8", "hypothesis>=6.100", "httpx>=0.27")
# What the benchmarks compare with; with their needs only as far as wheels without needs load.
CONTESTANTS = ("liger-kernel", "cut-cross-entropy", "verl")
TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-cu13")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ROUNDS = 12  # of asking for other versions, as further wheels' needs become known


class CollectError(Exception):
    """What keeps the wheels from being collected, for the user."""


@dataclass(frozen=True)
class Target:
    """The machine: Python "3.12", glibc "2.39", and what it has (None: of unknown version)."""

    python: str
    glibc: str
    machine: str
    have: dict[str, str | None] = field(default_factory=dict)

    def pip_options(self) -> list[str]:
        """pip takes a platform's tag at its word, so every older glibc is named, too."""
        major, minor = map(int, self.glibc.split("."))
        tags = [f"manylinux_{major}_{n}_{self.machine}" for n in range(minor, 4, -1)]
        tags += [f"manylinux{year}_{self.machine}" for year in ("2014", "2010", "1")]
        return ["--python-version", self.python, "--implementation", "cp", *(word for tag in tags for word in ("--platform", tag))]

    def environment(self) -> dict[str, str]:
        """What markers such as `python_version < "3.12"` are asked of."""
        here: dict[str, Any] = {**default_environment()}
        return here | {
            "python_version": self.python, "python_full_version": f"{self.python}.0", "implementation_version": f"{self.python}.0",
            "platform_machine": self.machine, "platform_system": "Linux", "sys_platform": "linux", "os_name": "posix",
            "platform_python_implementation": "CPython", "implementation_name": "cpython",
        }  # fmt: skip

    def provides(self, name: str, wanted: SpecifierSet) -> bool:
        if name not in self.have:
            return False
        version = self.have[name]
        return version is None or wanted.contains(Version(version), prereleases=True)


@dataclass(frozen=True)
class Piece:
    """A part of a wheel in one portion; most wheels are one piece, of their own name."""

    portion: int
    name: str
    bytes: int
    sha256: str


def read_have(words: Sequence[str]) -> dict[str, str | None]:
    """Names, `name==version`, or files of such lines (pip freeze). Raises CollectError for a line that is neither."""
    found: dict[str, str | None] = {}
    for word in (part for given in words for part in given.split(",") if part):
        lines = Path(word).read_text(encoding="utf-8").splitlines() if Path(word).is_file() else [word]
        for line in lines:
            text = line.partition("#")[0].strip()
            if not text or text.startswith("-"):  # "-e git+..."
                continue
            try:
                need = Requirement(text)
            except InvalidRequirement as error:
                raise CollectError(f"--have {word}: {text!r} is neither a file nor 'name' or 'name==version' ({error})") from None
            version = next((one.version for one in need.specifier if one.operator == "=="), None)
            found[canonicalize_name(need.name)] = version
    return found


def own_needs() -> list[str]:
    """The project's dependencies and what its checks are made with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *CHECKS]


def needs_of(wheel: Path, extras: set[str], environment: dict[str, str]) -> list[Requirement]:
    """Requires-Dist of a wheel, as far as its markers hold."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found = []
    for line in metadata.get_all("Requires-Dist") or []:
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate(environment | {"extra": extra}) for extra in {"", *extras}):
            found.append(need)
    return found


def download(need: Requirement, target: Target, folder: Path) -> Path:
    """The newest wheel that fits. Raises CollectError where the index has none."""
    word = f"{need.name}{need.specifier}"
    with_folder = folder / f"one-{canonicalize_name(need.name)}"
    shutil.rmtree(with_folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, *target.pip_options(), "--dest", str(with_folder), word], capture_output=True, text=True)
    wheels = list(with_folder.glob("*.whl")) if with_folder.exists() else []
    if done.returncode or len(wheels) != 1:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip found none")
        raise CollectError(f"{word}: no wheel for Python {target.python}, {target.machine}: {reason.removeprefix('ERROR: ')}")
    return wheels[0]


def collect(needs: Sequence[str], optional: Sequence[str], target: Target, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Wheels by name of all that `needs` lead to and the target lacks, and of `optional` (without their needs): why some are absent.

    Raises CollectError where a needed wheel does not exist, or needs contradict each other.
    """
    environment = target.environment()
    wheels: dict[str, Path] = {}
    for _ in range(_ROUNDS):
        wanted = _closure([Requirement(need) for need in needs], wheels, target, environment)
        lacking = [need for name, need in wanted.items() if name not in wheels or _version(wheels[name]) not in need.specifier]
        wheels = {name: wheel for name, wheel in wheels.items() if name in wanted}
        if not lacking:
            break
        for need in lacking:
            print(f"{need.name}{need.specifier}", flush=True)
            wheels[canonicalize_name(need.name)] = download(need, target, folder)
    else:
        raise CollectError("the needs of the wheels contradict each other: " + ", ".join(map(str, lacking)))
    absent = {}
    for word in optional:
        name = canonicalize_name(Requirement(word).name)
        if name not in wheels and not target.provides(name, SpecifierSet()):
            try:
                wheels[name] = download(Requirement(word), target, folder)
            except CollectError as error:
                absent[name] = str(error)
    return wheels, absent


def _closure(needs: list[Requirement], wheels: dict[str, Path], target: Target, environment: dict[str, str]) -> dict[str, Requirement]:
    """All that is wanted and the target has not, by name, each with everybody's conditions, as far as the wheels at hand tell."""
    wanted: dict[str, Requirement] = {}
    queue = [need for need in needs if need.marker is None or need.marker.evaluate(environment)]
    met: set[tuple[str, frozenset[str]]] = set()
    while queue:
        need = queue.pop()
        name = canonicalize_name(need.name)
        if name not in wanted and target.provides(name, need.specifier):
            continue
        before = wanted.get(name)
        conditions = need.specifier if before is None else before.specifier & need.specifier
        wanted[name] = Requirement(f"{need.name}{conditions}")
        key = name, frozenset(need.extras)
        if name in wheels and key not in met:
            met.add(key)
            queue += needs_of(wheels[name], need.extras, environment)
    return wanted


def _version(wheel: Path) -> Version:
    return parse_wheel_filename(wheel.name)[1]


def pack(wheels: Sequence[Path], output: Path, portion: int, about: dict[str, Any]) -> list[int]:
    """Lay the wheels into OUTPUT/portion-N, the largest first, each portion at most `portion` bytes; returns their sizes.

    Wheels that fit in none are cut into pieces of whole portions. OUTPUT's earlier portions are replaced.
    """
    reserve = 1 << 16 if portion > 1 << 20 else portion // 8  # for install.py and the manifest
    room = portion - reserve
    for old in output.glob("portion-*"):
        shutil.rmtree(old)
    used: list[int] = []
    files = []

    def place(data: bytes, name: str) -> Piece:
        number = next((n for n, size in enumerate(used) if size + len(data) <= room), len(used))
        if number == len(used):
            used.append(0)
        used[number] += len(data)
        folder = output / f"portion-{number + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return Piece(number + 1, name, len(data), hashlib.sha256(data).hexdigest())

    for wheel in sorted(wheels, key=lambda path: (-path.stat().st_size, path.name)):
        data = wheel.read_bytes()
        starts = range(0, len(data), room)
        pieces = [
            place(data[start : start + room], wheel.name if len(starts) == 1 else f"{wheel.name}.part{number:02d}")
            for number, start in enumerate(starts)
        ]
        if len(pieces) > 1:
            print(f"{wheel.name}: {len(data) / 2**20:.0f} MiB do not fit a portion; in {len(pieces)} pieces, which install.py joins")
        files.append(
            {"name": wheel.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pieces": [asdict(p) for p in pieces]}
        )
    manifest = json.dumps({**about, "portions": len(used), "portion_bytes": portion, "files": files}, indent=1) + "\n"
    sizes = []
    for number in range(1, len(used) + 1):
        folder = output / f"portion-{number}"
        (folder / "manifest.json").write_text(manifest, encoding="utf-8")
        shutil.copyfile(INSTALLER, folder / "install.py")
        sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
    if any(size > portion for size in sizes):
        raise CollectError(f"--portion {portion} is too small: the manifest alone takes {len(manifest)} bytes")
    return sizes


def read_bytes(text: str) -> int:
    """60MiB, 50MB or 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.strip().upper())
    if not found or found[2] not in _UNITS | {"B": 1} or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 60MiB, 50MB or 1000000")
    return int(float(found[1]) * ({**_UNITS, "B": 1})[found[2]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--python", default="3.12", help="of the target (default: 3.12)")
    parser.add_argument("--glibc", default="2.35", help="of the target, at least (default: 2.35)")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument(
        "--have",
        nargs="+",
        default=["torch,triton"],
        help="what the target has: names, name==version, or a pip freeze (default: torch,triton)",
    )
    parser.add_argument("--portion", type=read_bytes, default=60 << 20, help="bytes of a portion at most (default: 60MiB)")
    parser.add_argument("--needs", nargs="+", help="these instead of the project's dependencies and the checks'")
    parser.add_argument(
        "--contestants", nargs="*", default=list(CONTESTANTS), help=f"without their needs (default: {' '.join(CONTESTANTS)})"
    )
    parser.add_argument("--transformer-engine", metavar="VERSION", help="its wheels, too; the compiled half for PyTorch comes with --wheel")
    parser.add_argument("--wheel", nargs="+", type=Path, default=[], help="wheels of your own, such as a built transformer_engine_torch")
    args = parser.parse_args()
    try:
        sizes, absent, manifest = make(args)
    except CollectError as error:
        raise SystemExit(f"gpu-wheels: {error}") from None
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    for number, size in enumerate(sizes, 1):
        print(f"{args.output / f'portion-{number}'}: {size / 2**20:.1f} MiB")
    print(f"{manifest} wheels in {len(sizes)} portions; there: python portion-1/install.py VENV")


def make(args: argparse.Namespace) -> tuple[list[int], dict[str, str], int]:
    """Sizes of the portions, what is left out and why, and how many wheels there are. Raises CollectError."""
    target = Target(args.python, args.glibc, args.machine, read_have(args.have))
    for wheel in args.wheel:
        if not wheel.is_file():
            raise CollectError(f"--wheel {wheel}: no such file")
    engine = [f"{name}=={args.transformer_engine}" for name in TRANSFORMER_ENGINE] if args.transformer_engine else []
    downloads = args.output / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        wheels, absent = collect(args.needs or own_needs(), [*args.contestants, *engine], target, downloads)
        given = {canonicalize_name(parse_wheel_filename(wheel.name)[0]): wheel for wheel in args.wheel}
        every = list((wheels | given).values())
        about = {"python": target.python, "glibc": target.glibc, "machine": target.machine, "left_out": absent}
        return pack(every, args.output, args.portion, about), absent, len(every)
    finally:
        shutil.rmtree(downloads)


if __name__ == "__main__":
    main()
