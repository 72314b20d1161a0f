"""Compiles every variant of the Triton kernels without a GPU and reads registers, spills, shared memory and instructions.

    python tools/compile_kernels.py --arch 80 90 100 --output docs/results/kernels-compiled.json

Exits with 1 if a kernel spills registers or lost its 16-byte loads and stores. `--fast` compiles one variant of each kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # isort: skip
import triton  # isort: skip
from opd_kernels import triton_kernels as kernels  # isort: skip
from triton import knobs  # isort: skip
from triton.backends.compiler import GPUTarget  # isort: skip
from triton.compiler import ASTSource  # isort: skip

ITEM_BYTES = {"bf16": 2, "fp32": 4}
_INTEGERS = {"stride_z", "stride_out", "N", "V", "num_real", "vocab_start"}
# The JIT compiles for arguments that divide by 16 where they do: pointers, and widths and strides of real vocabularies.
_ALIGNED = {"stride_z", "stride_out", "V"}
_POINTERS = {"ids_ptr": "*i64", "mask_ptr": "*u8"}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled; `z` is the dtype of the logits."""

    kernel: str
    z: str
    k: int
    entropy: bool
    mask: bool

    def source(self) -> tuple[ASTSource, int]:
        """What triton compiles, and its number of warps."""
        function = getattr(kernels, self.kernel)
        constants = {"HAS_MASK": self.mask, "WITH_ENTROPY": self.entropy, "K": self.k, "KP": triton.next_power_of_2(self.k)}
        constants |= {"TILE": kernels.FORWARD_TILE, "LANES": kernels.LOAD_BYTES // ITEM_BYTES[self.z], "BLOCK": kernels.BACKWARD_BLOCK}
        warps = {"stats_kernel": kernels.FORWARD_WARPS, "gradient_kernel": kernels.BACKWARD_WARPS, "chosen_kernel": kernels.CHOSEN_WARPS}
        names = function.arg_names
        constexprs = {(position,): constants[name] for position, name in enumerate(names) if name in constants}
        aligned = [position for position, name in enumerate(names) if name.endswith("_ptr") or name in _ALIGNED]
        return ASTSource(
            fn=function,
            signature={name: self._type(name) for name in names},
            constexprs=constexprs,
            attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
        ), warps[self.kernel]

    def _type(self, name: str) -> str:
        if name.isupper() and name not in _INTEGERS:
            return "constexpr"
        if name in ("z_ptr", "out_ptr"):
            return f"*{self.z}"
        if name.endswith("_ptr"):
            return _POINTERS.get(name, "*fp32")
        return "i32" if name in _INTEGERS else "fp32"


@dataclass(frozen=True)
class Compiled:
    """Of the machine code: registers a thread, bytes spilled and of shared memory, and static counts of instructions.

    loop_instructions: of the longest loop, 0 without one; in `stats_kernel` that is a tile, TILE x LANES columns of all threads.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    warps: int
    instructions: int
    loop_instructions: int
    wide_loads: int
    wide_stores: int
    loads: int
    stores: int
    exponentials: int
    barriers: int


def variants(fast: bool) -> Iterator[Variant]:
    """Every variant: dtype, K, entropy, mask; `gradient_kernel` has no K."""
    for z, k, entropy, mask in itertools.product(ITEM_BYTES, (1, 65), (True, False), (True, False)):
        if fast and (z, entropy, mask) != ("bf16", True, True):
            continue
        yield Variant("stats_kernel", z, k, entropy, mask)
        yield Variant("chosen_kernel", z, k, entropy, mask)
        if k == 1:
            yield Variant("gradient_kernel", z, k, entropy, mask)


def disassemble(variant: Variant, arch: int, **options: Any) -> tuple[Any, str]:
    """What triton makes of `variant` for sm_`arch`, and its machine code (SASS) as text."""
    source, warps = variant.source()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, **kernels.OPTIONS, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        return compiled, subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_variant(variant: Variant, arch: int, **options: Any) -> Compiled:
    """Compile for sm_`arch` and measure. Raises RuntimeError with the assembler's output if it refuses."""
    return measure(*disassemble(variant, arch, **options), variant, arch)


def measure(compiled: Any, sass: str, variant: Variant, arch: int) -> Compiled:
    """Read the machine code. Raises RuntimeError with the assembler's output if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        assembler = _assemble(compiled.asm["ptx"], arch, Path(folder))
    registers = re.search(r"Used (\d+) registers", assembler)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", assembler)
    assert registers is not None, assembler
    assert spills is not None, assembler
    codes = [code for _, code in instructions(sass)]
    assert codes, sass
    loop = longest_loop(sass)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, code) is not None for code in codes)

    return Compiled(
        registers=int(registers[1]),
        stack=int(spills[1]),
        spill_stores=int(spills[2]),
        spill_loads=int(spills[3]),
        shared=compiled.metadata.shared,
        warps=variant.source()[1],
        instructions=sum(code != "NOP" for code in codes),
        loop_instructions=sum(address in loop for address, _ in instructions(sass)),
        wide_loads=count(r"LDG\.E.*\.128"),
        wide_stores=count(r"STG\.E.*\.128"),
        loads=count(r"LDG"),
        stores=count(r"STG"),
        exponentials=count(r"MUFU\.EX2"),
        barriers=count(r"BAR\."),
    )


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and operation of each instruction, predicates left out."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return [(int(address, 16), code) for address, code in found]


def branches(sass: str) -> list[tuple[int, int]]:
    """Addresses of each branch and of its target."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s.*\bBRA\b.*?\b0x([0-9a-f]+)", sass, re.MULTILINE)
    return [(int(origin, 16), int(target, 16)) for origin, target in found]


