"""What a simulation needs besides the project's own packages: a CPU build of torch, a C++ compiler, Transformer Engine's Python half. No torch here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_opd.errors import UserError

HERE = Path(__file__).parent
GUARD_SOURCE = HERE / "guard.cpp"
CHECKOUT = HERE.parents[1]
TABLE_VERSION = "2.20.2"  # of Transformer Engine, whose compiled half te-VERSION.json describes
# As in the Makefile: with them it can be imported, whose own needs are not wanted here.
TE_PACKAGES = (
    *(f"transformer-engine=={TABLE_VERSION}", f"transformer-engine-cu13=={TABLE_VERSION}", "importlib-metadata==10.2.0", "zipp==4.1.2"),
    *("onnxscript==0.7.2", "onnx==1.23.2", "nvdlfw-inspect==0.2.2", "ml_dtypes==0.6.0", "onnx_ir==1.1.0"),
)
_COMPILERS = ("c++", "g++", "clang++")


def find_compiler() -> str:
    """$CXX or the first compiler on the path. Raises UserError where there is none."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise UserError(
        f"a simulation needs a C++ compiler (looked for {', '.join(wanted)}): apt-get install g++, or set CXX to one; "
        "the estimate without --simulate needs none"
    )


def find_transformer_engine() -> str | None:
    """A path to add to PYTHONPATH so that `transformer_engine` is found; "" where it is found already, None where there is none.

    The folder of the checkout that `make te` makes, `.te-VERSION`, goes before another version than the table's; so put the path first.
    """
    found = importlib.util.find_spec("transformer_engine") is not None
    if found and _installed_version() == TABLE_VERSION:
        return ""
    folder = CHECKOUT / f".te-{TABLE_VERSION}"
    if (folder / "transformer_engine").is_dir():
        return str(folder)
    return "" if found else None


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_transformer_engine() -> None:
    """Raise UserError unless the Transformer Engine that this process finds is the one that the table of its functions is of."""
    version = _installed_version()
    if version is None:
        raise UserError(no_transformer_engine())
    if version != TABLE_VERSION:
        raise UserError(
            f"Transformer Engine {version} is installed, and the functions of {TABLE_VERSION} are what can be stood in for: "
            f"{_how_to_install()}; or read those of another version with tools/te_signatures.py"
        )


def python_path() -> str:
    """PYTHONPATH of a simulation of Transformer Engine's layers. Raises UserError where its Python half is missing."""
    if (found := find_transformer_engine()) is None:
        raise UserError(no_transformer_engine())
    return os.pathsep.join(filter(None, (found, os.environ.get("PYTHONPATH"))))


def no_transformer_engine() -> str:
    return (
        f"a simulation of Transformer Engine's layers needs its Python half, {TABLE_VERSION} (no GPU, 0.4 GB of disk): {_how_to_install()}; "
        "or simulate Megatron-Core's local layers with --no-te"
    )


def _how_to_install() -> str:
    """`make te` in a checkout; without one, what it does."""
    if (CHECKOUT / "Makefile").is_file():
        return "make te"
    return f"pip install --no-deps --target FOLDER {' '.join(TE_PACKAGES)}, and FOLDER first in PYTHONPATH"


def torch_folder() -> Path:
    """Of the torch that this process would import."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("a simulation needs torch: pip install torch")
    return Path(spec.origin).parent


def check_torch() -> None:
    """Raise UserError for a torch that is built for CUDA: the guard takes the place of CUDA's own, and can't stand beside it."""
    built_for = re.search(
        r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", (torch_folder() / "version.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if built_for:
        raise UserError(
            f"a simulation needs a PyTorch without CUDA, this one is built for CUDA {built_for[1]}: install torch's CPU build in an "
            "environment of its own"
        )


def build_guard() -> Path:
    """The compiled guard for this torch, kept in the user's cache. Raises UserError for a torch with CUDA, or if it does not compile."""
    check_torch()
    torch = torch_folder()
    digest = hashlib.sha256()
    for part in (GUARD_SOURCE.read_bytes(), (torch / "version.py").read_bytes(), str(torch).encode()):
        digest.update(part)
    library = _cache() / f"guard-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [
            find_compiler(),
            *("-std=c++20", "-O1", "-shared", "-fPIC", str(GUARD_SOURCE)),
            *(f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-L{torch / 'lib'}"),
            *("-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}", "-o", str(made)),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if re.search(r"error", line)] or result.stderr.splitlines()
            raise UserError(
                f"{command[0]} could not compile {GUARD_SOURCE} for this torch: {' '.join(errors[:2])}; set CXX to one of C++20"
            )
        made.replace(library)
    return library


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "megatron_opd"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written to") from None
    return folder


def check_before_torch() -> None:
    """Raise RuntimeError where torch is imported already: autograd's engine asks for its devices once."""
    if "torch" in sys.modules:
        raise RuntimeError("megatron_opd.simulate.gpu must be imported before torch")
