"""The wire format: what was packed is unpacked, buckets have the wanted size, and damage is detected."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import WeightSyncError
from rlsys.transfer.wire import PackedBucket, as_tensor, check_digest, digest_of, pack, unpack

Named = list[tuple[str, torch.Tensor]]


def unpacked(buckets: Iterable[PackedBucket], skip: tuple[str, ...] = ()) -> Named:
    return [entry for packed in buckets for entry in unpack(packed.bucket, as_tensor(packed.data), skip)]


kinds = st.tuples(
    st.lists(st.integers(1, 4), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)


@settings(deadline=None, max_examples=50)
@given(kinds=st.lists(kinds, min_size=1, max_size=8), bucket_bytes=st.integers(1, 300))
def test_a_round_trip_gives_the_same_tensors(kinds: list[tuple[list[int], torch.dtype]], bucket_bytes: int) -> None:
    # Mixed widths put fp32 tensors at offsets that are not multiples of 4.
    sent = [(f"t{i}", torch.randn(shape).to(dtype)) for i, (shape, dtype) in enumerate(kinds)]
    buckets = list(pack(iter(sent), bucket_bytes))
    received = unpacked(buckets)
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, before), (_, after) in zip(sent, received, strict=True):
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        assert torch.equal(after, before)
    assert sum(packed.bucket.bytes for packed in buckets) == sum(tensor.nbytes for _, tensor in sent)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), max_size=12), bucket_bytes=st.integers(1, 200))
def test_a_bucket_closes_with_the_first_tensor_that_fills_it(sizes: list[int], bucket_bytes: int) -> None:
    tensors = [(f"t{i}", torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    buckets = list(pack(iter(tensors), bucket_bytes))
    assert [spec.name for packed in buckets for spec in packed.bucket.tensors] == [name for name, _ in tensors]
    assert b"".join(packed.data.tobytes() for packed in buckets) == b"".join(t.numpy().tobytes() for _, t in tensors)
    for number, packed in enumerate(buckets):
        bucket, data = packed.bucket, packed.data
        assert bucket.bytes == data.nbytes == sum(spec.bytes for spec in bucket.tensors)
        assert bucket.digest == xxhash.xxh3_128(data.tobytes()).hexdigest()
        assert packed.staged.numpy().tobytes() == data.tobytes()
        assert bucket.bytes - bucket.tensors[-1].bytes < bucket_bytes  # it was open when the last tensor came
        assert bucket.bytes >= bucket_bytes or number == len(buckets) - 1


@pytest.mark.parametrize("bucket_bytes", [1, 16, 10**6])
def test_a_tensor_with_two_names_is_sent_once_and_received_under_both(bucket_bytes: int) -> None:
    shared, other = torch.arange(4.0), torch.arange(4.0)  # equal values alone are no alias
    sent = [("embed.weight", shared), ("lm_head.weight", shared), ("w", other), ("v", torch.tensor(5.0))]
    buckets = list(pack(iter(sent), bucket_bytes))
    received = unpacked(buckets)
    assert [name for name, _ in received] == [name for name, _ in sent]
    assert all(torch.equal(before, after) for (_, before), (_, after) in zip(sent, received, strict=True))
    assert sum(packed.data.nbytes for packed in buckets) == 16 + 16 + 4
    without = unpacked(buckets, skip=("embed.weight", "w"))  # the bytes of a name that is left out are not lost
    assert [(name, value.tolist()) for name, value in without] == [("lm_head.weight", shared.tolist()), ("v", 5.0)]


@pytest.mark.parametrize(("dtype", "name", "width"), [(torch.float32, "float32", 4), (torch.bfloat16, "bfloat16", 2)])
def test_a_bucket_describes_shape_and_dtype(dtype: torch.dtype, name: str, width: int) -> None:
    # A transposed tensor is not contiguous; its bytes are sent in the order of its shape.
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3).T
    (packed,) = pack(iter([("w", tensor), ("scalar", torch.tensor(5.0, dtype=dtype))]), 10**6)
    assert [(spec.name, spec.shape, spec.dtype) for spec in packed.bucket.tensors] == [
        ("w", (3, 2), name),
        ("scalar", (), name),
    ]
    assert packed.data.dtype == np.uint8
    assert packed.data.shape == (7 * width,)
    assert torch.from_numpy(packed.data).view(dtype).tolist() == [0, 3, 1, 4, 2, 5, 5]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
)
def test_buffers_of_any_dtype_are_weights(dtype: torch.dtype) -> None:
    sent = [("odd", torch.ones(1, dtype=torch.uint8)), ("buffer", torch.ones(3, 2).to(dtype))]
    (_, (name, received)) = unpacked(pack(iter(sent), 10**6))
    assert (name, received.dtype) == ("buffer", dtype)
    assert received.view(torch.uint8).tolist() == sent[1][1].view(torch.uint8).tolist()


def test_a_bucket_is_packed_into_the_given_memory() -> None:
    memory = np.zeros(16, dtype=np.uint8)
    asked: list[tuple[int, int]] = []

    def buffer(number: int, size: int) -> np.ndarray:
        asked.append((number, size))
        return memory

    (packed,) = pack(iter([("a", torch.arange(4.0))]), 1, buffer)
    assert packed.data is memory and asked == [(0, 16)]
    assert memory.view(np.float32).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damage_names_actor_version_and_tensor(damage: str) -> None:
    (packed,) = pack(iter([("a.weight", torch.zeros(4)), ("b.weight", torch.zeros(4))]), 10**6)
    data = packed.data.copy()
    data[5] ^= 1
    arrived = {"flipped": data, "cut": packed.data[:-1], "empty": packed.data[:0]}[damage]
    with pytest.raises(
        WeightSyncError, match=r"actor 1, weight version 3: .* tensor a\.weight has xxh3 [0-9a-f]{12}, "
    ):
        check_digest("1", 3, packed.bucket, digest_of(arrived))
    check_digest("1", 3, packed.bucket, digest_of(packed.data))
