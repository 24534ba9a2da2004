"""Many trees in one event loop: engines answer on other threads, whenever they like; the trees are none the wiser."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scripted_verifier import fate
from search_world import QUESTION, World, codec, grow, prompt, shipped, writer

from actors.engine import Completion, CompletionRequest
from actors.rollout_actor import RolloutActor
from actors.search.requests import Call
from actors.search.scheduler import Forest, ForestSettings, ForestWriter, Verifier
from actors.verifiers.pool import RewardPool
from rlsys.config.schema import RewardsConfig
from rlsys.config.search import SearchConfig, StopConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.control.tree_search import Search
from rlsys.display import Display
from rlsys.errors import EngineError, RolloutError, TooManyFailuresError
from rlsys.search.codec import Stop
from rlsys.search.tree_json import read_trees, tree_line
from rlsys.trees import SearchUsage, Tree, TreeFailure, Writer
from rlsys.types import Prompt, RolloutFailure, Verdict

WORLD = World(pattern=shipped("a"))
CONFIG = SearchConfig(max_depth=6, stop=StopConfig(simulations=24))
TIMEOUT_S = 20.0


class ThreadEngine:
    """Answers on a thread of its own, a few requests at a time, in an order that is drawn.

    fails: the error of a request, or None; silent: requests that are never answered.
    """

    def __init__(
        self,
        kind: str = "tags",
        *,
        seed: int = 0,
        fails: Callable[[CompletionRequest], Exception | None] = lambda request: None,
        silent: Callable[[CompletionRequest], bool] = lambda request: False,
    ) -> None:
        self._writer, self._rng, self._fails, self._silent = writer(kind, 2000), random.Random(seed), fails, silent
        self._waiting: list[tuple[CompletionRequest, Future[Completion]]] = []
        self._changed = threading.Condition()
        self._open = True
        self.requests: list[CompletionRequest] = []
        self.affinities: dict[str, set[int]] = {}
        self.in_flight: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        futures: list[Future[Completion]] = [Future() for _ in requests]
        with self._changed:
            for request, future in zip(requests, futures, strict=True):
                self.requests.append(request)
                self.affinities.setdefault(request.request_id.split("/")[0], set()).add(affinity)
                if not self._silent(request):
                    self._waiting.append((request, future))
            self.in_flight.append(len(self._waiting))
            self._changed.notify()
        return futures

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                self._rng.shuffle(self._waiting)
                count = self._rng.randint(1, len(self._waiting))
                now, self._waiting = self._waiting[:count], self._waiting[count:]
            if self._rng.random() < 0.2:
                time.sleep(0.001)
            for request, future in now:
                error = self._fails(request)
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(WORLD.complete(_call(request), self._writer))


def _call(request: CompletionRequest) -> Call:
    return Call(
        writer="policy",
        token_ids=list(request.token_ids),
        seed=request.seed,
        max_tokens=request.max_tokens,
        stop=Stop(token_ids=request.stop_token_ids, strings=request.stop_strings),
    )


Tell = Callable[[Sequence[tuple[int, Verdict]]], None]


@dataclass
class Judges:
    """A verifier that takes its time; hangs on some chains, raises on others."""

    hangs: Callable[[str], bool] = lambda chain: False
    raises: Callable[[str], Exception | None] = lambda chain: None
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    async def verify(self, items: Sequence[tuple[str, str]], tell: Tell | None = None) -> list[Verdict]:
        return await asyncio.gather(*(self._judge(number, *item, tell) for number, item in enumerate(items)))

    async def _judge(self, number: int, answer: str, chain: str, tell: Tell | None) -> Verdict:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        assert answer == "1"
        if self.hangs(chain):
            await asyncio.Event().wait()
        error = self.raises(chain)
        if error is not None:
            raise error
        verdict = WORLD.judge(chain)
        if tell is not None:
            tell([(number, verdict)])
        return verdict


def forest(
    engines: Mapping[Writer, Any], judges: Verifier | None = None, *, in_flight: int = 16, max_model_len: int = 600
) -> Forest:
    kinds: dict[Writer, str] = {"policy": "tags", "model": "bpe", "reviewer": "bytes"}
    writers: dict[Writer, ForestWriter] = {
        name: ForestWriter(
            engine=engine,
            model=f"{kinds[name]} model",
            codec=codec(kinds[name]),
            max_model_len=max_model_len if name == "policy" else 2000,
        )
        for name, engine in engines.items()
    }
    settings = ForestSettings(
        config=CONFIG,
        patterns={"a": WORLD.pattern},
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_chain_tokens=500,
        in_flight=in_flight,
    )
    return Forest(writers, judges or Judges(), settings)


def run(main: Callable[[], Any]) -> Any:
    """The answer of a coroutine; a forest that hangs is an error, not a wait."""

    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await main()

    return asyncio.run(bounded())


def grow_all(found: Forest, names: Sequence[str]) -> list[Tree | TreeFailure | BaseException]:
    async def main() -> list[Tree | TreeFailure | BaseException]:
        return await asyncio.gather(*(found.grow(prompt(name)) for name in names), return_exceptions=True)

    return run(main)


def alone(name: str) -> str:
    """The line of a tree that grew by itself."""
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
def test_trees_are_those_that_grow_alone(engines: Any, in_flight: int, seed: int) -> None:
    names = [f"p{number}" for number in range(12)]
    trees = grow_all(forest({"policy": engines(seed=seed)}, in_flight=in_flight), names)
    assert [tree_line(tree) for tree in trees] == [alone(name) for name in names]


def test_two_engines_with_two_tokenizers(engines: Any) -> None:
    def lines(seed: int) -> list[str]:
        found = forest({"model": engines("bpe", seed=seed), "reviewer": engines("bytes", seed=seed + 10)})
        return [tree_line(tree) for tree in grow_all(found, ["p", "q", "r"])]

    assert lines(0) == lines(1)


def test_a_tree_stays_with_one_engine_and_no_request_id_is_used_twice(engines: Any) -> None:
    engine = engines()
    grow_all(forest({"policy": engine}), [f"p{number}" for number in range(8)])
    assert all(len(found) == 1 for found in engine.affinities.values())
    assert len(set().union(*engine.affinities.values())) == 8  # and different trees may go to different ones
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == len(ids)


def test_a_refused_request_costs_its_tree(engines: Any) -> None:
    def fails(request: CompletionRequest) -> Exception | None:
        return RolloutError("too long for me") if request.request_id.startswith("bad/") else None

    bad, good = grow_all(forest({"policy": engines(fails=fails)}, in_flight=2), ["bad", "good"])
    assert bad == TreeFailure(prompt_id="bad", question=QUESTION, answer="1", reason="too long for me")
    assert tree_line(good) == alone("good")


def test_what_was_generated_for_a_tree_that_failed_is_counted(engines: Any) -> None:
    # The first request, for the two children of the prompt, is answered, and every other one is refused.
    first: list[CompletionRequest] = []

    def fails(request: CompletionRequest) -> Exception | None:
        if request.request_id.split(".")[0] != first[0].request_id.split(".")[0]:
            return RolloutError("no more")
        return None

    engine = engines(fails=fails)
    submit = engine.submit

    def kept(requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        first.extend(() if first else requests)
        return submit(requests, affinity)

    engine.submit = kept
    actor = object.__new__(RolloutActor)
    actor.forest = forest({"policy": engine})
    failure = run(lambda: actor.search(prompt("p")))
    assert isinstance(failure, RolloutFailure) and failure.reason == "no more"
    assert len(first) == 2
    generated = [len(WORLD.complete(_call(request), writer("tags", 2000)).token_ids) for request in first]
    assert min(generated) > 0
    assert failure.tokens == sum(generated)


def test_a_broken_engine_is_everybodys_error(engines: Any) -> None:
    # in_flight 1: most of the trees are still waiting to be admitted when the engine breaks.
    broken = engines(fails=lambda request: EngineError("out of memory"))
    found = grow_all(forest({"policy": broken}, in_flight=1), [f"p{number}" for number in range(5)])
    assert [str(error) for error in found] == ["out of memory"] * 5
    assert all(isinstance(error, EngineError) for error in found)


class Refusing:
    """An engine that takes no request at all."""

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        raise ValueError("stop strings need an engine with a tokenizer")


def test_an_engine_that_raises_at_once_is_heard_of() -> None:
    found = grow_all(forest({"policy": Refusing()}, in_flight=1), ["p", "q", "r"])
    assert [type(error) for error in found] == [ValueError] * 3


def test_a_completion_that_no_tree_can_read_is_an_error_of_its_tree(engines: Any) -> None:
    engine = engines()
    found = forest({"policy": engine})
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
    bad, good = grow_all(found, ["bad", "good"])
    assert isinstance(bad, Exception)
    assert tree_line(good) == alone("good")


@pytest.mark.parametrize("error", [EngineError("no reward worker"), OSError("no more processes")])
def test_broken_verifiers_are_an_error(engines: Any, error: Exception) -> None:
    found = grow_all(forest({"policy": engines()}, Judges(raises=lambda chain: error)), ["p", "q"])
    assert found == [error, error]


def test_prompts_that_are_too_long(engines: Any) -> None:
    length = len(codec().prompt(QUESTION))
    engine = engines()
    [failure] = grow_all(forest({"policy": engine}, max_model_len=length), ["p"])
    assert isinstance(failure, TreeFailure)
    assert failure.reason == (
        f"the prompt has {length} tokens; actors.max_model_len {length} leaves no room for a node"
    )
    # One token of room holds an opening tag and nothing behind it.
    [failure] = grow_all(forest({"policy": engine}, max_model_len=length + 1), ["p"])
    assert isinstance(failure, TreeFailure)
    assert failure.reason == "no node fits after the prompt (no_room)"
    assert not engine.requests


def test_no_more_trees_are_begun_than_it_takes(engines: Any) -> None:
    """in_flight 4: a tree is begun only while less than 4 requests are out. A begun tree asks for the two children of
    the prompt; so 2 trees are begun, and the others wait until answers have come."""
    engine = engines(silent=lambda request: True)
    found = forest({"policy": engine}, in_flight=4)

    async def main() -> None:
        tasks = [asyncio.create_task(found.grow(prompt(f"p{number}"))) for number in range(10)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main)
    assert {request.request_id.split("/")[0] for request in engine.requests} == {"p0", "p1"}


def test_as_many_requests_as_wanted_are_out_while_trees_wait(engines: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Watching(Judges):
        async def verify(self, items: Sequence[tuple[str, str]], tell: Tell | None = None) -> list[Verdict]:
            seen.append((len(found._waiting), found._in_flight))
            return await super().verify(items, tell)

    found = forest({"policy": engines()}, Watching(), in_flight=8)
    names = [f"p{number}" for number in range(40)]
    trees = grow_all(found, names)
    assert [tree_line(tree) for tree in trees] == [alone(name) for name in names]
    while_waiting = [in_flight for waiting, in_flight in seen if waiting]
    assert len(while_waiting) > 40 and min(while_waiting) >= 8
    assert found._in_flight == 0 and not found._tasks


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
    good, bad = grow_all(forest({"policy": engine}), ["p0", "bad"])
    assert isinstance(good, Tree) and tree_line(good) == alone("p0")
    assert isinstance(bad, TreeFailure) and "log-probability that is not finite" in bad.reason
    assert bad.tokens > 0


def test_no_tree_waits_for_another(engines: Any) -> None:
    """A tree whose completions never come, and one whose verdict never comes, keep nobody."""
    engine = engines(silent=lambda request: request.request_id.startswith("mute/"))
    seen: list[str] = []

    def hangs(chain: str) -> bool:
        seen.append(chain)
        return len(seen) == 1  # the first chain to be judged

    names = [f"p{number}" for number in range(6)]
    found = forest({"policy": engine}, Judges(hangs=hangs), in_flight=64)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(found.grow(prompt(name))) for name in ("mute", *names)]
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


def test_a_tree_that_nobody_waits_for_any_more_asks_for_nothing(engines: Any) -> None:
    engine = engines()
    found = forest({"policy": engine}, in_flight=1)

    async def main() -> Any:
        first = asyncio.create_task(found.grow(prompt("p")))
        second = asyncio.create_task(found.grow(prompt("given-up")))
        third = asyncio.create_task(found.grow(prompt("q")))
        await asyncio.sleep(0)
        second.cancel()
        return [tree_line(await task) for task in (first, third)]

    assert run(main) == [alone("p"), alone("q")]
    assert not any(request.request_id.startswith("given-up/") for request in engine.requests)


def test_time_spent_in_the_trees_is_measured(engines: Any) -> None:
    found = forest({"policy": engines()})
    started = time.perf_counter()
    grow_all(found, ["p", "q"])
    assert 0 < found.search_s < time.perf_counter() - started


class Grove:
    """A pool of one actor: a forest and its verifiers."""

    count = 1

    def __init__(self, found: Forest) -> None:
        self._forest = found

    async def grow(self, actor: int, wanted: Prompt) -> Tree | TreeFailure:
        return await self._forest.grow(wanted)

    async def reset_engine_stats(self) -> None:
        await self.engine_stats()

    async def engine_stats(self) -> Sequence[SearchUsage]:
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
                await search.run(Grove(forest({"policy": engine}, rewards)), display)
        finally:
            await rewards.close()
        return search

    return asyncio.run(main())


def shards(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "trees").iterdir())}


def test_bad_verifiers_cost_verdicts_and_no_shard(
    engines: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "verifiers"))
    search_with_bad_verifiers(tmp_path / "one", engines(seed=0), share=1.0, workers=1, ahead=1)
    # Where fewer failures are allowed, finished trees are kept, and the same search goes on where more are.
    with pytest.raises(
        TooManyFailuresError, match=r"verifications failed, more than search\.max_failed_trees = 0\.01;"
    ):
        search_with_bad_verifiers(tmp_path / "two", engines(seed=1), share=0.01, workers=2, ahead=8)
    search_with_bad_verifiers(tmp_path / "two", engines(seed=2), share=1.0, workers=2, ahead=8)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert list(shards(tmp_path / "one")) == ["00000.jsonl", "00001.jsonl"]

    fates: dict[str, set[str]] = {}
    for path in sorted((tmp_path / "one" / "trees").iterdir()):
        for tree in read_trees(path):
            assert isinstance(tree, Tree)
            failed = 0
            for number, node in enumerate(tree.nodes):
                if node.verdict is None:
                    continue
                chain = "".join(tree.nodes[above].text for above in tree.path(number))
                failed += node.verdict.outcome in ("error", "timeout")
                fates.setdefault(fate(chain), set()).add(node.verdict.outcome)
                assert (node.scored >= 0) == (fate(chain) == "judged")
            assert failed == tree.counts.get("verifier_error", 0) + tree.counts.get("verifier_timeout", 0)
    assert fates == {
        "judged": {"ok", "wrong"},
        "raise": {"error"},
        "nan": {"error"},
        "exit": {"error"},
        "hang": {"timeout"},
    }