def longest_loop(sass: str) -> range:
    """Addresses from a branch's target to a branch back to it; empty without a loop."""
    addresses = [address for address, _ in instructions(sass)]
    spans = [range(target, origin + 1) for origin, target in branches(sass)]
    return max((span for span in spans if len(span) > 1), key=lambda span: sum(address in span for address in addresses), default=range(0))


def assemblers() -> dict[str, str]:
    """Releases of the two assemblers that triton takes, by name."""
    found = {}
    for name, tool in (("ptxas", knobs.nvidia.ptxas), ("ptxas-blackwell", knobs.nvidia.ptxas_blackwell)):
        said = subprocess.run([tool.path, "--version"], capture_output=True, text=True, check=True).stdout
        found[name] = said.rpartition("release ")[2].partition(",")[0]
    return found


def _assemble(ptx: str, arch: int, folder: Path) -> str:
    """What `ptxas -v` says. Triton carries two, and the PTX of one may be too new for the other."""
    source = folder / "kernel.ptx"
    source.write_text(ptx, encoding="utf-8")
    said = ""
    for tool in (knobs.nvidia.ptxas_blackwell, knobs.nvidia.ptxas) if arch >= 100 else (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell):
        command = [tool.path, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", str(source), "-o", str(folder / "checked.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stderr
        said += done.stderr
    raise RuntimeError(f"sm_{arch}: {said}")


def faults(variant: Variant, found: Compiled) -> list[str]:
    """What must not be: spilled registers; a kernel that streams the logits without 16-byte loads, or 16-byte stores of 16-bit ones."""
    wrong = []
    if found.spill_stores or found.spill_loads:
        wrong.append(f"spills {found.spill_stores} bytes of registers")
    if variant.kernel != "chosen_kernel" and not found.wide_loads:
        wrong.append("has no 16-byte loads")
    if variant.kernel == "gradient_kernel" and not found.wide_stores:
        wrong.append("has no 16-byte stores")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels and read their registers, spills and instructions.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--fast", action="store_true", help="bf16 with entropy and mask alone")
    parser.add_argument("--output", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    rows, bad = [], []
    for arch in arguments.arch:
        for variant in variants(arguments.fast):
            found = compile_variant(variant, arch)
            rows.append({"arch": f"sm_{arch}", **asdict(variant), **asdict(found)})
            bad += [f"sm_{arch} {variant}: {fault}" for fault in faults(variant, found)]
            print(
                f"sm_{arch} {variant.kernel:16s} {variant.z} K={variant.k:<2d} entropy={variant.entropy:d} mask={variant.mask:d}: "
                f"{found.registers} registers, {found.spill_stores} B spilled, {found.shared} B shared, {found.instructions} instructions ({found.loop_instructions} in the loop), "
                f"16-byte loads {found.wide_loads} of {found.loads}, stores {found.wide_stores} of {found.stores}",
                flush=True,
            )
    if arguments.output is not None:
        versions = {"triton": triton.__version__, **assemblers(), "torch": torch.__version__}
        record = {**versions, "command": " ".join(["python", *sys.argv]), "kernels": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for fault in bad:
        print(f"FAULT {fault}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
