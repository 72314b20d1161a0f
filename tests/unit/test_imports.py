"""The import rules that let one package work in the SGLang container, in the Megatron container and on a laptop."""

from __future__ import annotations

import ast
import contextlib
import graphlib
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
    """Every module that a file imports, anywhere in it but for type checkers alone; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
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
        ("megatron_opd.report", MEGATRON | {"triton"} | SGLANG),
        ("megatron_opd.show", MEGATRON | {"triton"}),
        ("megatron_opd.api", MEGATRON | {"triton"}),
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


# From the lowest: a module imports from its own folder and from folders of earlier rows alone (docs/architecture.md).
LAYERS = [
    {"errors"},
    {"safety"},
    {"records", "store_records"},
    {"checkpoints", "cost"},
    {"recipe"},
    {"hf"},
    {"data"},
    {"model"},
    {"convert"},
    {"serve"},
    {"evaluate"},
    {"train"},
    {"api", "report", "show"},
    {"checks"},
    {"pipeline"},
    {"estimate"},
    {"simulate"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
    {"rank"},
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}


def folder_of(name: str) -> str:
    return name.split(".")[1]


def test_every_folder_has_its_row() -> None:
    assert {folder_of(name) for name in modules_of("megatron_opd") if name != "megatron_opd"} == ROW.keys()


def test_no_arrow_goes_upwards() -> None:
    """Nor sideways to another folder, but from the records of stores to those of which they are made; imports inside of functions count."""
    upwards = [
        f"{name} imports {imported}"
        for name in modules_of("megatron_opd")
        for imported in MODULES[name]
        if name != "megatron_opd" and imported in MODULES and within(imported, {"megatron_opd"}) and imported != "megatron_opd"
        if folder_of(imported) != folder_of(name) and ROW[folder_of(imported)] >= ROW[folder_of(name)]
    ]
    assert upwards == ["megatron_opd.store_records imports megatron_opd.records"]


def test_no_modules_import_each_other() -> None:
    """In however many steps. A module needs its package, which may export it."""
    graph = {
        name: {imported for imported in found if imported in MODULES and not within(name, {imported})} for name, found in MODULES.items()
    }
    with contextlib.suppress(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
        pytest.fail("a cycle is not noticed")
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("package", ["megatron_opd.recipe", "megatron_opd.hf", "megatron_opd.checkpoints"])
def test_what_every_command_reads_needs_no_heavy_library(package: str) -> None:
    heavy = {"torch", "zarr", "megatron", "transformer_engine", "triton"} | SGLANG
    for start in modules_of(package):
        for name in closure(start):
            bad = {imported for imported in MODULES[name] if within(imported, heavy)}
            assert not bad, f"{start} needs {name}, which imports {', '.join(sorted(bad))}"


def test_only_the_command_line_sees_everything() -> None:
    importers = {name for name, imported in MODULES.items() if "megatron_opd.cli" in imported}
    assert importers <= {"megatron_opd.__main__"}
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
        ("megatron_opd.show.inspect", ["torch", "megatron", "sglang", "transformers"]),
        ("megatron_opd.api.writing", ["torch", "megatron", "sglang", "transformers", "pyarrow"]),
        ("megatron_opd.hf.lineage", ["torch", "zarr", "megatron", "sglang", "transformers"]),
        ("megatron_opd.serve.score", ["megatron", "sglang", "triton"]),
    ],
)
def test_what_a_running_process_has_loaded(module: str, forbidden: list[str]) -> None:
    """The same rules as they come out: a command that does not need a library does not wait for it."""
    code = f"import sys, {module}; print([name for name in {forbidden} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
