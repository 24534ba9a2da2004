"""Failures that are tolerated one by one, up to a share of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.errors import NonFiniteLossError, NonFiniteStepsError, TooManyFailuresError
from rlsys.types import TrajectoryGroup


def causes(first: str, last: str) -> str:
    """Why there were too many failures, as the end of a message: the first one is mostly what the others come from."""
    return f"the first: {first}" + (f"; the last: {last}" if last != first else "")


@dataclass(slots=True, kw_only=True)
class FailureLimit:
    """Counts failures; above `share` of all it raises. A single one is no share yet, unless the share is 0.

    what: plural of what may fail, for the message; field: the config field that holds `share`.
    failed, total: counted before, where a run is resumed.
    """

    what: str
    field: str
    share: float
    failed: int = 0
    total: int = 0
    _details: list[str] = dataclasses.field(
        default_factory=list
    )  # of the first and the last that failed in this command

    def add(self, *, total: int, failed: int = 0, details: Sequence[str] = ()) -> None:
        """Count `failed` of `total` more; `details`: why, of some of them in order.

        Raises:
            TooManyFailuresError: there are more than allowed.
        """
        self.count(failed=failed, total=total, details=details)
        if failed:
            self.check()

    def count(self, *, failed: int, total: int, details: Sequence[str]) -> None:
        """The same, and say nothing yet."""
        self.failed += failed
        self.total += total
        known = [*self._details, *details]
        self._details = [known[0], known[-1]] if known else []

    def check(self) -> None:
        """Raises TooManyFailuresError where there are more than allowed."""
        allowed = max(1.0, self.share * self.total) if self.share else 0.0
        if self.failed > allowed:
            raise TooManyFailuresError(
                f"{self.failed} of {self.total} {self.what} failed, more than {self.field} = {self.share:g}; "
                f"{causes(*self._details)}"
            )

    def add_verdicts(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Count the verifications of groups, of a tree those of its answers.

        Raises:
            TooManyFailuresError: more of them than allowed raised or ran out of time.
        """
        counts = [_verifications(group) for group in groups]
        self.add(
            failed=sum(failed for failed, _, _ in counts),
            total=sum(total for _, total, _ in counts),
            details=[detail for _, _, details in counts for detail in details],
        )


def _verifications(group: TrajectoryGroup) -> tuple[int, int, list[str]]:
    """How many failed, how many there were, and why."""
    if group.searched:
        failed, scored = int(group.metrics["verifier_errors"]), int(group.metrics["scored"])
        detail = f"in the tree of prompt {group.prompt.prompt_id}, see the log of its actor"
        return failed, failed + scored, [detail] if failed else []
    details = [trajectory.detail for trajectory in group.trajectories if not trajectory.judged]
    return len(details), len(group.trajectories), details


def verifier_limit(share: float, failed: int = 0, total: int = 0) -> FailureLimit:
    """The limit of train.max_verifier_failures. failed, total: counted before, where a run is resumed."""
    field = "train.max_verifier_failures"
    return FailureLimit(what="verifications", field=field, share=share, failed=failed, total=total)


@dataclass(slots=True, kw_only=True)
class SkippedSteps:
    """Counts training steps that are left out because a loss or gradient was not finite.

    limit: learner.max_skipped_steps, in a row. total: of the run so far.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0
    _first: str = ""  # of those in a row

    def made(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    def skip(self, error: NonFiniteLossError) -> None:
        """Count one.

        Raises:
            NonFiniteStepsError: there are too many in a row.
        """
        self.total += 1
        self.in_a_row += 1
        self._first = error.message if self.in_a_row == 1 else self._first
        if self.in_a_row > self.limit:
            raise NonFiniteStepsError(
                f"{self.in_a_row} training steps in a row were not finite, more than learner.max_skipped_steps = "
                f"{self.limit}; {causes(self._first, error.message)}"
            )
