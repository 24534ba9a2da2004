"""Where engines and ranks are placed, and in what order the growing of trees is prepared. Ray is not started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from actors.model_actor import ModelActor
from actors.rollout_actor import RolloutActor
from learners.learner_actor import LearnerActor
from rlsys.config.engine_roles import ModelEngines, Searching, engine_settings, given_models
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import AbortedRunError, EngineError
from rlsys.launch import ray_cluster as cluster_module
from rlsys.launch import session as launch
from rlsys.launch.signals import StopSignals

REVIEWER = {"path": "r", "count": 2, "max_model_len": 1024}
LARGE = {"path": "l", "count": 1, "max_model_len": 4096}


def config(**sections: Any) -> Config:
    values = {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}, **sections}
    return parse_config(values, "test")


def engines(found: Config) -> dict[Any, ModelEngines]:
    return {
        writer: ModelEngines(writer=writer, path=Path(model.path), actors=engine_settings(found, writer, model))
        for writer, model in given_models(found).items()
    }


class Cluster:
    """Keeps which bundle each process was put into."""

    def __init__(self, found: Config, run_dir: Path) -> None:
        self.config, self.run_dir = found, run_dir
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
    """Stands for the fleet: starts its actors, and keeps what it was made of."""

    made: list[dict[str, Any]]

    def __init__(self, spawn: Any, count: int, **options: Any) -> None:
        self.made.append(options | {"actors": [spawn(number, 0) for number in range(count)]})

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *exception: object) -> None: ...


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(Pool, "made", [], raising=False)
    monkeypatch.setattr(launch, "Fleet", Pool)
    return Pool.made


def test_every_process_has_a_bundle_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[dict[str, Any]]
) -> None:
    found = config(actors={"count": 2}, learner={"ranks": 2}, search={"reviewer": REVIEWER, "model": LARGE})
    searching = Searching(beside=tuple(engines(found).values()))
    cluster: Any = Cluster(found, tmp_path)
    monkeypatch.setattr(launch.ray, "remote", cluster.remote)

    async def start() -> None:
        async with launch.rollout_pool(cluster, Path("policy"), searching):
            pass

    asyncio.run(start())
    first = len(launch.actor_bundles(found) + launch.beside_bundles(found, searching.beside))
    launch.learner_handles(cluster, 0, first, attempt=1)
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
    beside = {"model": ["ModelActor in 2"], "reviewer": ["ModelActor in 3", "ModelActor in 4"]}
    assert pools[0]["role"] == "policy"
    named = [("model", 0, "ModelActor in 2"), ("reviewer", 0, "ModelActor in 3"), ("reviewer", 1, "ModelActor in 4")]
    assert [(writer, number, found.handle) for writer, number, found in pools[0]["auxiliary"]] == named
    actor = next(settings for _, kind, settings in cluster.placed if kind is RolloutActor)
    assert (actor.search, actor.role, actor.auxiliary_handles) == (found.search, "policy", beside)
    assert actor.auxiliary_paths == {"model": Path("l"), "reviewer": Path("r")}


def test_actors_that_are_never_asked_to_search_know_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[dict[str, Any]]
) -> None:
    cluster: Any = Cluster(config(search={"reviewer": REVIEWER}), tmp_path)
    monkeypatch.setattr(launch.ray, "remote", cluster.remote)

    async def start() -> None:
        async with launch.rollout_pool(cluster, Path("policy")):
            pass

    asyncio.run(start())
    assert [kind for _, kind, _ in cluster.placed] == [RolloutActor, RolloutActor]
    assert cluster.placed[0][2].search is None
    assert (pools[0]["role"], pools[0]["auxiliary"]) == ("policy", [])


def test_a_replaced_actor_loads_a_folder_that_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: Any = Cluster(config(), tmp_path)
    monkeypatch.setattr(launch.ray, "remote", cluster.remote)
    policy = tmp_path / "policy"
    policy.mkdir()

    class Replacing(Pool):
        def __init__(self, spawn: Any, count: int, **options: Any) -> None:
            spawn(1, 0)
            policy.rmdir()  # of a checkpoint that retention has removed
            spawn(1, 1)

    monkeypatch.setattr(launch, "Fleet", Replacing)

    async def start() -> None:
        async with launch.rollout_pool(cluster, policy, again=lambda: tmp_path):
            pass

    asyncio.run(start())
    found = [(bundle, settings.name, settings.attempt, settings.model_path) for bundle, _, settings in cluster.placed]
    assert found == [(1, "1", 0, policy), (1, "1", 1, tmp_path)]


def test_the_stage_search_has_what_decides_its_trees_and_nothing_of_what_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "writer_digests", lambda models: {f"search.{name}.path": "w" for name in models})
    found = config(stages=["search", "sft"], search={"reviewer": REVIEWER}, sft={"path": "rows.jsonl"})
    data = SimpleNamespace(fingerprint=lambda: {"sft.path": "d"})
    inputs = SimpleNamespace(data=data, fingerprint=lambda: {"task.path": "t", "sft.path": "d"})
    session: Any = SimpleNamespace(
        config=found,
        run_dir=tmp_path,
        model=Path("policy"),
        inputs=inputs,
        searching=Searching(beside=tuple(engines(found).values())),
        to_search=["a prompt"],
        display="display",
    )
    pool: Any = "pool"
    stage = launch._search_stage(session, pool)
    assert stage.folder == tmp_path / "stages" / "search"
    assert stage.inputs == {"task.path": "t", "search.reviewer.path": "w"}
    assert (stage.prompts, stage.pool, stage.model) == (["a prompt"], "pool", Path("policy"))


def test_the_heading_counts_the_trees_of_the_stage_search() -> None:
    found = config(stages=["warm_start", "search", "sft"], search={"prompts": 9}, sft={"max_steps": 4})
    assert launch._totals(found) == {"warm_start": 300, "search": 9, "sft": 4}


class Started:
    """What grow_trees does, in order; nothing is started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Any] = []
        self.tokenizers: list[dict[Any, Path]] = []  # that are asked whether they keep the tags
        monkeypatch.setattr(launch, "prepare_model", lambda *_: Path("policy"))
        monkeypatch.setattr(launch, "search_engines", engines)
        monkeypatch.setattr(launch.resources, "plan", self.plan)
        monkeypatch.setattr(launch, "check_tags", lambda _search, models: self.tokenizers.append(models))
        monkeypatch.setattr(launch, "Inputs", lambda *_, **__: SimpleNamespace(notes=["1 row skipped"]))
        monkeypatch.setattr(launch, "ray_cluster", self.cluster)
        monkeypatch.setattr(launch, "rollout_pool", self.pool)

    def plan(self, found: Config, model: Path, *, learner: bool, beside: tuple[ModelEngines, ...]) -> list[Any]:
        self.steps.append(("plan", found.actors.max_model_len, model, learner, [engine.writer for engine in beside]))
        return []

    @contextlib.contextmanager
    def cluster(self, _config: Config, _run_dir: Path, bundles: list[Any]) -> Any:
        self.steps.append(("cluster", len(bundles)))
        yield None

    @contextlib.asynccontextmanager
    async def pool(self, _cluster: None, model: Path, searching: Searching) -> Any:
        self.steps.append(("pool", model, searching.writer))
        yield "pool"

    def prepare(self, inputs: Any, models: Any) -> Any:
        self.steps.append(("prepare", inputs.notes, models))
        return self.grow

    async def grow(self, pool: Any, stop: StopSignals) -> None:
        self.steps.append(("grow", pool))
        stop.ask_first(lambda name: self.steps.append(("asked", name)), "")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)  # the loop calls what was asked for


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


