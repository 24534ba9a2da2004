"""Compare generated tokens/s of a tree search and of the same requests, submitted to the same engines at once.

Our side grows the trees of `rlsys search` with two Ray actors and their verifiers. The driver measures the time from
the first prompt to the last tree, without writing files. The peer submits the recorded requests of this search to the
same engines at once, without trees and verifiers. The requests have the same contexts, seeds and stops, and must give
the same number of tokens. The prefix caches are emptied before both sides. The table also has the scored answers/s of
node and chain expansion, and of one tree and one request at a time, as in the published program.

The exit code is 1 if a median ratio is below the limit, or if reading, selection and backup take more than the allowed
share of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

from ratios import Ratio, keep  # noqa: E402

from actors.rollout_actor import RolloutActor  # noqa: E402
from actors.settings import ActorSettings  # noqa: E402
from rlsys.config.engine_roles import Searching  # noqa: E402
from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.schema import Config  # noqa: E402
from rlsys.data.inputs import Inputs  # noqa: E402
from rlsys.interfaces import EngineStats  # noqa: E402
from rlsys.launch import start  # noqa: E402
from rlsys.launch.placement import place  # noqa: E402
from rlsys.launch.ray_cluster import ray_cluster  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.trees import Tree  # noqa: E402
from rlsys.types import Prompt  # noqa: E402

LIMIT = 0.85
SHIPPED = "the config as it is"  # its trees stop at a few right answers, so some end early
PYTHON_LIMIT = 0.10


class RecordingActor(RolloutActor):
    """A rollout actor that records the requests of its trees, to submit them a second time."""

    def __init__(self, settings: ActorSettings) -> None:
        super().__init__(settings)
        self._submit, self._requests, self._serial = self.engine.submit, [], False
        self.engine.submit = self._record  # type: ignore[method-assign]

    def _record(self, requests: Sequence[Any], affinity: int = 0) -> list[Future[Any]]:
        self._requests += requests
        return self._one_by_one(requests) if self._serial else self._submit(requests)

    def _one_by_one(self, requests: Sequence[Any]) -> list[Future[Any]]:
        """Submit each request after the previous one has ended."""
        futures: list[Future[Any]] = [Future() for _ in requests]

        def ask(number: int) -> None:
            if number < len(requests):
                self._submit([requests[number]])[0].add_done_callback(lambda done: answer(number, done))

        def answer(number: int, done: Future[Any]) -> None:
            ask(number + 1)
            futures[number].set_result(done.result())

        ask(0)
        return futures

    async def begin(self, serial: bool) -> float:
        """Empty the prefix cache and the record, and return the CPU seconds of the trees so far."""
        reset = self.engine._run_on_thread(lambda: self.engine._engine.reset_prefix_cache())
        if not await asyncio.wrap_future(reset):
            raise RuntimeError("the prefix cache was in use")
        self._requests, self._serial = [], serial
        self.engine.engine_stats()
        return await self.search_seconds()

    async def replay(self) -> tuple[float, float, int]:
        """Submit all recorded requests at once with an empty cache. Return start, end and generated tokens."""
        requests = self._requests
        await self.begin(False)
        started = time.perf_counter()
        drawn = await asyncio.gather(*map(asyncio.wrap_future, self._submit(requests)))
        return started, time.perf_counter(), sum(len(completion.token_ids) for completion in drawn)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of tree search.

    Attributes:
        seconds: Seconds of the search.
        replay_s: Seconds of the same requests at once.
        search_s: CPU seconds of reading, selection and backup.
        trees: The finished trees.
        usage: Statistics of the engines.
    """

    seconds: float
    replay_s: float
    search_s: float
    trees: list[Tree]
    usage: list[EngineStats]

    @property
    def tokens(self) -> int:
        return sum(tree.tokens for tree in self.trees)

    @property
    def scored(self) -> int:
        return sum(len(tree.answers()) for tree in self.trees)

    @property
    def calls(self) -> int:
        return sum(tree.calls for tree in self.trees)


async def grow(pool: Any, handles: Sequence[Any], prompts: Sequence[Prompt], serial: bool) -> Round:
    """Search the prompts: one tree at a time on one actor if `serial`, and otherwise all at once on all actors."""
    before = await asyncio.gather(*(handle.begin.remote(serial) for handle in handles))
    await pool.reset_engine_stats()
    started = time.perf_counter()
    if serial:
        trees = [await pool.grow(0, prompt) for prompt in prompts]
    else:
        trees = await asyncio.gather(*(pool.grow(i % pool.count, prompt) for i, prompt in enumerate(prompts)))
    seconds = time.perf_counter() - started
    usage = await pool.engine_stats()
    after = await asyncio.gather(*(handle.search_seconds.remote() for handle in handles))
    if not all(isinstance(tree, Tree) for tree in trees):
        raise SystemExit("a tree failed")
    replay_s = 0.0
    if not serial:
        replay_s = await replay(handles, sum(tree.tokens for tree in trees))
    search_s = sum(after) - sum(before)
    return Round(seconds, replay_s, search_s, list(trees), usage)


async def replay(handles: Sequence[Any], tokens: int) -> float:
    starts, ends, counts = zip(*await asyncio.gather(*(handle.replay.remote() for handle in handles)), strict=True)
    if sum(counts) != tokens:
        raise SystemExit(f"the same requests gave {sum(counts)} tokens, the search had {tokens}")
    return max(ends) - min(starts)


