"""What a GPU needs for a kernel, by its machine code: instructions by pipe, occupancy, and the slowest of memory and pipes.

Rates are of data sheets and of NVIDIA's guides (`GPUS`, `PIPES`); what is reached of them is assumed (`Reached`). Nothing here was timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import compile_kernels as compiler
from head_ops import SECTOR_BYTES

# Lanes a clock and multiprocessor. "Arithmetic Instructions" in the CUDA C++ Programming Guide, compute capability 9.0: fp32 arithmetic
# 128; integer multiplication, comparison, minimum, logic, shift and conversion 64; base-2 exponential 16; shuffle 32. Load/store: 32
# units (Hopper Tuning Guide and whitepaper). sm_100 is taken to be the same.
PIPES = {"fma": 128, "alu": 64, "exponential": 16, "load/store": 32}
KINDS = ("fma", "exponential", "multiply", "integer", "compare", "conversion", "load", "store", "shuffle", "other")
SCHEDULERS = 4  # instructions of a warp a clock and multiprocessor
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor; given to a warp in these units
MAX_WARPS, MAX_PROGRAMS = 64, 32
SHARED_BYTES, SHARED_RESERVED = 228 << 10, 1 << 10  # of a multiprocessor; the system's share of each program
LATENCY = 0.8e-6  # seconds of a load from memory under load, assumed


@dataclass(frozen=True)
class Gpu:
    """Peaks of NVIDIA's data sheet: bytes a second of memory, dense bf16 and fp32 FLOP a second."""

    name: str
    arch: int
    multiprocessors: int
    bandwidth: float
    tensor: float
    fp32: float

    @property
    def clock(self) -> float:
        """Hertz that the fp32 figure stands for: 128 multiply-adds a clock and multiprocessor."""
        return self.fp32 / (256 * self.multiprocessors)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 90, 132, 3.35e12, 989e12, 67e12),  # H100 SXM5 data sheet; multiprocessors: Hopper whitepaper
        Gpu("H200", 90, 132, 4.8e12, 989e12, 67e12),  # H200 SXM data sheet
        Gpu("B200", 100, 148, 8.0e12, 2250e12, 75e12),  # HGX B200 data sheet (8 GPUs: 64 TB/s, 18 PFLOP/s dense, 600 TFLOP/s)
    )
}


@dataclass(frozen=True)
class Reached:
    """Assumed shares of the peaks, and the seconds that a kernel takes at least."""

    bandwidth: float = 0.9
    tensor: float = 0.8
    clock: float = 0.86
    smallest: float = 2e-6


def kind(code: str) -> str:
    """What an instruction of SASS is counted as; a bf16 number becomes fp32 by moving bits, which is "integer" or "multiply"."""
    base = code.split(".")[0]
    if base in ("FFMA", "FADD", "FMUL", "HFMA2", "FFMA2", "FADD2", "FMUL2"):
        return "fma"
    if base == "IMAD":
        return "multiply"
    if base == "MUFU":
        return "exponential"
    if base in ("F2F", "F2FP", "F2I", "I2F", "I2FP"):
        return "conversion"
    if base in ("LDG", "LDS", "LD"):
        return "load"
    if base in ("STG", "STS", "ST"):
        return "store"
    if base == "SHFL":
        return "shuffle"
    if base in ("FMNMX", "FMNMX3", "FSEL", "FSETP"):
        return "compare"
    if base in ("BRA", "EXIT", "BAR", "LDC", "NOP", "S2R", "S2UR", "BSSY", "BSYNC", "WARPSYNC", "R2UR") or base.startswith("U"):
        return "other"
    return "integer"


