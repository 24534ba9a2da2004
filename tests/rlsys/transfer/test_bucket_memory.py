"""The memory of arriving buckets: used again, but never while a tensor still needs it."""

from __future__ import annotations

import numpy as np

from rlsys.transfer.collective import BucketMemory
from rlsys.transfer.wire import as_tensor


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    memory = BucketMemory()
    first = memory.take(100)
    place = address(first)
    first = memory.take(50)  # the other one is referred to until now
    other = address(first)
    again = [address(memory.take(size)) for size in (100, 80, 101)]
    assert other != place and again[:2] == [place, place] and again[2] not in (place, other)


def test_a_part_of_a_tensor_keeps_its_memory() -> None:
    """An engine keeps the parts of a layer until it has all of them."""
    memory = BucketMemory()
    whole = as_tensor(memory.take(64))
    part = whole[8:16].view(dtype=whole.dtype)
    whole.fill_(1)
    del whole
    other = as_tensor(memory.take(64)).fill_(2)
    assert part.tolist() == [1] * 8 and other.tolist() == [2] * 64
    del part, other
    assert len({address(memory.take(64)) for _ in range(3)}) == 1


def test_sizes_are_exact() -> None:
    memory = BucketMemory()
    assert [len(memory.take(size)) for size in (10, 7, 12, 10)] == [10, 7, 12, 10]
