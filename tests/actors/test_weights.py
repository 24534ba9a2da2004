"""Parameters on their way in: what was packed is unpacked, and what was damaged or left out is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from actors.weights import check_names, expected_tensors, verified_tensors
from learners.deepspeed.parameters import pack
from rlsys.config.schema import FromScratchConfig
from rlsys.errors import WeightSyncError
from rlsys.models.scratch import build_from_scratch
from rlsys.types import WeightManifest

Named = list[tuple[str, torch.Tensor]]


def published(tensors: Named, bucket_bytes: int, version: int = 3) -> tuple[WeightManifest, list[np.ndarray]]:
    packed = list(pack(iter(tensors), bucket_bytes))
    manifest = WeightManifest(version=version, buckets=tuple(bucket for bucket, _ in packed))
    return manifest, [data for _, data in packed]


def received(manifest: WeightManifest, arrays: list[np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    return verified_tensors("1", manifest, range(len(arrays)), lambda number: arrays[number])


kinds = st.tuples(
    st.lists(st.integers(1, 4), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)


@settings(deadline=None, max_examples=50)
@given(kinds=st.lists(kinds, min_size=1, max_size=8), bucket_bytes=st.integers(1, 300))
def test_a_round_trip_gives_the_same_tensors(kinds: list[tuple[list[int], torch.dtype]], bucket_bytes: int) -> None:
    # Mixed widths put fp32 tensors at offsets that are no multiple of 4.
    tensors = [(f"t{i}", torch.randn(shape).to(dtype)) for i, (shape, dtype) in enumerate(kinds)]
    manifest, arrays = published(tensors, bucket_bytes)
    found = list(received(manifest, arrays))
    assert [name for name, _ in found] == [name for name, _ in tensors] == list(manifest.names)
    for (_, sent), (_, got) in zip(tensors, found, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert torch.equal(got, sent)
    assert manifest.bytes == sum(tensor.nbytes for _, tensor in tensors)


TENSORS: Named = [("a.weight", torch.zeros(4)), ("b.weight", torch.zeros(4)), ("c.weight", torch.zeros(4))]


def test_a_flipped_bit_names_actor_version_and_tensor_and_yields_nothing_of_its_bucket() -> None:
    manifest, arrays = published(TENSORS, bucket_bytes=32)  # a and b, then c
    arrays[1][5] ^= 1
    tensors = received(manifest, arrays)
    assert [next(tensors)[0], next(tensors)[0]] == ["a.weight", "b.weight"]
    with pytest.raises(WeightSyncError, match=r"actor 1, weight version 3: .* tensor c\.weight has sha256"):
        next(tensors)


@pytest.mark.parametrize("damage", [slice(0, -1), slice(0, 0)])
def test_missing_bytes_are_found(damage: slice) -> None:
    manifest, arrays = published(TENSORS, bucket_bytes=1000)
    arrays[0] = arrays[0][damage]
    with pytest.raises(WeightSyncError, match=r"a\.weight has sha256"):
        list(received(manifest, arrays))


def test_buckets_are_fetched_one_by_one() -> None:
    # Only one bucket at a time needs memory in the actor.
    manifest, arrays = published(TENSORS, bucket_bytes=1)
    fetched: list[int] = []

    def fetch(number: int) -> np.ndarray:
        fetched.append(number)
        return arrays[number]

    tensors = verified_tensors("1", manifest, range(3), fetch)
    assert fetched == []
    next(tensors)
    assert fetched == [0]
    assert len(list(tensors)) == 2
    assert fetched == [0, 1, 2]


def test_a_missing_name_names_actor_version_and_tensor() -> None:
    manifest, _ = published(TENSORS[1:], bucket_bytes=1)
    message = r"actor 1, weight version 3: tensor a\.weight is missing from the publish$"
    with pytest.raises(WeightSyncError, match=message):
        check_names("1", manifest, ["c.weight", "b.weight", "a.weight"])
    with pytest.raises(WeightSyncError, match=r"tensor a\.weight is missing .* \(and 1 more\)"):
        check_names("1", manifest, ["c.weight", "d.weight", "a.weight"])


def test_more_names_than_the_files_have_are_fine() -> None:
    # The output layer of a tied model is sent and is in no file.
    manifest, _ = published(TENSORS, bucket_bytes=1)
    check_names("1", manifest, ["a.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_are_those_of_the_model_class(tmp_path: Path, tied: bool) -> None:
    config = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16, tie_embeddings=tied)
    build_from_scratch(config, "ab", 0, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        in_files = set(opened.keys())
    assert ("lm_head.weight" in in_files) is not tied
    assert expected_tensors(tmp_path) == in_files | {"lm_head.weight"}  # tied or not, it must be sent
