"""The tensors that an actor expects: every parameter of the model class, and a name for each that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from actors.weights import LoadProgress, check_names, expected_tensors
from rlsys.config.schema import FromScratchConfig
from rlsys.errors import WeightSyncError
from rlsys.models.scratch import build_from_scratch
from rlsys.types import TensorSpec, WeightBucket, WeightManifest


def manifest(*names: str) -> WeightManifest:
    specs = tuple(TensorSpec(name=name, shape=(4,), dtype="float32") for name in names)
    return WeightManifest(
        version=3, buckets=tuple(WeightBucket(tensors=(spec,), sha256="", bytes=16) for spec in specs)
    )


def test_a_missing_name_names_actor_version_and_tensor() -> None:
    offered = manifest("b.weight", "c.weight")
    message = r"actor 1, weight version 3: tensor a\.weight is missing from the publish$"
    with pytest.raises(WeightSyncError, match=message):
        check_names("1", offered, ["c.weight", "b.weight", "a.weight"])
    with pytest.raises(WeightSyncError, match=r"tensor a\.weight is missing .* \(and 1 more\)"):
        check_names("1", offered, ["c.weight", "d.weight", "a.weight"])


def test_more_names_than_the_model_has_are_allowed() -> None:
    # The output layer of a tied model is sent and is in no file.
    check_names("1", manifest("a.weight", "b.weight"), ["a.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_are_those_of_the_model_class(tmp_path: Path, tied: bool) -> None:
    config = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16, tie_embeddings=tied)
    build_from_scratch(config, "ab", 0, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        in_files = set(opened.keys())
    assert ("lm_head.weight" in in_files) is not tied
    assert expected_tensors(tmp_path) == in_files | {"lm_head.weight"}  # tied or not, it must be sent


def test_the_progress_of_a_load_is_its_last_tensor_and_their_number() -> None:
    progress = LoadProgress([("a", None), ("b", None)])
    assert (progress.last, progress.count) == ("none", 0)
    tensors = iter(progress)
    next(tensors)
    assert (progress.last, progress.count) == ("a", 1)
    list(tensors)
    assert (progress.last, progress.count) == ("b", 2)
