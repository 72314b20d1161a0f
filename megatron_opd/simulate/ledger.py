"""What a GPU would have had to hold, wait for, copy, compute and send: a dispatch mode above PyTorch's fake tensors.

Every operation of PyTorch passes here once. Bytes are those of storages on the simulated GPU, rounded up as CUDA's caching allocator does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_opd.simulate.arithmetic import flops_of
from megatron_opd.simulate.communication import Messages
from megatron_opd.simulate.places import place

_ROUNDING = 512  # bytes of the caching allocator's smallest block
_TRACED = 1 << 20  # storages of at least this many bytes keep the place that made them: looking for it takes time
_SNAPSHOT = 1.002  # a peak must be so much higher than the last before what makes it up is written down again
_DEPTH = 4  # frames of the place of a wait or copy

aten: Any = torch.ops.aten
# What leaves numbers that the program itself wrote down on the CPU as they are.
_SAME_NUMBERS = (aten.lift_fresh, aten.detach, aten.alias, aten.view, aten._to_copy)

active: Ledger | None = None


class Ledger(TorchDispatchMode):
    """Counts of one simulated rank. Set `phase` as the program goes on; `start_step` forgets the counts of what came before."""

    def __init__(self, *, limit: int | None = None):
        """limit: bytes above which a GPU would have run out; the place is then kept in `overrun`."""
        super().__init__()
        self.phase = "start"
        self.limit = limit
        self.overrun: tuple[str, int, str] | None = None  # phase, bytes then, place
        # device memory, bytes
        self.now = self.peak = 0
        self.peak_phase = self.phase
        self.peaks: dict[str, int] = {}
        self._live: dict[int, tuple[int, str, str]] = {}  # number of a storage -> bytes, phase and place of its making
        self._at_peak: list[tuple[int, str, str]] = []
        self._snapped = 0.0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._numbers: dict[int, int] = {}  # of storages, as _live has them
        self._made = 0
        # host memory of tensors, bytes
        self.host_now = self.host_peak = 0
        self.host_peaks: dict[str, int] = {}
        self._host: dict[int, int] = {}
        self._pinned: set[int] = set()
        # counts since start_step
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.messages = Messages()
        self.flops = 0.0
        # answers to what shapes can't say
        self.scalar: Callable[[torch.Tensor], float | int | bool] = _zero
        self.selected: Callable[[torch.Tensor, torch.Tensor], int] = _unknown_selection

    @property
    def comm(self) -> dict[str, list[int]]:
        """'operation over group (ranks)' -> [calls, bytes]: the whole buffer, as one rank holds it. A group of one rank sends nothing."""
        return self.messages.counts

    def start_step(self, phase: str) -> None:
        """Enter a phase and forget waits, copies, messages and arithmetic; memory goes on."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)  # what is held already, if nothing is made
        self.host_peaks[phase] = max(self.host_peaks.get(phase, 0), self.host_now)
        self.flops = 0.0
        self.waits.clear()
        self.copies.clear()
        self.messages.counts.clear()

    def wait(self, what: str) -> None:
        """The host waits for the GPU here."""
        self.waits[f"{what}  {place(_DEPTH)}"] += 1

    def by_place(self, top: int | None = 12) -> list[tuple[str, int]]:
        """('[phase] place', bytes) of what was held at the peak, most first."""
        table: Counter[str] = Counter()
        for size, phase, where in self._at_peak:
            table[f"[{phase}] {where}"] += size
        return table.most_common(top)

    # ---- every operation ----------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten.masked_select.default:  # its size depends on values
            self.wait("masked_select")
            return self._kept(torch.empty(self.selected(*args), dtype=args[0].dtype, device=args[0].device))
        if func is aten.is_pinned.default:
            return _storage(args[0]) in self._pinned
        if func is aten._pin_memory.default:
            return self._kept(torch.empty_like(args[0]), pinned=True)
        if func is aten._to_copy.default and getattr(args[0], "fresh", False) and str(kwargs.get("device")) == "cuda:0":
            # torch.tensor(..., device="cuda") names the first device under the fake mode
            kwargs = kwargs | {"device": torch.device("cuda", torch.cuda.current_device())}
        lacks_kernel = func.namespace == "c10d" and "coalesced" in func._opname  # all of these work in place
        out = FakeWork().boxed() if lacks_kernel else func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Write an operation down after it was done."""
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):  # a subclass (FP8) is made of these
                self._kept(leaf, pinned=bool(kwargs.get("pin_memory")))
        if isinstance(out, FakeTensor):
            _keep_numbers(func, args, out)
        if args and func.namespace == "aten" and func._schema.is_mutable:
            _change_numbers(func, args)
        if func is aten._to_copy.default:
            self._note_copy(args[0], out, bool(kwargs.get("non_blocking")))
        elif func is aten.copy_.default:
            self._note_copy(args[1], args[0], bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
        elif func.namespace == "c10d":
            self.messages.note(func, args, kwargs)
        self.flops += flops_of(func, args, kwargs, out)

    def _number(self, tensor: torch.Tensor) -> Any:
        """`.item()`: what is known of a tensor on the CPU; the host waits for one on the GPU, and `scalar` says its number."""
        known = getattr(tensor, "known", None)
        known = getattr(tensor, "constant", None) if known is None else known
        if known is None and not isinstance(tensor, FakeTensor):
            known = tensor
        if known is not None:
            with _disable_current_modes():  # a number that is there: the fake mode would refuse to read it
                return known.item()
        if tensor.device.type == "cuda":
            self.wait("item")
        return self.scalar(tensor)

    def _note_copy(self, source: torch.Tensor, target: torch.Tensor, asynchronous: bool) -> None:
        """A copy between host and GPU: from or to pageable memory an 'asynchronous' one is staged, and to the host it blocks."""
        kinds = source.device.type, target.device.type
        if kinds[0] == kinds[1] or not source.numel():
            return
        pinned = any(_storage(tensor) in self._pinned for tensor in (source, target) if tensor.device.type == "cpu")
        how = ("pinned async" if pinned else "pageable async") if asynchronous else "BLOCKING"
        self.copies[f"{kinds[0]}->{kinds[1]} {how} {source.numel() * source.element_size()} B  {place(_DEPTH)}"] += 1

    # ---- memory -------------------------------------------------------------------------------------------------------------------------

    def _kept(self, tensor: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
        """Count a tensor's storage, once, for as long as it lives. Returns the tensor."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "cpu":
            self._keep_on_host(storage, key, pinned)
        elif tensor.device.type == "cuda":
            self._keep_on_device(storage, key)
        return tensor

    def _keep_on_host(self, storage: Any, key: int, pinned: bool) -> None:
        if pinned:
            self._pinned.add(key)
        if key in self._host:
            return
        self._host[key] = storage.nbytes()
        self.host_now += storage.nbytes()
        self.host_peak = max(self.host_peak, self.host_now)
        self.host_peaks[self.phase] = max(self.host_peaks.get(self.phase, 0), self.host_now)
        weakref.finalize(storage, self._drop_from_host, key).atexit = False

    def _drop_from_host(self, key: int) -> None:
        self.host_now -= self._host.pop(key, 0)
        self._pinned.discard(key)

    def _keep_on_device(self, storage: Any, key: int) -> None:
        reference = self._storages.get(key)
        size = _rounded(storage)
        if not size or (reference is not None and reference() is not None):
            return
        self._made += 1
        number = self._made
        self._live[number] = (0, self.phase, place() if size >= _TRACED else "small tensors")
        self._storages[key] = weakref.ref(storage, lambda _: self._drop_from_device(key, number))
        self._numbers[key] = number
        self._grow(number, size)

    def resized(self, storage: Any) -> None:
        """A storage has another size now: recomputation gives the memory of what it will make again back so, and takes it again."""
        number = self._numbers.get(storage._cdata)
        if number is not None:
            self._grow(number, _rounded(storage) - self._live[number][0])

    def _grow(self, number: int, size: int) -> None:
        before, phase, where = self._live[number]
        self._live[number] = (before + size, phase, where)
        self.now += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        if self.limit is not None and self.overrun is None and self.now > self.limit:
            self.overrun = (self.phase, self.now, place(8))
        if self.now > self.peak:
            self.peak, self.peak_phase = self.now, self.phase
            if self.now > self._snapped * _SNAPSHOT:
                self._snapped, self._at_peak = self.now, list(self._live.values())

    def _drop_from_device(self, key: int, number: int) -> None:
        self.now -= self._live.pop(number)[0]
        if self._numbers.get(key) == number:  # the address may be another storage's by now
            self._storages.pop(key, None)
            del self._numbers[key]