async def measure(config: Config, model: Path, folder: Path, rounds: int, trees: int, *, serial: bool) -> list[Round]:
    """Return the rounds of one kind. A warm-up round comes first."""
    inputs = Inputs(config, ModelFolder(model), training=False)
    numbers = itertools.count()
    found = []
    with ray_cluster(config, folder, place(config).bundles) as cluster:
        async with start.rollout_pool(cluster, model, Searching()) as pool:
            for _ in range(1 + rounds):
                prompts = [inputs.builder.build("held_out", next(numbers)) for _ in range(trees)]
                handles = [handle.handle for handle in pool.handles]
                found.append(await grow(pool, handles, prompts, serial))
    return found[1:]


def report(name: str, rounds: Sequence[Round]) -> bool:
    """Print the figures of one kind of search, and return whether its limits are met."""

    def row(label: str, values: Sequence[float], digits: int = 0) -> float:
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{label:46}{low:>12,.{digits}f}{middle:>12,.{digits}f}{high:>12,.{digits}f}")
        return middle

    trees = [tree for found in rounds for tree in found.trees]
    print(f"\n{name}: {len(rounds)} rounds of {len(rounds[0].trees)} trees{'':8}{'min':>8}{'median':>12}{'max':>12}")
    row("generated tokens/s, search", [found.tokens / found.seconds for found in rounds])
    row("distinct scored answers/s", [found.scored / found.seconds for found in rounds], 1)
    row("calls per scored answer", [found.calls / found.scored for found in rounds], 2)
    row("tokens per scored answer", [found.tokens / found.scored for found in rounds], 1)
    hits = [_sum(found.usage, "cached_tokens") / _sum(found.usage, "prompt_tokens") for found in rounds]
    row("prefix-cache hit rate of prompt tokens", hits, 3)
    busy = [use for found in rounds for use in found.usage if use.generated_tokens]
    row("idle share of an engine", [max(0.0, 1 - use.busy_s / use.wall_s) for use in busy], 3)
    row("requests in flight, mean over busy steps", [use.in_flight_mean for use in busy], 1)
    share = row(
        "share of the time: reading, selection, backup",
        [found.search_s / len({use.engine for use in found.usage}) / found.seconds for found in rounds],
        3,
    )
    print(f"solved {sum(tree.solved for tree in trees) / len(trees):.3f} of {len(trees)}")
    if not rounds[0].replay_s:
        return True
    row("generated tokens/s, same requests at once", [found.tokens / found.replay_s for found in rounds])
    ratio = row("ratio, round by round", [found.replay_s / found.seconds for found in rounds], 3)
    if name == SHIPPED:
        print("no limit")
        return True
    good = ratio >= LIMIT and share < PYTHON_LIMIT
    print(f"limits: ratio {LIMIT:.2f}, share {PYTHON_LIMIT:.2f}: {'met' if good else 'missed'}")
    return good


def as_ratio(name: str, rounds: Sequence[Round]) -> Ratio:
    """Return the rates of a search and of the same requests at once, round by round."""
    ours = [found.tokens / found.seconds for found in rounds]
    peer = [found.tokens / found.replay_s for found in rounds]
    what = f"search, {len(rounds[0].trees)} trees, {name}"
    return Ratio(what, "the same requests at once", ours, peer, "tokens/s", LIMIT, larger_is_better=True)


def _sum(usage: Sequence[EngineStats], name: str) -> int:
    return sum(getattr(use, name) for use in usage)


def main() -> int:
    parser = argparse.ArgumentParser(description="A tree search against the same requests at once.")
    parser.add_argument("--policy", default="runs/quickstart/stages/warm_start", help="folder of the policy")
    parser.add_argument("--config", default=str(ROOT / "configs" / "search_letter_count.yaml"))
    parser.add_argument("--trees", type=int, default=64, help="trees of a round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each kind")
    parser.add_argument("--simulations", type=int, default=64, help="simulations of a tree")
    parser.add_argument("--parallel", type=int, default=16, help="number of simultaneous simulations of a tree")
    parser.add_argument("--json", type=Path, help="also keep the ratio of chain and node expansion in this file")
    parser.add_argument("--serial-trees", type=int, default=4, help="trees of the serial round")
    arguments = parser.parse_args()
    start.RolloutActor = RecordingActor
    stop = [
        "search.stop.correct=[]",
        f"search.stop.simulations={arguments.simulations}",
        f"search.parallel_simulations={arguments.parallel}",
        "search.selection={type: ucb}",
        "search.backtracking=true",
    ]
    node = [*stop, "search.expansion=node", "search.patterns=[narrow]"]
    kinds = (
        ("chain expansion", [*stop, "search.expansion=chain"], False),
        ("node expansion", node, False),
        ("node expansion, one tree and one request", [*node, "search.parallel_simulations=1"], True),
        (SHIPPED, [], False),
    )
    good, ratios = [], []
    for name, overrides, serial in kinds:
        config = load_config(arguments.config, [f"model.path={arguments.policy}", *overrides])
        trees, rounds = (arguments.serial_trees, 1) if serial else (arguments.trees, arguments.rounds)
        with tempfile.TemporaryDirectory() as folder:
            policy = Path(arguments.policy).absolute()
            found = asyncio.run(measure(config, policy, Path(folder), rounds, trees, serial=serial))
        good.append(report(name, found))
        if not serial and name != SHIPPED:
            ratios.append(as_ratio(name, found))
    if arguments.json:
        keep(arguments.json, ratios)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
