"""Time and memory of the driver alone, with simulated actors, a simulated learner and a simulated clock.

`python benchmarks/control_plane.py [--actors 1 10 100 1000] [--steps 20] [--write]` runs the real controller, fleet,
buffer, bus, ledger, metrics and checkpoints. An actor sleeps as long as its completions would take, with a long tail,
and dies at random; its replacement takes minutes to start. Nothing is generated, sent or learned. Simulated seconds
pass at once, so the CPU seconds that are left are those of the driver.

Every size is a process of its own, so that its memory is its own. The exit code is 1 if a prompt was lost, or if the
CPU seconds of a step and an actor grow by more than `LIMIT` from 10 actors to 1,000.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import random
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from rich.console import Console  # noqa: E402
from storm_figures import prompts_of  # noqa: E402

from rlsys.config.files import parse_config  # noqa: E402
from rlsys.control.controller import Controller  # noqa: E402
from rlsys.control.fleet import Fleet  # noqa: E402
from rlsys.control.run_context import RunContext  # noqa: E402
from rlsys.control.watchdog import WatchClock, watch_interval  # noqa: E402
from rlsys.control.weights import WeightBus  # noqa: E402
from rlsys.data.batches import TrainingData  # noqa: E402
from rlsys.data.prompts import PromptBuilder, PromptStream  # noqa: E402
from rlsys.data.rows import Reader  # noqa: E402
from rlsys.display import Display  # noqa: E402
from rlsys.errors import EngineError  # noqa: E402
from rlsys.files import read_json  # noqa: E402
from rlsys.interfaces import EngineStats  # noqa: E402
from rlsys.run.checkpoints import CheckpointStore  # noqa: E402
from rlsys.run.ledger import Ledger, read_ledger  # noqa: E402
from rlsys.run.metrics import MetricsWriter  # noqa: E402
from rlsys.tasks import build_task  # noqa: E402
from rlsys.types import RunState, Trajectory, TrajectoryGroup, VersionSpan  # noqa: E402
from rlsys.weight_types import WeightAck, WeightBucket, WeightManifest, WeightOffer  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- driver: written by benchmarks/control_plane.py -->", "<!-- end of driver -->"

LIMIT = 2.0
PROMPTS, SAMPLES, TOKENS = 4, 8, 500  # prompts of an actor in a step, completions of a prompt, tokens of a completion
SAMPLE_S, TAIL = 20.0, 0.5  # median seconds of a completion, and the sigma of their logarithm
TRAIN_S, LOAD_S, START_S = 30.0, 3.0, 120.0
LIFE_S = 50_000.0  # mean simulated seconds until an actor dies
PROBE = (np.arange(8, dtype=np.int32),)


class SimulatedClock(selectors.DefaultSelector):
    """A selector that lets simulated time pass instead of waiting, while no thread of the program works."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if self.threads or timeout is None:
            return super().select(timeout if timeout is None else min(timeout, 0.001))
        events = super().select(0)
        if not events:
            self.seconds += max(timeout, 0.0)
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop on a simulated clock. Calls in threads take real time and no simulated time."""

    def __init__(self) -> None:
        self.clock = SimulatedClock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self.clock.threads += 1

        def end(_future: Any) -> None:
            self.clock.threads -= 1

        future.add_done_callback(end)
        return future


class SimulatedActor:
    """Actor process that sleeps instead of working.

    Args:
        seed: seed of its times and of its death.
    """

    built_s = 0.0  # real seconds in which all actors made up their results

    def __init__(self, name: str, seed: str) -> None:
        self.name, self.version, self._draw = name, 0, random.Random(seed)
        self._dies_s = asyncio.get_running_loop().time() + self._draw.expovariate(1 / LIFE_S)

    async def _work(self, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(min(seconds, max(self._dies_s - now, 0.0)))
        if now + seconds > self._dies_s:
            raise EngineError(f"actor {self.name} died: simulated")

    async def start(self) -> None:
        await asyncio.sleep(START_S)

    async def generate(self, prompts: Sequence[Any], settings: Any) -> list[Any]:
        version = self.version
        start = time.process_time()
        draws = [self._draw.lognormvariate(0.0, TAIL) for _ in range(len(prompts) * settings.samples)]
        groups = [self._group(prompt, settings.samples, version) for prompt in prompts]
        SimulatedActor.built_s += time.process_time() - start
        await self._work(SAMPLE_S * max(draws))
        return groups

    def _group(self, prompt: Any, samples: int, version: int) -> Any:
        length = len(prompt.token_ids)
        total = length + TOKENS
        trajectories = tuple(
            Trajectory(
                token_ids=np.zeros(total, dtype=np.int32),
                loss_mask=np.arange(total) >= length,
                behavior_logprobs=np.zeros(total, dtype=np.float32),
                versions=(VersionSpan(start=length, version=version),),
                finish_reason="stop",
                reward=float(sample % 2),
                outcome="ok" if sample % 2 else "wrong",
                answered=True,
            )
            for sample in range(samples)
        )
        return TrajectoryGroup(prompt=prompt, trajectories=trajectories)

    async def probe(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(np.zeros(len(row) - 1, dtype=np.float32) for row in rows)

    async def update_weights(self, offer: Any, probe: Sequence[Any]) -> Any:
        await self._work(LOAD_S)
        self.version = offer.version
        scores = await self.probe(probe)
        return WeightAck(actor=self.name, version=self.version, attempt=offer.attempt, probe_logprobs=scores)

    async def engine_stats(self) -> Any:
        return EngineStats(busy_s=1.0, wall_s=1.0, in_flight_mean=1.0, generated_tokens=1)

    async def progress(self) -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    async def close(self) -> None:
        pass

    def kill(self) -> None:
        pass


class SimulatedLearner:
    """Learner that sleeps instead of training, and saves a few bytes."""

    restarts = 0
    shares_device = False

    async def start_stage(self, *_arguments: Any) -> None:
        pass

    async def train(self, batch: Any, step: int, version: int) -> dict[str, float]:
        await asyncio.sleep(TRAIN_S)
        return {"learner/tokens": float(TOKENS)}

    async def score(self, probe: Sequence[Any]) -> list[Any]:
        return [np.zeros(len(row) - 1, dtype=np.float32) for row in probe]

    def offer(self, version: int) -> Any:
        return WeightOffer(version=version, attempt=0, source=None)

    async def send(self, version: int, _members: Sequence[str]) -> Any:
        bucket = WeightBucket(tensors=(), digest="", bytes=16)
        return WeightManifest(version=version, attempt=0, buckets=(bucket,))

    async def save(self, folder: Path) -> None:
        for name in ("policy/model.safetensors", "learner/exp_avg.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(str(folder))


async def simulate(run_dir: Path, actors: int, steps: int, staleness: int) -> dict[str, float]:
    """Run the controller to its end and return the figures of a step."""
    loop, learner, config = asyncio.get_running_loop(), SimulatedLearner(), config_of(run_dir, actors, steps, staleness)
    (model := run_dir / "model").mkdir(parents=True)
    (model / "tokenizer.json").write_text("{}")
    builder = PromptBuilder(
        build_task(config.task, 0), lambda text: [1] * len(text), max_model_len=4096, max_tokens=TOKENS
    )
    before = time.process_time()
    metrics = MetricsWriter(run_dir, 0)
    async with Fleet(
        lambda number, attempt: SimulatedActor(f"{number}", seed=f"{number}.{attempt}"),
        actors,
        max_restarts=1_000_000,
        hang_timeout_s=120.0,
        clock=WatchClock(monotonic=loop.time, interval_s=watch_interval(actors)),
    ) as pool:
        parts = RunContext(
            config=config,
            run_dir=run_dir,
            model=model,
            tokenizer_files=[model / "tokenizer.json"],
            pool=pool,
            learner=learner,
            bus=WeightBus(learner, pool, config.weight_sync, "fp32", PROBE),
            checkpoints=CheckpointStore(run_dir / "checkpoints", 2, None, None),
            metrics=metrics,
            ledger=Ledger(run_dir, -1),
            display=Display(Console(file=io.StringIO())),
            prompts=PromptStream(builder, 0),
            data=TrainingData(config, Reader(None, 99, 64), {}, run_dir / "stages" / "search" / "data"),
            search=None,
            policy_digest=lambda _policy: "",
            held_out=builder.held_out(64),
            fingerprint={},
        )
        await Controller(parts, RunState(stage=0, step=0, weight_version=0, cursor=0), None).run()
        deaths = pool.restarts
    metrics.close()
    return {
        "actors": actors,
        "max_staleness": staleness,
        "cpu_ms_step": 1000 * (time.process_time() - before - SimulatedActor.built_s) / steps,
        "simulated_s_step": loop.time() / steps,
        "deaths": deaths,
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "prompts": PROMPTS * actors * steps,
        "lost": lost_prompts(run_dir),
    }


def config_of(run_dir: Path, actors: int, steps: int, staleness: int) -> Any:
    """Return the config of a simulated run."""
    train = {"max_steps": steps, "groups_per_step": PROMPTS * actors, "group_size": SAMPLES, "max_staleness": staleness}
    sections = {
        "run": {"dir": str(run_dir)},
        "stages": ["online"],
        "model": {"path": "unused"},
        "task": {"type": "letter_count"},
        "train": train,
        "checkpoint": {"interval": 5, "keep_last": 2},
        "evaluation": {"samples": 0, "greedy": True, "interval": 10},
    }
    return parse_config(sections, "simulation")


def lost_prompts(run_dir: Path) -> int:
    """Return the number of prompts without an outcome, and with two, by ledger and newest checkpoint."""
    state = read_json(sorted((run_dir / "checkpoints").glob("step_*/state.json"))[-1])
    lost, twice = prompts_of(read_ledger(run_dir / "ledger.jsonl"), state["cursor"], state["in_flight"])
    return int(lost + twice)


def one(actors: int, steps: int, staleness: int) -> None:
    """Simulate one run in this process, and print its figures as JSON."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        figures = runner.run(simulate(Path(folder, "run"), actors, steps, staleness))
    print(json.dumps(figures))