def note_wait(what: str) -> None:
    """For what stands in for CUDA: a wait of the active ledger, if there is one."""
    if active is not None:
        active.wait(what)


def note_flops(flops: float) -> None:
    """For what stands in for compiled kernels."""
    if active is not None:
        active.flops += flops


def numbers_of(tensor: torch.Tensor) -> Any:
    """Tensor.tolist of a fake tensor: the host waits once, for all of its numbers."""
    known = getattr(tensor, "known", None)
    if known is not None:
        with _disable_current_modes():
            return known.tolist()
    here = active
    assert here is not None, "a fake tensor's numbers are asked for outside of its world"
    if tensor.device.type == "cuda":
        here.wait("tolist")

    def nested(sizes: Any) -> Any:
        return [nested(sizes[1:]) for _ in range(sizes[0])] if sizes else here.scalar(tensor)

    return nested(tuple(tensor.shape))


def bytes_now() -> int:
    return active.now if active is not None else 0


def bytes_peak() -> int:
    return active.peak if active is not None else 0


def _rounded(storage: Any) -> int:
    return -(-storage.nbytes() // _ROUNDING) * _ROUNDING


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _zero(tensor: torch.Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


def _unknown_selection(tensor: torch.Tensor, mask: torch.Tensor) -> int:
    raise NotImplementedError(f"masked_select of {tuple(tensor.shape)}: nothing says how many are chosen (Ledger.selected)")


def _change_numbers(func: Any, args: Any) -> None:
    """A number that was written down and is changed in place (a step count of torch's Adam) is changed, too; or no longer known."""
    targets = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    for target in targets:
        if getattr(target, "known", None) is None:
            continue
        added = args[1] if func.overloadpacket in (aten.add_, aten._foreach_add_) and len(args) > 1 else None
        if isinstance(added, torch.Tensor):
            added = getattr(added, "known", None) if isinstance(added, FakeTensor) else added
        with _disable_current_modes():
            target.known = None if added is None else target.known + added


def _keep_numbers(func: Any, args: Any, out: FakeTensor) -> None:
    """Numbers that the program wrote down (torch.tensor([...])) stay known on the CPU, for .item() and .tolist()."""
    marked: Any = out
    if func is aten.lift_fresh.default:
        marked.fresh = True
    if out.device.type != "cpu" or not args or not isinstance(args[0], torch.Tensor) or func.overloadpacket not in _SAME_NUMBERS:
        return
    source: Any = args[0]
    known = getattr(source, "known", None) if isinstance(source, FakeTensor) else source
    if known is not None and known.numel() == out.numel():
        marked.known = known