@dataclass(frozen=True)
class Code:
    """A kernel's machine code: instructions by kind, outside of its loop and in one turn of it.

    last: of a program of `gradient_kernel` whose columns are not all real or not all there, which takes the other side of a branch.
    """

    name: str
    measured: compiler.Compiled
    once: Counter[str]
    loop: Counter[str]
    last: Counter[str]
    unrolled: int  # of `chosen_kernel`'s loop over the ids
    load_bytes: int  # that a thread has under way at once: of a turn of the loop, or of the kernel; a sector where it loads single values

    @classmethod
    def of(cls, variant: compiler.Variant, arch: int) -> Code:
        compiled, sass = compiler.disassemble(variant, arch)
        span = compiler.longest_loop(sass)
        paths = [compiler.instructions(sass)]
        if variant.kernel == "gradient_kernel":
            paths = sorted(_two_paths(sass), key=len)
        loop = _counted(code for address, code in paths[0] if address in span)
        once = _counted(code for address, code in paths[0] if address not in span)
        last = _counted(code for _, code in paths[-1])
        wide = sum(16 * (code.startswith("LDG") and ".128" in code) for address, code in paths[0] if address in span or not span)
        unrolled = loop["load"] // 2 if variant.kernel == "chosen_kernel" else 1
        found = compiler.measure(compiled, sass, variant, arch)
        return cls(variant.kernel, found, once, loop, last, max(unrolled, 1), wide or SECTOR_BYTES)

    def programs_at_once(self) -> tuple[int, str]:
        """Programs on a multiprocessor, and what limits them."""
        warps = self.measured.warps
        a_warp = -(-self.measured.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        limits = {
            "registers": REGISTERS // a_warp // warps,
            "warps": MAX_WARPS // warps,
            "programs": MAX_PROGRAMS,
            "shared memory": SHARED_BYTES // (self.measured.shared + SHARED_RESERVED),
        }
        least = min(limits, key=lambda name: limits[name])
        return limits[least], least

    def instructions(self, vocab: int, k: int) -> dict[str, float]:
        """Instructions of a warp, by kind, in one program: its last, partial tile is counted whether there is one or not."""
        if self.name == "gradient_kernel":
            programs = -(-vocab // compiler.kernels.BACKWARD_BLOCK)
            whole = vocab // compiler.kernels.BACKWARD_BLOCK / programs
            return {name: whole * self.once[name] + (1 - whole) * self.last[name] for name in self.once | self.last}
        turns = {"stats_kernel": vocab // (compiler.kernels.FORWARD_TILE * 8), "chosen_kernel": k // self.unrolled}.get(self.name, 0)
        return {name: self.once[name] + turns * self.loop[name] for name in self.once | self.loop}


def _counted(codes: Iterable[str]) -> Counter[str]:
    """By kind; "passes": clocks of the load/store units, where 16 bytes a lane are four times 128 bytes."""
    counts: Counter[str] = Counter()
    for code in codes:
        if code != "NOP":
            counts[kind(code)] += 1
            counts["passes"] += (4 if ".128" in code else 1) * (kind(code) in ("load", "store", "shuffle"))
    return counts


def _two_paths(sass: str) -> list[list[tuple[int, str]]]:
    """The instructions of either side of the branch that goes beyond an exit. Raises ValueError if there is none."""
    found = compiler.instructions(sass)
    for origin, target in compiler.branches(sass):
        exits = [address for address, code in found if code == "EXIT" and origin < address < target]
        if exits:
            ahead = [(address, code) for address, code in found if address <= max(exits)]
            return [ahead, [(address, code) for address, code in found if address <= origin or address >= target]]
    raise ValueError("gradient_kernel has no branch beyond an exit: a kernel without the two paths of whole and partial blocks")


@dataclass(frozen=True)
class Prediction:
    """Seconds of one launch over N rows, by what would bound it."""

    kernel: str
    gpu: str
    per_element: dict[str, float]  # instructions of a thread for each logit, by kind
    programs: int
    limited_by: str
    occupancy: float
    bytes_moved: int
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total(self) -> float:
        return self.seconds[self.bound]

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "bound": self.bound, "microseconds": 1e6 * self.total}


def predict(code: Code, gpu: Gpu, rows: int, vocab: int, k: int, bytes_moved: int, reached: Reached) -> Prediction:
    """A launch over [rows,vocab] logits of 16 bits with k ids a row, in steady state: nothing for the first and the last wave."""
    programs, limited_by = code.programs_at_once()
    in_grid = rows * (-(-vocab // compiler.kernels.BACKWARD_BLOCK) if code.name == "gradient_kernel" else 1)
    warps = in_grid * code.measured.warps
    of_warp = code.instructions(vocab, k)
    passes = of_warp.pop("passes", 0.0)
    clocks = gpu.multiprocessors * gpu.clock * reached.clock  # of all multiprocessors, a second
    busy = {
        "fma": (of_warp.get("fma", 0) + 2 * of_warp.get("multiply", 0)) * 32 / PIPES["fma"],
        "alu": sum(of_warp.get(name, 0) for name in ("integer", "compare", "conversion")) * 32 / PIPES["alu"],
        "exponential": of_warp.get("exponential", 0) * 32 / PIPES["exponential"],
        "load/store": passes * 32 / PIPES["load/store"],
        "issue": sum(of_warp.values()) / SCHEDULERS,
    }
    under_way = programs * code.measured.warps * 32 * code.load_bytes * gpu.multiprocessors
    bandwidth = min(gpu.bandwidth * reached.bandwidth, under_way / LATENCY)
    return Prediction(
        kernel=code.name,
        gpu=gpu.name,
        per_element={name: count * 32 * warps / (rows * vocab) for name, count in of_warp.items()},
        programs=programs,
        limited_by=limited_by,
        occupancy=programs * code.measured.warps / MAX_WARPS,
        bytes_moved=bytes_moved,
        seconds={"memory": bytes_moved / bandwidth} | {name: count * warps / clocks for name, count in busy.items()},
    )
