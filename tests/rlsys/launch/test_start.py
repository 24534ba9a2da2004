"""Starting actors, engines and ranks in their bundles. Ray is replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.model_actor import ModelActor
from actors.rollout_actor import RolloutActor
from learners.learner_actor import LearnerActor
from rlsys.config.engine_roles import ModelEngines, Searching, engine_settings, given_models
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.launch import start
from rlsys.launch.placement import LEARNER, place

REVIEWER = {"path": "r", "count": 2, "max_model_len": 1024}
LARGE = {"path": "l", "count": 1, "max_model_len": 4096}


def config(**sections: Any) -> Config:
    values = {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}, **sections}
    return parse_config(values, "test")


def engines(config: Config) -> dict[Any, ModelEngines]:
    return {
        role: ModelEngines(role=role, path=Path(model.path), actors=engine_settings(config, role, model))
        for role, model in given_models(config).items()
    }


class Cluster:
    """Stands for Ray: records the bundle of each process."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.placed: list[tuple[int, type, Any]] = []

    def options(self, bundle: int, gpus: int, environment: dict[str, str]) -> dict[str, Any]:
        return {"bundle": bundle}

    def remote(self, *kinds: type, **options: Any) -> Any:
        if options:
            return self.remote
        (kind,) = kinds

        def start(bundle: int, settings: Any) -> str:
            self.placed.append((bundle, kind, settings))
            return f"{kind.__name__} in {bundle}"

        return SimpleNamespace(
            options=lambda bundle, **_: SimpleNamespace(remote=lambda settings, *_: start(bundle, settings))
        )


class Pool:
    """Stands for the fleet: starts its actors and records its arguments."""

    made: list[dict[str, Any]]

    def __init__(self, spawn: Any, count: int, **options: Any) -> None:
        self.made.append(options | {"actors": [spawn(number, 0) for number in range(count)]})

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *exception: object) -> None: ...


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(Pool, "made", [], raising=False)
    monkeypatch.setattr(start, "Fleet", Pool)
    return Pool.made


def test_every_process_has_its_own_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[dict[str, Any]]
) -> None:
    own = config(actors={"count": 2}, learner={"ranks": 2}, search={"reviewer": REVIEWER, "model": LARGE})
    searching = Searching(auxiliary=tuple(engines(own).values()))
    cluster: Any = Cluster(own, tmp_path)
    monkeypatch.setattr(start.ray, "remote", cluster.remote)

    async def run() -> None:
        async with start.rollout_pool(cluster, Path("policy"), searching):
            pass

    asyncio.run(run())
    ranks = place(own, searching.auxiliary, learner=True).indices[LEARNER]
    start.learner_handles(cluster, ranks, pad_token_id=0, attempt=1, base=Path("policy"))
    assert sorted((bundle, kind) for bundle, kind, _ in cluster.placed if kind is RolloutActor) == [
        (0, RolloutActor),
        (1, RolloutActor),
    ]
    assert [(bundle, settings.name) for bundle, kind, settings in cluster.placed if kind is ModelActor] == [
        (2, "model engine 0"),
        (3, "reviewer engine 0"),
        (4, "reviewer engine 1"),
    ]
    assert [bundle for bundle, kind, _ in cluster.placed if kind is LearnerActor] == [5, 6]
    handles = {"model": ["ModelActor in 2"], "reviewer": ["ModelActor in 3", "ModelActor in 4"]}
    assert pools[0]["role"] == "policy"
    named = [("model", 0, "ModelActor in 2"), ("reviewer", 0, "ModelActor in 3"), ("reviewer", 1, "ModelActor in 4")]
    assert [(writer, number, engine.handle) for writer, number, engine in pools[0]["auxiliary"]] == named
    actor = next(settings for _, kind, settings in cluster.placed if kind is RolloutActor)
    assert (actor.search, actor.role, actor.auxiliary_handles) == (own.search, "policy", handles)
    assert actor.auxiliary_paths == {"model": Path("l"), "reviewer": Path("r")}


def test_actors_that_never_search_have_no_search_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[dict[str, Any]]
) -> None:
    cluster: Any = Cluster(config(search={"reviewer": REVIEWER}), tmp_path)
    monkeypatch.setattr(start.ray, "remote", cluster.remote)

    async def run() -> None:
        async with start.rollout_pool(cluster, Path("policy")):
            pass

    asyncio.run(run())
    assert [kind for _, kind, _ in cluster.placed] == [RolloutActor, RolloutActor]
    assert cluster.placed[0][2].search is None
    assert (pools[0]["role"], pools[0]["auxiliary"]) == ("policy", [])


def test_a_replaced_actor_loads_the_replacement_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: Any = Cluster(config(), tmp_path)
    monkeypatch.setattr(start.ray, "remote", cluster.remote)
    policy = tmp_path / "policy"
    policy.mkdir()

    class Replacing(Pool):
        def __init__(self, spawn: Any, count: int, **options: Any) -> None:
            spawn(1, 0)
            policy.rmdir()  # retention has removed the checkpoint
            spawn(1, 1)

    monkeypatch.setattr(start, "Fleet", Replacing)

    async def run() -> None:
        async with start.rollout_pool(cluster, policy, replacement_model=lambda: tmp_path):
            pass

    asyncio.run(run())
    placed = [(bundle, settings.name, settings.attempt, settings.model_path) for bundle, _, settings in cluster.placed]
    assert placed == [(1, "1", 0, policy), (1, "1", 1, tmp_path)]
