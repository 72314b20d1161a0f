"""What a stage cost: wall time, tokens, GPU hours, energy; JSON rows in run_dir/stages.jsonl, of which a run of a stage has its last.

Rows are only ever appended, as several workers may write at once; each is on disk when it was written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.safety.durable import make_folder, sync, write_file
from megatron_opd.safety.untrusted import load_json, open_file

_LONGEST_ROW = 16 << 20  # bytes


class GpuMeter:
    """Energy and memory of GPUs through NVML (nvidia-ml-py). Make it with `open_meter`."""

    def __init__(self, nvml: Any, handles: list[Any]):
        self._nvml, self._handles = nvml, handles

    def energy_joules(self) -> float | None:
        """Joules since the driver was loaded, of all the GPUs together; only differences mean something. None where one can't say."""
        try:
            return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1000  # NVML: millijoules
        except self._nvml.NVMLError:
            return None  # before Volta, and on slices (MIG)

    def memory_gib(self) -> float:
        """GiB in use on the fullest of the GPUs, by all processes."""
        return max(self._nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self._handles) / 2**30

    @property
    def num_gpus(self) -> int:
        return len(self._handles)


def open_meter(uuids: Sequence[str] | None = None, *, first: int | None = None) -> GpuMeter | None:
    """A meter for these GPUs ("GPU-..."), by default for those in CUDA_VISIBLE_DEVICES, or all of the machine; or the `first` of them.

    None where there are not so many GPUs, no driver, or no nvidia-ml-py: a stage then has no energy in its row.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        if uuids is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            uuids = [str(index) for index in range(pynvml.nvmlDeviceGetCount())] if visible is None else visible.split(",")
        names = [name.strip() for name in uuids if name.strip()]
        if first is not None and first > len(names):
            return None
        names = names[:first]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(int(n)) if n.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(n) for n in names]
    except pynvml.NVMLError:
        return None
    return GpuMeter(pynvml, handles) if handles else None


@dataclass
class StageCost:
    """Context manager; `tokens` is counted up by the stage. The row is written also when the stage fails, with its error.

    A stage calls `keep` whenever something is safe on disk, so that a run that is killed leaves an account too: until then, unfinished.
    With `meter` the row has the energy if its GPUs are all; a stage that knows of more puts "energy_joules" into `facts` itself.
    """

    run_dir: str | Path
    stage: str
    num_gpus: int = 0
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    meter: GpuMeter | None = None

    def __enter__(self) -> StageCost:
        self._started, self._start, self._kept = time.time(), time.monotonic(), -math.inf
        self._run = uuid.uuid4().hex[:12]
        self._energy = self.meter.energy_joules() if self.meter else None
        return self

    def seconds(self) -> float:
        """Time so far, whatever is done to the clock meanwhile."""
        return time.monotonic() - self._start

    def keep(self, *, every: float = 60.0) -> None:
        """Write the account so far, but not within `every` seconds of the last time."""
        if time.monotonic() - self._kept >= every:
            append_jsonl(Path(self.run_dir) / "stages.jsonl", self._row() | {"unfinished": True})
            self._kept = time.monotonic()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None and not self.tokens and self._kept == -math.inf:
            return  # nothing was left to do
        row = self._row() | ({"error": f"{type(error).__name__}: {error}"} if error is not None else {})
        try:
            append_jsonl(Path(self.run_dir) / "stages.jsonl", row)
        except OSError:
            if error is None:  # on a full disk the stage's own error is the one to show
                raise

    def _row(self) -> dict[str, Any]:
        seconds = self.seconds()
        row = {
            "run": self._run,
            "stage": self.stage,
            "started": self._started,
            "seconds": seconds,
            "tokens": self.tokens,
            "num_gpus": self.num_gpus,
            "gpu_hours": seconds * self.num_gpus / 3600,
        }
        measured = self.meter is not None and self.meter.num_gpus == self.num_gpus
        if self.meter and measured and self._energy is not None and (energy := self.meter.energy_joules()) is not None:
            row["energy_joules"] = energy - self._energy
        return row | self.facts


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 'h:mm:ss'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def read_stages(path: Path) -> list[dict[str, Any]]:
    """The last row of each run of a stage, in the order in which the runs left their first."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(path)):
        rows[str(row.get("run", number))] = row  # older files have no "run", and a row a run
    return list(rows.values())


def append_jsonl(path: Path, row: dict[str, Any], *, durable: bool = True) -> None:
    """Append one row on a line of its own, also after a line that a kill or a full disk cut off. Raises OSError that names the file.

    It is on disk then; with `durable` False, after the next `sync` of the file.
    """
    make_folder(path.parent)
    try:
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            start = b"\n" if file.read(1) not in (b"", b"\n") else b""
            file.write(start + json.dumps(row).encode() + b"\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    if not size:
        sync(path.parent)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put these rows, and no others, into the file; it is replaced whole."""
    make_folder(path.parent)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path, *, number: str | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file, those that have a whole `number` of that name if one is given. What else is in it is said and left out.

    Nothing is said of a last line that a kill cut off.
    """
    rows, damaged, place = [], [], 1
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(path))
        except FileNotFoundError:
            return []
        for line in iter(lambda: file.readline(_LONGEST_ROW), b""):
            whole, line = line.endswith(b"\n"), line.strip()
            try:
                row = load_json(line, f"{path}, line {place}")
            except UserError:
                row = None
            if isinstance(row, dict) and (number is None or type(row.get(number)) is int):
                rows.append(row)
            elif line and whole:
                damaged.append(str(place))
            place += whole
    if damaged:
        shown = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        print(f"WARNING: {path}: damaged rows are left out: line{'s' if len(damaged) > 1 else ''} {shown}", flush=True)
    return rows


def provenance() -> dict[str, Any]:
    """Versions and time for manifests."""
    versions = {}
    for package in ("megatron-opd", "megatron-core", "torch", "transformers", "sglang", "transformer-engine", "zarr"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    record: dict[str, Any] = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions}
    if commit := git_commit():
        record["git_commit"] = commit
    return record


def git_commit(checkout: Path = Path(__file__).resolve().parents[2]) -> str | None:
    """Commit of the checkout that this package lies in; OPD_GIT_COMMIT in images that have no checkout."""
    git = checkout / ".git"
    try:
        if git.is_file():  # a worktree names its own folder, which names that of the repository
            git = checkout / git.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
        text = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not text.startswith("ref: "):
            return text
        ref = text.removeprefix("ref: ")
        if (git / "commondir").exists():
            git /= (git / "commondir").read_text(encoding="utf-8").strip()
        if (git / ref).exists():
            return (git / ref).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()  # where `git gc` puts them
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return os.environ.get("OPD_GIT_COMMIT")