def table(results: Sequence[dict[str, float]]) -> list[str]:
    """Return the lines of the table."""
    heads = {
        "actors": "actors",
        "max_staleness": "max_staleness",
        "cpu_ms_step": "driver's CPU, ms a step",
        "simulated_s_step": "simulated s a step",
        "deaths": "lost actors",
        "memory_mib": "memory, MiB",
        "prompts": "prompts",
        "lost": "lost or doubled",
    }
    lines = [f"| {' | '.join(heads.values())} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(f'{figures[name]:,.0f}' for name in heads)} |" for figures in results]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", type=int, nargs=2, metavar=("ACTORS", "STALENESS"), help="one run, in this process")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one[0], arguments.steps, arguments.one[1])
        return 0
    results = []
    for actors, staleness in itertools.product(arguments.actors, (0, 1)):
        command = [sys.executable, __file__, "--one", str(actors), str(staleness), "--steps", str(arguments.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print("\n".join(table(results[-1:])[2:]), flush=True)
    print("\n".join(table(results)))
    if arguments.write:
        results_page.write_section(PAGE, BEGIN, END, table(results))
    lost = sum(figures["lost"] for figures in results)
    costs = {figures["actors"]: figures["cpu_ms_step"] / figures["actors"] for figures in results}
    ratio = costs[max(costs)] / costs.get(10, costs[max(costs)])
    print(f"CPU of a step and an actor, {max(costs)} actors to 10: {ratio:.2f} (limit {LIMIT})")
    return int(bool(lost) or ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
