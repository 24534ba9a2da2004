"""Commands between preflight and Ray: what they start, in which order, and what signals and failures leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rlsys.config.engine_roles import ModelEngines, Searching, engine_settings, given_models
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import AbortedRunError, EngineError
from rlsys.launch import ray_cluster as cluster_module
from rlsys.launch import session as launch
from rlsys.launch.placement import place
from rlsys.launch.prepare import Evaluation, Prepared
from rlsys.launch.signals import StopSignals
from rlsys.models.folder import ModelFolder

REVIEWER = {"path": "r", "count": 2, "max_model_len": 1024}
LARGE = {"path": "l", "count": 1, "max_model_len": 4096}


def config(run_dir: Path | str = "d", **sections: Any) -> Config:
    values = {"run": {"dir": str(run_dir)}, "model": {"path": "m"}, "task": {"type": "letter_count"}, **sections}
    return parse_config(values, "test")


def engines(config: Config) -> dict[Any, ModelEngines]:
    return {
        role: ModelEngines(role=role, path=Path(model.path), actors=engine_settings(config, role, model))
        for role, model in given_models(config).items()
    }


def prepared(config: Config, inputs: Any, searching: Searching | None, tree_prompts: Any = ()) -> Prepared:
    models = {name: ModelFolder(Path(name)) for name in ("policy", *given_models(config))}
    return Prepared(
        config=config,
        models=models,
        searching=searching,
        inputs=inputs,
        tree_prompts=tree_prompts,
        notes=getattr(inputs, "notes", ()),
        plans=(),
    )


def test_the_trees_of_the_stage_search_do_not_depend_on_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        launch,
        "search_model_digests",
        lambda models: {f"search.{name}.path": "w" for name in models if name != "policy"},
    )
    own = config(stages=["search", "sft"], search={"reviewer": REVIEWER}, sft={"path": "rows.jsonl"})
    data = SimpleNamespace(fingerprint=lambda: {"sft.path": "d"})
    inputs = SimpleNamespace(data=data, fingerprint=lambda: {"task.path": "t", "sft.path": "d"})
    searching = Searching(auxiliary=tuple(engines(own).values()))
    session: Any = SimpleNamespace(
        config=own, run_dir=tmp_path, prepared=prepared(own, inputs, searching, ["a prompt"]), display="display"
    )
    pool: Any = "pool"
    stage = launch._search_stage(session, pool)
    assert stage.folder == tmp_path / "stages" / "search"
    assert stage.inputs == {"task.path": "t", "search.reviewer.path": "w"}
    assert (stage.prompts, stage.pool, stage.model.path) == (["a prompt"], "pool", Path("policy"))


class Started:
    """Records the steps of a command after its preflight; nothing is started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Any] = []
        monkeypatch.setattr(launch, "prepare", self.prepare)
        monkeypatch.setattr(launch, "ray_cluster", self.cluster)
        monkeypatch.setattr(launch, "rollout_pool", self.pool)

    def prepare(self, config: Config, purpose: str, policy: ModelFolder | None = None) -> Prepared:
        self.steps.append(("prepare", purpose, policy.path if policy else None))
        searching = None
        if purpose == "search" or config.evaluation.search_answers:
            auxiliary = tuple(model for role, model in engines(config).items() if role != "model")
            searching = Searching(role="model" if config.search.model else "policy", auxiliary=auxiliary)
        return prepared(config, SimpleNamespace(notes=["1 row skipped"], held_out=["a prompt"]), searching)

    @contextlib.contextmanager
    def cluster(self, _config: Config, _run_dir: Path, bundles: list[Any]) -> Any:
        self.steps.append(("cluster", len(bundles)))
        yield None

    @contextlib.asynccontextmanager
    async def pool(self, _cluster: None, model: Path, searching: Searching | None, adapted: Any = None) -> Any:
        assert adapted is None
        self.steps.append(("pool", model, searching.role if searching else None))
        yield "pool"

    def begin(self, inputs: Any, models: Any) -> Any:
        self.steps.append(("begin", inputs.notes, [*models]))
        return self.grow

    async def grow(self, pool: Any, stop: StopSignals) -> None:
        self.steps.append(("grow", pool))
        stop.ask_first(lambda name: self.steps.append(("asked", name)), "")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)  # the loop calls the function given to ask_first


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


