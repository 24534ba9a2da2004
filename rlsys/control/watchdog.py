"""An actor process as the fleet sees it: its handle, its state, and how long it has been silent."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlsys.errors import RlsysError
from rlsys.trees import Tree, TreeFailure
from rlsys.types import (
    Float32Array,
    Int32Array,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    TrajectoryGroup,
    WeightAck,
    WeightManifest,
)

WATCH_INTERVAL_S = 1.0


class ActorState(enum.Enum):
    """See the picture in rlsys.control.fleet."""

    STARTING = "starting"
    STALE = "stale"
    SERVING = "serving"
    DEAD = "dead"


class WatchedHandle(Protocol):
    """A process that is watched. A call raises EngineError where it must not be used again."""

    async def start(self) -> None:
        """Returns when it is up."""
        ...

    async def usage(self) -> Any:
        """What the engine did since the last call, an actors.engine_stats.EngineUsage."""
        ...

    async def progress(self) -> int:
        """A number that grows with whatever it does. Must be answered while other calls are under way."""
        ...

    async def close(self) -> None: ...

    def kill(self) -> None:
        """End the process at once, also a stopped one."""
        ...


class ActorHandle(WatchedHandle, Protocol):
    """One actor process. A call raises EngineError or WeightSyncError where the process must not be used again."""

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]: ...

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure: ...

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure: ...

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]: ...

    async def update_weights(
        self, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array]
    ) -> WeightAck: ...


class Silence:
    """How long a process that should show progress has shown none, seconds, as far as somebody looked.

    Between two looks at most two watch intervals count: where the driver itself stood still, nobody is to blame.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._looked = clock()
        self._progress = -1

    def look(self) -> float:
        """Count the time since the last look; the sum."""
        now = self._clock()
        self.seconds += min(now - self._looked, 2 * WATCH_INTERVAL_S)
        self._looked = now
        return self.seconds

    def heard(self, progress: int, *, idle: bool = False) -> None:
        """The process has told its progress. idle: none is expected."""
        if idle or progress != self._progress:
            self.begin()
        self._progress = progress

    def begin(self) -> None:
        """From now on."""
        self.seconds, self._looked = 0.0, self._clock()


@dataclass(eq=False, slots=True)
class Member:
    """An incarnation of an actor, or an engine beside the actors.

    who: in messages. asked: calls under way. cause: why it was lost.
    """

    who: str
    number: int
    attempt: int
    handle: Any
    silence: Silence
    state: ActorState = ActorState.STARTING
    asked: int = 0
    looked_at: bool = False
    cause: RlsysError | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)
