"""Which boxes of a tensor a range of its flattened elements is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_opd.train.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 2, 4), (2, 3, 1, 4)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    """Every range of a few shapes: the boxes, one after the other, hold its elements and no others."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        parts = [numbers[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))].flatten() for box in found]
        assert torch.cat([torch.tensor([], dtype=torch.int64), *parts]).tolist() == list(range(start, stop))
        assert all(part.numel() == math.prod(sizes) for part, (_, sizes) in zip(parts, found, strict=True))
        assert len(found) <= 2 * len(shape) - 1


def test_whole_rows_are_one_box() -> None:
    assert list(boxes((4, 5), 0, 20)) == [((0, 0), (4, 5))]
    assert list(boxes((4, 5), 5, 15)) == [((1, 0), (2, 5))]
    assert list(boxes((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
