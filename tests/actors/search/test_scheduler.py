"""Many trees in one event loop. Engines answer on other threads at any time, which does not change the trees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scripted_verifier import chain_command
from search_engines import WORLD, Judges, OnVerdicts, ThreadEngine, call_of
from search_world import QUESTION, codec, grow, prompt, search_model

from actors.engine import Completion, CompletionRequest
from actors.rollout_actor import RolloutActor
from actors.search.scheduler import TreeScheduler, Verifier
from actors.search.starting import RoleEngine, SchedulerSettings
from actors.verifiers.pool import RewardPool
from rlsys.config.rewards import RewardsConfig
from rlsys.config.search import SearchConfig, StopConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.control.tree_search import Search
from rlsys.display import Display
from rlsys.errors import EngineError, RolloutError, TooManyFailuresError
from rlsys.interfaces import EngineStats
from rlsys.search.tree_json import read_trees, tree_line
from rlsys.trees import Role, Tree, TreeFailure
from rlsys.types import Problem, Prompt, RolloutFailure, Verdict

CONFIG = SearchConfig(max_depth=6, stop=StopConfig(simulations=24))
TIMEOUT_S = 20.0


def new_scheduler(
    engines: Mapping[Role, Any], judges: Verifier | None = None, *, in_flight: int = 16, max_model_len: int = 600
) -> TreeScheduler:
    kinds: dict[Role, str] = {"policy": "tags", "model": "bpe", "reviewer": "bytes"}
    models: dict[Role, RoleEngine] = {
        name: RoleEngine(
            engine=engine,
            model=f"{kinds[name]} model",
            codec=codec(kinds[name]),
            max_model_len=max_model_len if name == "policy" else 2000,
        )
        for name, engine in engines.items()
    }
    settings = SchedulerSettings(
        config=CONFIG,
        patterns={"a": WORLD.pattern},
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_chain_tokens=500,
        in_flight=in_flight,
    )
    return TreeScheduler(models, judges or Judges(), settings)


def run(main: Callable[[], Any]) -> Any:
    """Return the result of a coroutine. Raise TimeoutError if it hangs."""

    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main()

    return asyncio.run(bounded())


def grow_all(scheduler: TreeScheduler, names: Sequence[str]) -> list[Tree | TreeFailure | BaseException]:
    async def main() -> list[Tree | TreeFailure | BaseException]:
        return await asyncio.gather(*(scheduler.grow(prompt(name)) for name in names), return_exceptions=True)

    return run(main)


def alone(name: str) -> str:
    """Return the line of a tree that was grown alone."""
    return tree_line(grow(WORLD, CONFIG, prompt_id=name).tree)


@pytest.fixture
def engines() -> Any:
    made: list[ThreadEngine] = []

    def make(*args: Any, **kwargs: Any) -> ThreadEngine:
        made.append(ThreadEngine(*args, **kwargs))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize(("in_flight", "seed"), [(1, 0), (6, 1), (1000, 2)])
def test_trees_are_the_same_as_when_grown_alone(engines: Any, in_flight: int, seed: int) -> None:
    names = [f"p{number}" for number in range(12)]
    trees = grow_all(new_scheduler({"policy": engines(seed=seed)}, in_flight=in_flight), names)
    assert [tree_line(tree) for tree in trees] == [alone(name) for name in names]


def test_arrival_order_does_not_change_trees_of_two_tokenizers(engines: Any) -> None:
    def lines(seed: int) -> list[str]:
        scheduler = new_scheduler({"model": engines("bpe", seed=seed), "reviewer": engines("bytes", seed=seed + 10)})
        return [tree_line(tree) for tree in grow_all(scheduler, ["p", "q", "r"])]

    assert lines(0) == lines(1)


def test_a_tree_stays_with_one_engine_and_no_request_id_is_used_twice(engines: Any) -> None:
    engine = engines()
    grow_all(new_scheduler({"policy": engine}), [f"p{number}" for number in range(8)])
    assert all(len(affinities) == 1 for affinities in engine.affinities.values())
    assert len(set().union(*engine.affinities.values())) == 8  # different trees may use different engines
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == len(ids)


def test_a_refused_request_costs_its_tree(engines: Any) -> None:
    def fails(request: CompletionRequest) -> Exception | None:
        return RolloutError("too long") if request.request_id.startswith("bad/") else None

    bad, good = grow_all(new_scheduler({"policy": engines(fails=fails)}, in_flight=2), ["bad", "good"])
    assert bad == TreeFailure(prompt_id="bad", question=QUESTION, answer="1", reason="too long")
    assert tree_line(good) == alone("good")


def test_the_tokens_of_a_failed_tree_are_counted(engines: Any) -> None:
    # The engine answers the first request, for the two children of the prompt, and refuses all others.
    first: list[CompletionRequest] = []

    def fails(request: CompletionRequest) -> Exception | None:
        if request.request_id.split(".")[0] != first[0].request_id.split(".")[0]:
            return RolloutError("no more")
        return None

    engine = engines(fails=fails)
    submit = engine.submit

    def recording_submit(requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        first.extend(() if first else requests)
        return submit(requests, affinity)

    engine.submit = recording_submit
    actor = object.__new__(RolloutActor)
    actor.scheduler = new_scheduler({"policy": engine})
    failure = run(lambda: actor.search(prompt("p")))
    assert isinstance(failure, RolloutFailure) and failure.reason == "no more"
    assert len(first) == 2
    generated = [len(WORLD.complete(call_of(request), search_model("tags", 2000)).token_ids) for request in first]
    assert min(generated) > 0 and failure.tokens == sum(generated)


def test_a_broken_engine_is_an_error_of_all_trees(engines: Any) -> None:
    # in_flight 1: most of the trees are still waiting to be admitted when the engine breaks.
    broken = engines(fails=lambda request: EngineError("out of memory"))
    results = grow_all(new_scheduler({"policy": broken}, in_flight=1), [f"p{number}" for number in range(5)])
    assert [str(error) for error in results] == ["out of memory"] * 5
    assert all(isinstance(error, EngineError) for error in results)


class Refusing:
    """An engine that refuses every request at once."""

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        raise ValueError("stop strings need an engine with a tokenizer")


def test_an_error_of_submit_reaches_all_callers() -> None:
    results = grow_all(new_scheduler({"policy": Refusing()}, in_flight=1), ["p", "q", "r"])
    assert [type(error) for error in results] == [ValueError] * 3


def test_an_unreadable_completion_is_an_error_of_its_tree(engines: Any) -> None:
    engine = engines()
    scheduler = new_scheduler({"policy": engine})
    odd = Completion(
        token_ids=np.array([-1], np.int32), logprobs=np.zeros(1, np.float32), finish_reason="stop", versions=()
    )
    submit = engine.submit

    def replaced(requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        if not requests[0].request_id.startswith("bad/"):
            return submit(requests, affinity)
        futures: list[Future[Completion]] = [Future() for _ in requests]
        for future in futures:
            future.set_result(odd)
        return futures

    engine.submit = replaced
    bad, good = grow_all(scheduler, ["bad", "good"])
    assert isinstance(bad, Exception)
    assert tree_line(good) == alone("good")


@pytest.mark.parametrize("error", [EngineError("no reward worker"), OSError("no more processes")])
def test_broken_verifiers_are_an_error(engines: Any, error: Exception) -> None:
    results = grow_all(new_scheduler({"policy": engines()}, Judges(raises=lambda chain: error)), ["p", "q"])
    assert results == [error, error]


def test_prompts_that_are_too_long(engines: Any) -> None:
    length = len(codec().prompt(QUESTION))
    engine = engines()
    [failure] = grow_all(new_scheduler({"policy": engine}, max_model_len=length), ["p"])
    assert isinstance(failure, TreeFailure)
    assert failure.reason == (
        f"the prompt has {length} tokens; actors.max_model_len {length} leaves no room for a node"
    )
    # One token of room is enough for the opening tag only.
    [failure] = grow_all(new_scheduler({"policy": engine}, max_model_len=length + 1), ["p"])
    assert isinstance(failure, TreeFailure)
    assert failure.reason == "no node fits after the prompt (no_room)"
    assert not engine.requests


def test_trees_are_admitted_only_below_the_limit_of_requests(engines: Any) -> None:
    """A tree is admitted while less than 4 requests are open, and begins with two requests. So two are admitted, and
    the others wait for answers."""
    engine = engines(silent=lambda request: True)
    scheduler = new_scheduler({"policy": engine}, in_flight=4)

    async def main() -> None:
        tasks = [asyncio.create_task(scheduler.grow(prompt(f"p{number}"))) for number in range(10)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main)
    assert {request.request_id.split("/")[0] for request in engine.requests} == {"p0", "p1"}


def test_enough_requests_are_open_while_trees_wait(engines: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(Judges):
        async def verify(
            self, items: Sequence[tuple[Problem, str, bool]], on_verdicts: OnVerdicts | None = None
        ) -> list[Verdict]:
            seen.append((len(scheduler._waiting), scheduler._in_flight))
            return await super().verify(items, on_verdicts)

    scheduler = new_scheduler({"policy": engines()}, Watching(), in_flight=8)
    names = [f"p{number}" for number in range(40)]
    trees = grow_all(scheduler, names)
    assert [tree_line(tree) for tree in trees] == [alone(name) for name in names]
    while_waiting = [in_flight for waiting, in_flight in seen if waiting]
    assert len(while_waiting) > 40 and min(while_waiting) >= 8
    assert scheduler._in_flight == 0 and not scheduler._tasks


def test_a_log_probability_that_is_not_finite_costs_one_tree(engines: Any) -> None:
    engine = engines()
    complete = engine.submit

    def submit(requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        futures = complete(requests, affinity)
        for request, future in zip(requests, futures, strict=True):
            if request.request_id.startswith("bad/"):
                future.result(timeout=10).logprobs[:] = np.nan
        return futures

    engine.submit = submit
    good, bad = grow_all(new_scheduler({"policy": engine}), ["p0", "bad"])
    assert isinstance(good, Tree) and tree_line(good) == alone("p0")
    assert isinstance(bad, TreeFailure) and "log-probability that is not finite" in bad.reason
    assert bad.tokens > 0


def test_no_tree_waits_for_another(engines: Any) -> None:
    """Neither a tree without completions nor a tree without a verdict holds up the others."""
    engine = engines(silent=lambda request: request.request_id.startswith("mute/"))
    seen: list[str] = []

    def hangs(chain: str) -> bool:
        seen.append(chain)
        return len(seen) == 1  # the first chain to be judged

    names = [f"p{number}" for number in range(6)]
    scheduler = new_scheduler({"policy": engine}, Judges(hangs=hangs), in_flight=64)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(scheduler.grow(prompt(name))) for name in ("mute", *names)]
        while sum(task.done() for task in tasks) < len(names) - 1:
            await asyncio.sleep(0.001)
        stuck = [task for task in tasks if not task.done()]
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        return [task.result() for task in tasks if task not in stuck]

    trees = run(main)
    assert len(trees) == len(names) - 1
    assert {tree_line(tree) for tree in trees} < {alone(name) for name in names}


def test_a_tree_whose_caller_was_cancelled_requests_nothing(engines: Any) -> None:
    engine = engines()
    scheduler = new_scheduler({"policy": engine}, in_flight=1)

    async def main() -> Any:
        first = asyncio.create_task(scheduler.grow(prompt("p")))
        second = asyncio.create_task(scheduler.grow(prompt("given-up")))
        third = asyncio.create_task(scheduler.grow(prompt("q")))
        await asyncio.sleep(0)
        second.cancel()
        return [tree_line(await task) for task in (first, third)]

    assert run(main) == [alone("p"), alone("q")]
    assert not any(request.request_id.startswith("given-up/") for request in engine.requests)


def test_the_cpu_time_of_the_trees_is_measured(engines: Any) -> None:
    scheduler = new_scheduler({"policy": engines()})
    started = time.perf_counter()
    grow_all(scheduler, ["p", "q"])
    assert 0 < scheduler.search_s < time.perf_counter() - started


class OneActorPool:
    """A pool of one actor with a tree scheduler."""

    count = 1

    def __init__(self, scheduler: TreeScheduler) -> None:
        self._scheduler = scheduler

    async def grow(self, actor: int, searched: Prompt) -> Tree | TreeFailure:
        return await self._scheduler.grow(searched)

    async def reset_engine_stats(self) -> None:
        await self.engine_stats()

    async def engine_stats(self) -> Sequence[EngineStats]:
        return []


def search_with_bad_verifiers(run_dir: Path, engine: ThreadEngine, *, share: float, workers: int, ahead: int) -> Search:
    """Search six prompts with real verifier processes that raise, hang, answer NaN or die on some chains."""
    run_dir.mkdir(exist_ok=True)

    async def main() -> Search:
        settings = RewardsConfig(workers=workers, timeout_s=0.5, memory_mib=1024)
        rewards = RewardPool(LetterCountConfig(), 0, settings, verifier="scripted_verifier:build_for_chains")
        prompts = [prompt(f"p{number}") for number in range(6)]
        search = Search(run_dir, prompts, shard_size=4, share=share, ahead=ahead)
        try:
            with Display(Console(file=StringIO())) as display:
                await search.run(OneActorPool(new_scheduler({"policy": engine}, rewards)), display)
        finally:
            await rewards.close()
        return search

    return asyncio.run(main())


def shards(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "trees").iterdir())}


def test_failed_verifications_cost_verdicts_and_no_shard(
    engines: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "verifiers"))
    search_with_bad_verifiers(tmp_path / "one", engines(seed=0), share=1.0, workers=1, ahead=1)
    # With a lower limit on failures the search stops and keeps its finished trees; a higher limit continues it.
    with pytest.raises(
        TooManyFailuresError, match=r"verifications failed, more than search\.max_failed_trees = 0\.01;"
    ):
        search_with_bad_verifiers(tmp_path / "two", engines(seed=1), share=0.01, workers=2, ahead=8)
    search_with_bad_verifiers(tmp_path / "two", engines(seed=2), share=1.0, workers=2, ahead=8)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert list(shards(tmp_path / "one")) == ["00000.jsonl", "00001.jsonl"]

    outcomes: dict[str, set[str]] = {}
    for path in sorted((tmp_path / "one" / "trees").iterdir()):
        for tree in read_trees(path):
            assert isinstance(tree, Tree)
            failed = 0
            for number, node in enumerate(tree.nodes):
                if node.verdict is None:
                    continue
                chain = "".join(tree.nodes[above].text for above in tree.path(number))
                failed += node.verdict.outcome in ("error", "timeout")
                outcomes.setdefault(chain_command(chain), set()).add(node.verdict.outcome)
                assert (node.scored >= 0) == (chain_command(chain) == "judged" and node.defect is None)
            assert failed == tree.counts.get("verifier_error", 0) + tree.counts.get("verifier_timeout", 0)
    assert outcomes == {
        "judged": {"ok", "wrong"},
        "raise": {"error"},
        "nan": {"error"},
        "exit": {"error"},
        "hang": {"timeout"},
    }
