"""Which engines a search starts, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsys.config.engine_roles import (
    ModelEngines,
    assign_search_roles,
    describes_a_search,
    engine_settings,
    given_models,
    searches_in_training,
    trees_ahead,
)
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError

LARGE = {"path": "large", "count": 3, "dtype": "bf16", "max_model_len": 4096, "max_num_seqs": 64, "kv_cache_gib": 8}


def config(**sections: Any) -> Config:
    values = {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}, **sections}
    return parse_config(values, "test")


def engines(found: Config) -> dict[Any, ModelEngines]:
    return {
        role: ModelEngines(role=role, path=Path(model.path), actors=engine_settings(found, role, model))
        for role, model in given_models(found).items()
    }


def test_a_model_of_the_search_has_its_own_sizes_and_the_rest_of_the_actors() -> None:
    found = config(actors={"threads": 2, "block_size": 16}, search={"reviewer": LARGE})
    (settings,) = (engine.actors for engine in engines(found).values())
    assert (settings.count, settings.dtype, settings.max_model_len) == (3, "bf16", 4096)
    assert (settings.max_num_seqs, settings.kv_cache_gib, settings.tensor_parallel_size) == (64, 8.0, 1)
    assert (settings.threads, settings.block_size) == (2, 16)


def test_the_policy_grows_trees_where_no_other_model_is_given() -> None:
    found = config(search={"reviewer": LARGE})
    serving, model, searching = assign_search_roles(found, Path("policy"), engines(found))
    assert (serving, model, searching.role) == (found, Path("policy"), "policy")
    assert [(auxiliary.role, auxiliary.path) for auxiliary in searching.auxiliary] == [("reviewer", Path("large"))]


def test_search_model_takes_the_place_of_the_policy() -> None:
    found = config(search={"model": LARGE})
    serving, model, searching = assign_search_roles(found, Path("policy"), engines(found))
    assert (model, searching.role, searching.auxiliary) == (Path("large"), "model", ())
    assert (serving.actors.count, serving.actors.max_model_len) == (3, 4096)
    assert serving.search == found.search


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"search": {"fraction": 0.5}}, True),
        ({"search": {"fraction": 0}}, False),
        ({"search": {"fraction": 0.5}, "stages": ["warm_start"]}, False),
    ],
)
def test_training_searches_in_the_online_stage_only(sections: dict[str, Any], expected: bool) -> None:
    assert searches_in_training(config(**sections)) is expected


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, False),
        ({"search": {"fraction": 0.5}}, True),
        ({"search": {"patterns": ["b"]}}, True),
        ({"evaluation": {"search_answers": 2}}, True),
    ],
)
def test_a_search_is_described_where_anything_of_it_is_set(sections: dict[str, Any], expected: bool) -> None:
    assert describes_a_search(config(**sections)) is expected


@pytest.mark.parametrize(
    ("sequences", "model", "expected"),
    [
        (256, None, 128),  # 2 * 256 / 4
        (3, None, 8),  # at least
        (256, {"path": "m", "max_num_seqs": 64}, 32),  # its engines, not the policy's
    ],
)
def test_an_actor_holds_enough_trees(sequences: int, model: dict[str, Any] | None, expected: int) -> None:
    search = {"parallel_simulations": 4, "model": model}
    assert trees_ahead(config(actors={"max_num_seqs": sequences}, search=search)) == expected


def test_an_engine_over_several_cpus_is_refused() -> None:
    reviewer = {**LARGE, "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"search\.reviewer\.tensor_parallel_size above 1 needs run\.device: cuda"):
        engines(config(search={"reviewer": reviewer}))
    on_gpus = engines(config(run={"dir": "d", "device": "cuda"}, search={"reviewer": reviewer}))
    assert on_gpus["reviewer"].actors.tensor_parallel_size == 2


def test_the_stage_search_asks_the_actors_of_a_training_run_for_trees() -> None:
    for stages in (["search", "sft"], ["warm_start", "search", "preference", "online"]):
        found = config(stages=stages, objective={"sft": {"weight": 1.0, "source": "demonstrations"}})
        assert searches_in_training(found) and describes_a_search(found)
    assert not searches_in_training(config(stages=["warm_start", "online"]))
