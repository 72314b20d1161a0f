"""Arrays of a store that were read already, the ones used longest ago dropped when they take too much memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from megatron_opd.data.location import Location, read_rows
from megatron_opd.data.shards import ArrayFacts, ShardedArray


class ArrayCache:
    """Reads through memory of `max_bytes`; what it gives is read-only. The checksum is part of the key: a part that was made again is another part."""

    def __init__(self, location: Location, max_bytes: int):
        self.location, self.max_bytes = location, max_bytes
        self.num_bytes = 0
        self._held: OrderedDict[tuple[str, str, int, int], np.ndarray] = OrderedDict()
        self._arrays: dict[tuple[str, str, int], ShardedArray] = {}

    def whole(self, group: str, name: str, facts: ArrayFacts) -> np.ndarray:
        """The array, its checksum compared. Raises StoreError."""
        key = (group, name, facts.crc32c, -1)
        if key not in self._held:
            self._hold(key, self._read(group, name, facts, slice(None), check=True))
        self._held.move_to_end(key)
        return self._held[key]

    def rows(self, group: str, name: str, facts: ArrayFacts, rows: slice) -> np.ndarray:
        """Rows of the array, by the blocks that they lie in. Raises StoreError."""
        block = self._open(group, name, facts).chunk_rows
        pieces = []
        for number in range(rows.start // block, -(-rows.stop // block)):
            key = (group, name, facts.crc32c, number)
            if key not in self._held:
                self._hold(key, self._read(group, name, facts, slice(number * block, (number + 1) * block)))
            self._held.move_to_end(key)
            first = number * block
            pieces.append(self._held[key][max(0, rows.start - first) : rows.stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read(self, group: str, name: str, facts: ArrayFacts, rows: slice, *, check: bool = False) -> np.ndarray:
        shown = f"{self.location.show(group)}/{name}"
        return read_rows(self._open(group, name, facts), shown, rows, crc32c=facts.crc32c if check else None)

    def _open(self, group: str, name: str, facts: ArrayFacts) -> ShardedArray:
        key = (group, name, facts.crc32c)
        if key not in self._arrays:
            self._arrays[key] = self.location.open_array(group, name, facts)
        return self._arrays[key]

    def _hold(self, key: tuple[str, str, int, int], array: np.ndarray) -> None:
        array.setflags(write=False)  # rollouts are views of it
        self._held[key] = array
        self.num_bytes += array.nbytes
        while self.num_bytes > self.max_bytes and len(self._held) > 1:
            _, dropped = self._held.popitem(last=False)
            self.num_bytes -= dropped.nbytes
