"""Measure the time without progress of a watched process, with a clock that tests can replace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

QUESTIONS_PER_S = 100.0
"""Questions about progress that the driver asks in a second. 1,000 in a second would fill a core."""


def watch_interval(processes: int) -> float:
    """Return the seconds between two questions to one of so many processes: 1, or more for more than 100."""
    return max(1.0, processes / QUESTIONS_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchClock:
    """The clock of a watch.

    Attributes:
        monotonic: returns monotonic seconds.
        interval_s: seconds between two checks of a watched process.
    """

    monotonic: Callable[[], float] = time.monotonic
    interval_s: float = 1.0


class ProgressTimer:
    """Seconds without observed progress.

    An update adds at most two watch intervals, so that a pause of the driver does not count against the process.
    """

    def __init__(self, clock: WatchClock) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._updated = clock.monotonic()
        self._progress = -1

    def update(self) -> float:
        """Add the time since the last update and return the sum."""
        now = self._clock.monotonic()
        self.seconds += min(now - self._updated, 2 * self._clock.interval_s)
        self._updated = now
        return self.seconds

    def report(self, progress: int, *, idle: bool = False) -> None:
        """Take the progress that the process reported, and restart if it grew.

        Args:
            progress: a number that grows with every piece of work.
            idle: whether the process has nothing to do, so that no progress is expected.
        """
        if idle or progress != self._progress:
            self.restart()
        self._progress = progress

    def restart(self) -> None:
        """Set the sum to 0 and count from now on."""
        self.seconds, self._updated = 0.0, self._clock.monotonic()