def test_trees_are_grown_by_the_model_of_the_search_and_its_reviewer(started: Started, tmp_path: Path) -> None:
    launch.grow_trees(config(search={"model": LARGE, "reviewer": REVIEWER}), tmp_path, started.prepare)
    assert started.steps == [
        ("plan", 4096, Path("l"), False, ["reviewer"]),
        ("prepare", ["1 row skipped"], {"policy": Path("policy"), "model": Path("l"), "reviewer": Path("r")}),
        ("cluster", 3),
        ("pool", Path("l"), "model"),
        ("grow", "pool"),
        ("asked", "SIGINT"),
    ]
    assert started.tokenizers == [{"policy": Path("policy"), "model": Path("l"), "reviewer": Path("r")}]


def test_nothing_is_started_where_nothing_is_left(
    started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.grow_trees(config(), tmp_path, lambda *_: None)
    assert [step[0] for step in started.steps] == ["plan"]
    assert capsys.readouterr() == ("", "1 row skipped\n")


def test_a_signal_ends_the_growing_and_says_what_is_kept(started: Started, tmp_path: Path) -> None:
    async def grow(_pool: Any, _stop: StopSignals) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(20)

    with pytest.raises(AbortedRunError, match="^SIGINT; finished trees are kept, the same command continues$"):
        launch.grow_trees(config(), tmp_path, lambda *_: grow)


@pytest.mark.parametrize(("answers", "writers"), [(0, []), (2, ["reviewer"])])
def test_an_evaluation_with_search_has_the_reviewer_beside_it(
    started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: int, writers: list[str]
) -> None:
    found = config(search={"reviewer": REVIEWER}, evaluation={"search_answers": answers})

    @contextlib.asynccontextmanager
    async def pool(_cluster: None, model: Path, searching: Searching | None) -> Any:
        assert model == tmp_path
        assert (searching.writer if searching else None) == ("policy" if answers else None)
        yield "pool"

    async def measure(pool: Any, _prompts: Any, _config: Config) -> dict[str, Any]:
        return {"measured": pool}

    monkeypatch.setattr(launch, "rollout_pool", pool)
    inputs = SimpleNamespace(notes=[], held_out=[])
    monkeypatch.setattr(launch, "Inputs", lambda *_, **__: inputs)
    assert launch.evaluate_policy(tmp_path, found, measure) == {"measured": "pool"}
    assert started.steps == [
        ("plan", 256, tmp_path, False, writers),
        ("cluster", 2 + 2 * len(writers)),
    ]
    asked = {"policy": tmp_path, "reviewer": Path("r")}
    assert started.tokenizers == ([asked] if answers else [])


def test_a_replaced_actor_loads_a_policy_that_retention_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Any] = []
    attempts: list[Any] = []
    bus = SimpleNamespace(calibrated=False)

    @contextlib.asynccontextmanager
    async def pool(*arguments: Any):
        pools.append(arguments)
        yield None

    async def attempt(_session: Any, start: Any, *_arguments: Any) -> None:
        attempts.append(start)

    monkeypatch.setattr(launch, "rollout_pool", pool)
    closed: list[bool] = []
    learner = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(launch, "RayLearner", lambda *_arguments: learner)
    monkeypatch.setattr(launch, "WeightBus", lambda *_arguments: bus)
    monkeypatch.setattr(launch, "_run", attempt)
    start = SimpleNamespace(describe=lambda: "resuming", checkpoint=Path("checkpoint"))
    session: Any = SimpleNamespace(
        config=config(),
        run_dir=Path("d"),
        store=SimpleNamespace(sweep=lambda: None),
        start=start,
        model=Path("m"),
        searching=None,
        inputs=SimpleNamespace(notes=(), probe=lambda: None),
        display=SimpleNamespace(message=lambda text: None),
    )
    cluster: Any = SimpleNamespace(config=session.config)
    asyncio.run(launch._train(cluster, session))
    assert attempts == [start] and closed == [True]
    _, serving, _, replacement_policy, _ = pools[0]
    assert serving == replacement_policy() == Path("checkpoint/policy")
    bus.calibrated = True  # from then on training may remove the checkpoint
    assert replacement_policy() == Path("m")


def test_a_ray_that_is_gone_ends_the_work_by_name() -> None:
    async def main() -> list[str]:
        ended: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(30)
            finally:
                ended.append("cancelled")

        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
            services = {"raylet": psutil.Process(process.pid)}
            cluster = cluster_module.Cluster(None, config(), Path("d"), Path("t"), services)  # type: ignore[arg-type]
            asyncio.get_running_loop().call_later(0.05, process.kill)
            with pytest.raises(EngineError, match=f"Ray is lost: its raylet .process {process.pid}. has died"):
                await cluster.watched(work())
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module, "WATCH_INTERVAL_S", 0.02)
        assert asyncio.run(main()) == ["cancelled"]


def test_a_ray_that_is_there_changes_nothing() -> None:
    async def work() -> str:
        return "done"

    cluster = cluster_module.Cluster(None, config(), Path("d"), Path("t"))  # type: ignore[arg-type]
    assert asyncio.run(cluster.watched(work())) == "done"
