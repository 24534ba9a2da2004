"""Actors and learner that share devices: every call waits until its side holds them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from rlsys.config.schema import Config
from rlsys.control.shared_device import SharedDevice
from rlsys.errors import EngineError
from rlsys.launch.remote import RayActor, RayLearner
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Float32Array, Int32Array, Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup
from rlsys.weight_types import WeightAck, WeightOffer


class ColocatedActor(RayActor):
    """RayActor whose engine works only while the engines hold the devices.

    Args:
        create: starts the process. It is called by `start`, because the process takes device memory at once.
        who: the actor in error messages.
        device: the devices that the engine shares with the learner.
    """

    def __init__(self, create: Callable[[], Any], config: Config, who: str, device: SharedDevice) -> None:
        super().__init__(None, config, who)
        self._create, self._device = create, device
        self._waiting = self._questions = 0

    @contextlib.asynccontextmanager
    async def _using(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            self._waiting += 1
            try:
                await stack.enter_async_context(self._device.use("engines"))
            finally:
                self._waiting -= 1
            yield

    async def start(self) -> None:
        async with self._using():
            self.handle = self._create()
            self._device.join("engines", self)
            await super().start()

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        async with self._using():
            return await super().generate(prompts, settings)

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        async with self._using():
            return await super().search(prompt)

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        async with self._using():
            return await super().grow(prompt)

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        async with self._using():
            return await super().probe(rows)

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        async with self._using():
            return await super().update_weights(offer, probe)

    async def progress(self) -> int:
        """Return a number that also grows while the learner holds the devices: waiting is no hang."""
        if self._waiting:
            self._questions += 1
            return self._questions
        return await super().progress()

    async def sleep(self) -> None:
        """Move weights to the host and drop the cache. An engine that cannot is ended, and its next call fails."""
        await self._move("sleep")

    async def wake(self) -> None:
        """Move weights back and make a new cache. An engine that cannot is ended, and its next call fails."""
        await self._move("wake")

    async def _move(self, method: str) -> None:
        try:
            await self._update(method)
        except EngineError:
            self.kill()

    async def close(self) -> None:
        if self.handle is not None:
            await super().close()

    def kill(self) -> None:
        self._device.leave("engines", self)
        if self.handle is not None:
            super().kill()


class ColocatedLearner(RayLearner):
    """RayLearner whose ranks work only while the learner holds the devices.

    Args:
        spawn: starts the Ray actors of all ranks, by attempt, from 0.
        device: the devices that the ranks share with engines.
    """

    shares_device = True

    def __init__(self, spawn: Callable[[int], Sequence[Any]], config: Config, device: SharedDevice) -> None:
        super().__init__(spawn, config)
        self._device = device
        device.join("learner", self)

    async def call(self, method: str, *arguments: Any, moving: bool = False) -> Sequence[Any]:
        async with self._device.use("learner"):
            return await super().call(method, *arguments, moving=moving)

    async def sleep(self) -> None:
        """Move all states of the ranks to the host."""
        await super().call("sleep")

    async def wake(self) -> None:
        """Move all states of the ranks back to their devices."""
        await super().call("wake")
