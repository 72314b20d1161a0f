"""The import rules that let one package work in the SGLang container, in the Megatron container and on a laptop."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_opd"
KERNELS = ROOT / "kernels" / "opd_kernels"
SGLANG = {"sglang"}
MEGATRON = {"megatron.core", "megatron.training", "transformer_engine"}


def module_name(path: Path) -> str:
    relative = path.relative_to(KERNELS.parent if path.is_relative_to(KERNELS) else ROOT).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def within_any(names: set[str], roots: set[str]) -> bool:
    return any(within(name, roots) for name in names)


MODULES = {module_name(path): imports(path) for folder in (PACKAGE, KERNELS) for path in sorted(folder.rglob("*.py"))}


def modules_of(package: str) -> list[str]:
    return [name for name in MODULES if within(name, {package})]


def closure(start: str) -> set[str]:
    """Modules of ours that `start` imports, directly or through others; those imported only inside of functions too."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [imported for imported in MODULES[name] if imported in MODULES]
    return seen


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("megatron_opd.data", {"torch", "megatron", "transformer_engine", "transformers"} | SGLANG),
        ("megatron_opd.serve", {"megatron", "transformer_engine", "triton", "opd_kernels"}),
        ("megatron_opd.model", SGLANG | {"zarr"}),
        ("megatron_opd.train", SGLANG | {"zarr"}),
        ("megatron_opd.convert", SGLANG | {"zarr"}),
    ],
)
def test_a_package_does_not_import(package: str, forbidden: set[str]) -> None:
    assert modules_of(package), f"no package {package}"
    for name in modules_of(package):
        bad = {imported for imported in MODULES[name] if within(imported, forbidden)}
        assert not bad, f"{name} imports {', '.join(sorted(bad))}"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("megatron_opd.data", {"torch", "megatron"} | SGLANG),
        ("megatron_opd.serve", MEGATRON | {"triton"}),
        ("megatron_opd.evaluate", MEGATRON | {"triton"}),
        ("megatron_opd.train", SGLANG),
        ("megatron_opd.convert", SGLANG),
    ],
)
def test_nor_do_the_modules_that_it_imports(package: str, forbidden: set[str]) -> None:
    for start in modules_of(package):
        for name in closure(start):
            bad = {imported for imported in MODULES[name] if within(imported, forbidden)}
            assert not bad, f"{start} needs {name}, which imports {', '.join(sorted(bad))}"


def test_the_kernels_import_torch_and_triton_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "opd_kernels"}
    assert modules_of("opd_kernels")
    for name in modules_of("opd_kernels"):
        bad = {imported for imported in MODULES[name] if not within(imported, allowed)}
        assert not bad, f"{name} imports {', '.join(sorted(bad))}"


STANDS_ALONE = {
    f"megatron_opd.{name}"
    for name in (
        "records",
        "store_records",
        "config",
        "cluster",
        "inference",
        "layout",
        "objective",
        "paths",
        "redact",
        "errors",
        "untrusted",
    )
}


@pytest.mark.parametrize("name", sorted(STANDS_ALONE))
def test_records_and_config_stand_alone(name: str) -> None:
    ours = {imported for imported in MODULES[name] if imported in MODULES}
    assert ours <= STANDS_ALONE - {"megatron_opd.config"}


def test_only_the_command_line_sees_everything() -> None:
    importers = {name for name, imported in MODULES.items() if "megatron_opd.cli" in imported}
    assert importers <= {"megatron_opd.__main__", "megatron_opd.pipeline.run"}
    importers = {name for name, imported in MODULES.items() if within_any(imported, {"megatron_opd.commands"})}
    assert importers - set(modules_of("megatron_opd.commands")) <= {"megatron_opd.cli"}


def test_no_package_named_kernels() -> None:
    """Hugging Face ships one of that name; ours would stand before it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("megatron_opd.cli", ["torch", "zarr", "megatron", "sglang", "transformers"]),
        ("megatron_opd.pipeline.plan", ["torch", "megatron", "sglang", "transformers"]),
        ("megatron_opd.data.store", ["torch", "megatron", "sglang", "transformers"]),
        ("megatron_opd.data.inspect", ["torch", "megatron", "sglang", "transformers"]),
        ("megatron_opd.lineage", ["torch", "zarr", "megatron", "sglang", "transformers"]),
        ("megatron_opd.serve.score", ["megatron", "sglang", "triton"]),
    ],
)
def test_what_a_running_process_has_loaded(module: str, forbidden: list[str]) -> None:
    """The same rules as they come out: a command that does not need a library does not wait for it."""
    code = f"import sys, {module}; print([name for name in {forbidden} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
