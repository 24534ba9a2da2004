"""Bundles of a placement group and the indices of every role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsys.config.engine_roles import ModelEngines, engine_settings, given_models
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.launch.placement import place


def config(**sections: Any) -> Config:
    values = {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}, **sections}
    return parse_config({**values, "actors": {"count": 2}, "learner": {"ranks": 2}}, "test")


def test_actors_and_ranks() -> None:
    placement = place(config(), learner=True)
    assert placement.indices == {"rollout": range(2), "learner": range(2, 4)}
    assert placement.bundles == [{"CPU": 1.0}] * 4
    assert place(config()).indices == {"rollout": range(2)}


def test_auxiliary_engines_lie_between_actors_and_ranks() -> None:
    reviewer = {"path": "r", "count": 2, "max_model_len": 1024, "tensor_parallel_size": 2}
    own = config(run={"dir": "d", "device": "cuda"}, search={"reviewer": reviewer})
    engines = [
        ModelEngines(role=role, path=Path(model.path), actors=engine_settings(own, role, model))
        for role, model in given_models(own).items()
    ]
    placement = place(own, engines, learner=True)
    assert placement.indices == {"rollout": range(2), "reviewer": range(2, 4), "learner": range(4, 6)}
    assert [bundle["GPU"] for bundle in placement.bundles] == [1, 1, 2, 2, 1, 1]


def test_a_colocated_rank_shares_the_device_of_an_actor() -> None:
    shared = config(run={"dir": "d", "device": "cuda"}, placement="colocated")
    placement = place(shared, learner=True)
    assert placement.indices == {"rollout": range(2), "learner": range(2)}
    assert placement.bundles == [{"CPU": 2.0, "GPU": 1.0}] * 2
    assert placement.colocated
    assert place(shared).bundles == [{"CPU": 1.0, "GPU": 1.0}] * 2