def test_trees_are_grown_by_the_model_of_the_search_and_its_reviewer(started: Started, tmp_path: Path) -> None:
    launch.grow_trees(config(tmp_path, search={"model": LARGE, "reviewer": REVIEWER}), started.begin)
    assert started.steps == [
        ("prepare", "search", None),
        ("begin", ["1 row skipped"], ["policy", "model", "reviewer"]),
        ("cluster", 4),
        ("pool", Path("model"), "model"),
        ("grow", "pool"),
        ("asked", "SIGINT"),
    ]


def test_nothing_is_started_if_no_tree_is_missing(
    started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.grow_trees(config(tmp_path), lambda *_: None)
    assert [step[0] for step in started.steps] == ["prepare"]
    assert capsys.readouterr() == ("", "1 row skipped\n")


def test_a_signal_ends_the_growing_and_keeps_finished_trees(started: Started, tmp_path: Path) -> None:
    async def grow(_pool: Any, _stop: StopSignals) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(20)

    with pytest.raises(AbortedRunError, match="^SIGINT; finished trees are kept, the same command continues$"):
        launch.grow_trees(config(tmp_path), lambda *_: grow)


@pytest.mark.parametrize(("answers", "role", "bundles"), [(0, None, 2), (2, "policy", 4)])
def test_an_evaluation_with_search_starts_the_reviewer(
    started: Started,
    tmp_path: Path,
    answers: int,
    role: str | None,
    bundles: int,
) -> None:
    own = config(search={"reviewer": REVIEWER}, evaluation={"search_answers": answers})

    async def measure(pool: Any, prompts: Any) -> None:
        started.steps.append(("measured", pool, prompts))

    ready = launch.prepare(own, "evaluate", ModelFolder(tmp_path))
    evaluation = Evaluation(policy=tmp_path, config=own, model=ModelFolder(tmp_path), prepared=ready, adapted=None)
    launch.evaluate_policy(evaluation, measure)
    assert started.steps == [
        ("prepare", "evaluate", tmp_path),
        ("cluster", bundles),
        ("pool", tmp_path, role),
        ("measured", "pool", ["a prompt"]),
    ]


def test_a_replaced_actor_loads_a_policy_that_retention_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Any] = []
    attempts: list[Any] = []
    bus = SimpleNamespace(calibrated=False)

    @contextlib.asynccontextmanager
    async def pool(*arguments: Any):
        pools.append(arguments)
        yield SimpleNamespace(activity=lambda: ["actors"])

    beats: list[Any] = []
    beaten = threading.Event()

    def beat(*work: Any) -> None:
        beats.append(work)
        beaten.set()

    async def attempt(_session: Any, start: Any, *_arguments: Any) -> None:
        attempts.append(start)
        assert await asyncio.to_thread(beaten.wait, 10)

    monkeypatch.setattr(launch, "rollout_pool", pool)
    closed: list[bool] = []
    learner = SimpleNamespace(close=lambda: closed.append(True), activity=lambda: {"call": "train"})
    monkeypatch.setattr(launch, "RayLearner", lambda *_arguments: learner)
    monkeypatch.setattr(launch, "WeightBus", lambda *_arguments: bus)
    monkeypatch.setattr(launch, "_run", attempt)
    own = config()
    start = SimpleNamespace(describe=lambda: "resuming", checkpoint=Path("checkpoint"))
    session: Any = SimpleNamespace(
        config=own,
        run_dir=Path("d"),
        store=SimpleNamespace(sweep=lambda: None),
        start=start,
        prepared=prepared(own, SimpleNamespace(notes=(), probe=lambda _tokens: None), None),
        placement=place(own, learner=True),
        display=SimpleNamespace(message=lambda text: None, waiting=lambda text: None),
        journal=SimpleNamespace(beat=beat),
    )
    cluster: Any = SimpleNamespace(config=session.config)
    asyncio.run(launch._train(cluster, session))
    assert attempts == [start] and closed == [True]
    assert beats == [(["actors"], {"call": "train"})]
    _, serving, _, replacement_policy, *_ = pools[0]
    assert serving == replacement_policy() == Path("checkpoint/policy")
    bus.calibrated = True  # from then on training may remove the checkpoint
    assert replacement_policy() == Path("policy")


def test_a_dead_ray_ends_the_work_with_its_name() -> None:
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


def test_a_living_ray_changes_nothing() -> None:
    async def work() -> str:
        return "done"

    cluster = cluster_module.Cluster(None, config(), Path("d"), Path("t"))  # type: ignore[arg-type]
    assert asyncio.run(cluster.watched(work())) == "done"
