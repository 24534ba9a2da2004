"""The tensors that an actor expects: every parameter of the model class, and a name for each that is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from torch import nn
from transformers import ApertusConfig

from actors.weights import (
    RELOAD_LOGGER,
    CheckedDeliveries,
    expected_tensors,
    has_output_layer,
    is_about_weights,
)
from rlsys.config.schema import FromScratchConfig
from rlsys.errors import WeightSyncError
from rlsys.models.scratch import build_from_scratch
from rlsys.transfer.object_store import Delivery
from rlsys.weight_types import TensorSpec, WeightBucket


def delivery(*names: str) -> Delivery:
    specs = tuple(TensorSpec(name=name, shape=(4,), dtype="float32") for name in names)
    bucket = WeightBucket(tensors=specs, digest="", bytes=16 * len(names))
    return Delivery(
        version=3, bucket=bucket, last=False, data=None, group=None, fetch=lambda: np.zeros(0, dtype=np.uint8)
    )


def test_a_missing_name_names_actor_version_and_tensor_after_the_last_bucket() -> None:
    message = r"actor 1, weight version 3: tensor a\.weight is missing from the publish$"
    arriving = iter(CheckedDeliveries("1", 3, [delivery("b.weight", "c.weight")], ["c.weight", "b.weight", "a.weight"]))
    assert next(arriving).bucket.tensors[0].name == "b.weight"
    with pytest.raises(WeightSyncError, match=message):
        next(arriving)
    with pytest.raises(WeightSyncError, match=r"tensor a\.weight is missing .* \(and 1 more\)"):
        list(CheckedDeliveries("1", 3, [delivery("b.weight")], ["c.weight", "b.weight", "a.weight"]))


def test_more_names_than_the_model_has_are_allowed() -> None:
    # The output layer of a tied model is sent and is in no file.
    assert len(list(CheckedDeliveries("1", 3, [delivery("a.weight"), delivery("b.weight")], ["a.weight"]))) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_are_those_of_the_model_class(tmp_path: Path, tied: bool) -> None:
    config = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16, tie_embeddings=tied)
    build_from_scratch(config, "ab", 0, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        in_files = set(opened.keys())
    assert ("lm_head.weight" in in_files) is not tied
    expected = expected_tensors(tmp_path)
    assert expected.all == in_files | {"lm_head.weight"}  # tied or not, it must be sent
    assert expected.tied_output == ("lm_head.weight" if tied else None)


def test_buffers_that_are_weights_are_expected(tmp_path: Path) -> None:
    ApertusConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=9).save_pretrained(tmp_path)
    names = expected_tensors(tmp_path).all
    assert {"model.layers.0.mlp.act_fn.beta", "model.layers.0.mlp.act_fn.alpha_p"} <= names
    assert not any("inv_freq" in name for name in names)  # computed, not saved


class ParallelLMHead(nn.Module):
    """Named like the output layer of vLLM."""


class PackedHead(ParallelLMHead):
    """A subclass of the output layer of vLLM."""


def engine_model(**modules: nn.Module) -> SimpleNamespace:
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(2, 2)
    for name, module in modules.items():
        setattr(model, name, module)
    return SimpleNamespace(get_model=lambda: model)


def test_an_engine_has_the_output_layer_under_any_prefix_or_as_vllms_class() -> None:
    named, unnamed = nn.Module(), nn.Module()
    named.lm_head = nn.Linear(2, 2)
    unnamed.output = PackedHead()
    for layer in ({"lm_head": nn.Linear(2, 2)}, {"language_model": named}, {"language_model": unnamed}):
        assert has_output_layer(engine_model(**layer), "lm_head.weight"), layer
    assert has_output_layer(engine_model(embed_out=nn.Linear(2, 2)), "embed_out.weight")
    embedding = nn.Embedding(2, 2)
    assert has_output_layer(engine_model(first=embedding, lm_head=embedding), "lm_head.weight")  # one module, two names
    assert not has_output_layer(engine_model(), "lm_head.weight")
    assert not has_output_layer(engine_model(norm=nn.Linear(2, 2)), "lm_head.weight")


def test_the_progress_of_a_load_is_its_newest_bucket_and_the_number_of_loaded_tensors() -> None:
    progress = CheckedDeliveries("1", 3, [delivery("a", "b"), delivery("c")])
    assert (progress.first, progress.count) == ("none", 0)
    arriving = iter(progress)
    next(arriving)
    assert (progress.first, progress.count) == ("a", 0)
    next(arriving)
    assert (progress.first, progress.count) == ("c", 2)
    assert list(arriving) == [] and progress.count == 3


def test_a_table_of_rotary_embeddings_is_no_warning_and_a_layer_without_weights_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger(RELOAD_LOGGER)
    logger.addFilter(is_about_weights)
    try:
        for layer in ("RotaryEmbedding", "Llama3RotaryEmbedding", "MLP"):
            logger.warning("%s: Failed to load weights", layer)
    finally:
        logger.removeFilter(is_about_weights)
    assert caplog.messages == ["MLP: Failed to load weights"]
