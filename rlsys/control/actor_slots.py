"""The handle, state and progress of each process in the fleet."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlsys.control.watchdog import ProgressTimer
from rlsys.errors import RlsysError
from rlsys.interfaces import EngineStats
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Float32Array, Int32Array, Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup
from rlsys.weight_types import WeightAck, WeightOffer


class ActorState(enum.Enum):
    """The states of an actor; `rlsys.control.fleet` shows the transitions."""

    STARTING = "starting"
    STALE = "stale"
    SERVING = "serving"
    DEAD = "dead"


class WatchedHandle(Protocol):
    """A watched process. A call raises EngineError if the process must not be used again."""

    async def start(self) -> None:
        """Return when the process is up."""
        ...

    async def engine_stats(self) -> EngineStats:
        """Return the engine's statistics since the last call. The fleet fills in `model` and `engine`."""
        ...

    async def progress(self) -> int:
        """Return a number that grows with every piece of work. The process answers while other calls are under way."""
        ...

    async def close(self) -> None: ...

    async def forget(self, caller: str) -> None:
        """Abort the requests of a lost process. Only auxiliary engines have such requests.

        Args:
            caller: `ActorSlot.member` of the process.
        """
        ...

    async def score(self, token_ids: Int32Array, tokens: int | None) -> tuple[Int32Array, Float32Array]:
        """Return ids and log-probabilities of K tokens after each prefix of a row, [T-1, K] each.

        Only auxiliary engines are asked.

        Args:
            tokens: K, the number of the most probable tokens; None for the row's own token alone, K = 1.
        """
        ...

    def kill(self) -> None:
        """End the process at once, even a stopped one."""
        ...


class ActorHandle(WatchedHandle, Protocol):
    """One actor. A call raises EngineError or WeightSyncError if the process must not be used again."""

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]: ...

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure: ...

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure: ...

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]: ...

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck: ...


@dataclass(eq=False, slots=True)
class ActorSlot:
    """One process of an actor, or an auxiliary engine.

    Attributes:
        who: the name of the process in messages.
        attempt: number of earlier processes of the actor, from 0.
        calls: number of pending calls.
        asking_progress: whether a request for the progress is pending.
        cause: why the process was lost.
        lost: set once the process must not be used again.
    """

    who: str
    number: int
    attempt: int
    handle: Any
    timer: ProgressTimer
    state: ActorState = ActorState.STARTING
    calls: int = 0
    asking_progress: bool = False
    cause: RlsysError | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def member(self) -> str:
        """The name of this process among all processes of actors: it groups broadcasts and requests."""
        return f"{self.number}.{self.attempt}"

    @property
    def up(self) -> bool:
        """Whether the process has started and is not lost."""
        return self.state in (ActorState.STALE, ActorState.SERVING)
