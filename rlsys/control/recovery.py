"""Restarts a lost learner from the newest checkpoint, as often as the budget allows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlsys.config.schema import Config
from rlsys.control.budgets import causes
from rlsys.errors import (
    InterruptedRunError,
    LearnerLostError,
    LearnerRaisedError,
    NonFiniteStepsError,
    RlsysError,
)
from rlsys.run import report
from rlsys.run.resume import Start


class ServingActors(Protocol):
    """Actors that can stop serving their weights."""

    async def withdraw(self) -> None: ...


class RestartableLearner(Protocol):
    """A learner whose processes can be replaced by new ones."""

    async def restart(self) -> None: ...


class VersionLedger(Protocol):
    """A record of published weight versions that can be emptied."""

    def forget(self) -> None: ...


@dataclass(kw_only=True)
class Recovery:
    """Recovery of a run: it repeats attempts until one reaches the end.

    Attributes:
        newest_start: returns the newest checkpoint as the start of an attempt.
        sweep: removes unfinished checkpoints. A lost rank may go on writing after its save was given up.
        say: takes a message about every restart.
        signals: names of the signals that asked for an end, newest last; attempts add to it.
    """

    config: Config
    actors: ServingActors
    learner: RestartableLearner
    versions: VersionLedger
    newest_start: Callable[[], Start]
    sweep: Callable[[], None]
    say: Callable[[str], None]
    signals: Sequence[str]
    _losses: list[LearnerLostError] = field(default_factory=list)  # since the newest checkpoint

    async def run(self, start: Start, attempt: Callable[[Start], Awaitable[None]]) -> None:
        """Make attempts until one ends without the loss of the learner.

        Raises:
            InterruptedRunError: a signal asked for an end, and the learner was lost as well.
            LearnerLostError: the budget learner.max_restarts is spent, or a rank raised the same exception twice in a
                row.
            NonFiniteStepsError: the steps were not finite again after a return to the newest checkpoint.
        """
        while True:
            try:
                await attempt(start)
                return
            except LearnerLostError as error:
                start = await self._recover(error, start)

    async def _recover(self, error: LearnerLostError, previous: Start) -> Start:
        """Return the start of the next attempt, with a new learner and no served weights."""
        start = await asyncio.to_thread(self._find_start, error)
        if start.state.weight_version > previous.state.weight_version:
            self._losses.clear()
        self._losses.append(error)
        self._check_interrupted(error, start)
        self._check_budget()
        self.say(f"the learner is lost and started again: {error.message}; {start.describe()}")
        await asyncio.gather(self.actors.withdraw(), self.learner.restart())
        await asyncio.to_thread(self.sweep)
        self.versions.forget()
        self._check_interrupted(error, start)
        return start

    def _find_start(self, error: LearnerLostError) -> Start:
        try:
            return self.newest_start()
        except RlsysError as problem:
            raise type(problem)(f"{problem.message}; a checkpoint is needed because {error.message}") from error

    def _check_interrupted(self, error: LearnerLostError, start: Start) -> None:
        """Raise InterruptedRunError after a signal: without a learner there is nothing left to save."""
        if self.signals:
            saved = f"weight version {start.state.weight_version}" if start.checkpoint else "nothing"
            text = f"the learner was lost as well: {error.message}; {saved} is saved"
            raise InterruptedRunError(self.signals[-1] + report.interrupted(self.config, text)) from None

    def _check_budget(self) -> None:
        limit = self.config.learner.max_restarts
        self._check_repetition()
        not_finite_again = sum(isinstance(loss, NonFiniteStepsError) for loss in self._losses) > 1
        if len(self._losses) <= limit and not not_finite_again:
            return
        first, last = self._losses[0], self._losses[-1]
        if len(self._losses) == 1:
            raise last from None
        if not_finite_again:
            raise NonFiniteStepsError(
                f"{last.message}; the same happened before the return to the newest checkpoint"
            ) from None
        times = f"the learner was lost {len(self._losses)} times without a checkpoint in between"
        raise type(last)(f"{times} (learner.max_restarts = {limit}); {causes(first.message, last.message)}") from None

    def _check_repetition(self) -> None:
        """Raise if the last two losses are the same exception: draws and data are the same after every restart."""
        last = self._losses[-1]
        before = self._losses[-2] if len(self._losses) > 1 else None
        if not (isinstance(last, LearnerRaisedError) and isinstance(before, LearnerRaisedError)):
            return
        if last.exception == before.exception:
            raise LearnerRaisedError(
                f"{last.message}; the same happened before the restart, so the learner is not started again",
                last.exception,
            ) from None
