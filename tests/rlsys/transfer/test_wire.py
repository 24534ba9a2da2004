"""The wire format: what was packed is unpacked, buckets have the wanted size, and damage is detected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import WeightSyncError
from rlsys.transfer.wire import pack, verified_tensors
from rlsys.types import WeightManifest

Named = list[tuple[str, torch.Tensor]]
TENSORS: Named = [("a.weight", torch.zeros(4)), ("b.weight", torch.zeros(4)), ("c.weight", torch.zeros(4))]


def packed(tensors: Named, bucket_bytes: int, version: int = 3) -> tuple[WeightManifest, list[np.ndarray]]:
    buckets = list(pack(iter(tensors), bucket_bytes))
    manifest = WeightManifest(version=version, buckets=tuple(bucket for bucket, _ in buckets))
    return manifest, [data for _, data in buckets]


kinds = st.tuples(
    st.lists(st.integers(1, 4), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)


@settings(deadline=None, max_examples=50)
@given(kinds=st.lists(kinds, min_size=1, max_size=8), bucket_bytes=st.integers(1, 300))
def test_a_round_trip_gives_the_same_tensors(kinds: list[tuple[list[int], torch.dtype]], bucket_bytes: int) -> None:
    # Mixed widths put fp32 tensors at offsets that are not multiples of 4.
    sent = [(f"t{i}", torch.randn(shape).to(dtype)) for i, (shape, dtype) in enumerate(kinds)]
    manifest, arrays = packed(sent, bucket_bytes)
    received = list(verified_tensors("1", manifest, arrays))
    assert [name for name, _ in received] == [name for name, _ in sent] == list(manifest.names)
    for (_, before), (_, after) in zip(sent, received, strict=True):
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        assert torch.equal(after, before)
    assert manifest.bytes == sum(tensor.nbytes for _, tensor in sent)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), max_size=12), bucket_bytes=st.integers(1, 200))
def test_a_bucket_closes_with_the_first_tensor_that_fills_it(sizes: list[int], bucket_bytes: int) -> None:
    tensors = [(f"t{i}", torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    buckets = list(pack(iter(tensors), bucket_bytes))
    assert [spec.name for bucket, _ in buckets for spec in bucket.tensors] == [name for name, _ in tensors]
    assert b"".join(data.tobytes() for _, data in buckets) == b"".join(t.numpy().tobytes() for _, t in tensors)
    for number, (bucket, data) in enumerate(buckets):
        assert bucket.bytes == data.nbytes == sum(spec.bytes for spec in bucket.tensors)
        assert bucket.sha256 == hashlib.sha256(data.tobytes()).hexdigest()
        assert bucket.bytes - bucket.tensors[-1].bytes < bucket_bytes  # it was open when the last tensor came
        assert bucket.bytes >= bucket_bytes or number == len(buckets) - 1


@pytest.mark.parametrize("bucket_bytes", [1, 16, 10**6])
def test_a_tensor_with_two_names_is_sent_once_and_received_under_both(bucket_bytes: int) -> None:
    shared, other = torch.arange(4.0), torch.arange(4.0)  # equal values alone are no alias
    sent = [("embed.weight", shared), ("lm_head.weight", shared), ("w", other), ("v", torch.tensor(5.0))]
    manifest, arrays = packed(sent, bucket_bytes)
    received = list(verified_tensors("1", manifest, arrays))
    assert [name for name, _ in received] == list(manifest.names) == [name for name, _ in sent]
    assert all(torch.equal(before, after) for (_, before), (_, after) in zip(sent, received, strict=True))
    assert manifest.bytes == sum(array.nbytes for array in arrays) == 16 + 16 + 4
    arrays[0][0] ^= 1
    with pytest.raises(WeightSyncError, match="embed.weight"):
        list(verified_tensors("1", manifest, arrays))


@pytest.mark.parametrize(("dtype", "name", "width"), [(torch.float32, "float32", 4), (torch.bfloat16, "bfloat16", 2)])
def test_a_bucket_describes_shape_and_dtype(dtype: torch.dtype, name: str, width: int) -> None:
    # A transposed tensor is not contiguous; its bytes are sent in the order of its shape.
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3).T
    ((bucket, data),) = pack(iter([("w", tensor), ("scalar", torch.tensor(5.0, dtype=dtype))]), 10**6)
    assert [(spec.name, spec.shape, spec.dtype) for spec in bucket.tensors] == [
        ("w", (3, 2), name),
        ("scalar", (), name),
    ]
    assert data.dtype == np.uint8
    assert data.shape == (7 * width,)
    values = torch.from_numpy(data).view(dtype)
    assert values.tolist() == [0, 3, 1, 4, 2, 5, 5]


def test_a_flipped_bit_names_actor_version_and_tensor_and_yields_nothing_of_its_bucket() -> None:
    manifest, arrays = packed(TENSORS, bucket_bytes=32)  # a and b, then c
    arrays[1][5] ^= 1
    tensors = verified_tensors("1", manifest, arrays)
    assert [next(tensors)[0], next(tensors)[0]] == ["a.weight", "b.weight"]
    with pytest.raises(WeightSyncError, match=r"actor 1, weight version 3: .* tensor c\.weight has sha256"):
        next(tensors)


@pytest.mark.parametrize("damage", [slice(0, -1), slice(0, 0)])
def test_missing_bytes_are_detected(damage: slice) -> None:
    manifest, arrays = packed(TENSORS, bucket_bytes=1000)
    arrays[0] = arrays[0][damage]
    with pytest.raises(WeightSyncError, match=r"a\.weight has sha256"):
        list(verified_tensors("1", manifest, arrays))


@pytest.mark.parametrize("number", [2, 4])
def test_another_number_of_buckets_is_an_error(number: int) -> None:
    manifest, arrays = packed(TENSORS, bucket_bytes=1)
    with pytest.raises(ValueError, match="zip"):
        list(verified_tensors("1", manifest, [*arrays, arrays[0]][:number]))


def test_buckets_are_taken_one_by_one() -> None:
    # An actor needs memory for only one bucket at a time.
    manifest, arrays = packed(TENSORS, bucket_bytes=1)
    taken: list[int] = []

    def take() -> Iterator[np.ndarray]:
        for number, data in enumerate(arrays):
            taken.append(number)
            yield data

    tensors = verified_tensors("1", manifest, take())
    assert taken == []
    next(tensors)
    assert taken == [0]
    assert len(list(tensors)) == 2
    assert taken == [0, 1, 2]
