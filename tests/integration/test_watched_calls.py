"""Training calls of the real RayLearner that end just when the driver asks the ranks for their progress."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest
import ray
from minimal_config import minimal

from learners.learner_actor import WATCH
from rlsys.config.files import parse_config
from rlsys.control.watchdog import WatchClock
from rlsys.launch.remote import RayLearner
from rlsys.launch.start import start_rank

INTERVAL_S = 0.002  # so short that every call ends near a look
CALLS = 5000


class Rank:
    """A rank whose training is a sleep, with the methods that a call to it needs."""

    def __init__(self) -> None:
        self._asked = 0
        self._training = False
        self.steps: list[int] = []

    @ray.method(concurrency_group=WATCH)
    def progress(self) -> int:
        self._asked += 1
        return self._asked

    def train(self, seconds: float, step: int, version: int) -> dict[str, float]:
        assert not self._training, "two calls for training at once"
        self._training = True
        time.sleep(seconds)
        self._training = False
        self.steps.append(step)
        return {"in_order": float(self.steps == sorted(self.steps))}


@pytest.fixture
def impatient_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray that waits 3 s instead of 30 s for a call that another one depends on."""
    monkeypatch.setenv("RAY_actor_scheduling_queue_max_reorder_wait_seconds", "3")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Ray's workers import this module
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.mark.long
def test_no_training_call_is_lost_when_it_ends_near_a_look(impatient_ray: None) -> None:
    def spawn(attempt: int) -> list[object]:
        return [start_rank(Rank, {"num_cpus": 1}) for _ in range(2)]

    async def main() -> None:
        draw = random.Random(0)
        learner = RayLearner(spawn, parse_config(minimal(), "test"), WatchClock(interval_s=INTERVAL_S))
        await learner.train(0.0, 0, 0)  # type: ignore[arg-type]
        for step in range(1, CALLS):
            metrics = await learner.train(draw.uniform(0.0, 0.01), step, step)  # type: ignore[arg-type]
            assert metrics == {"in_order": 1.0}
        learner.close()

    asyncio.run(main())
