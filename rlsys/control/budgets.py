"""Limits of failed rollouts, trees and verifications, and of skipped training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.errors import NonFiniteLossError, NonFiniteStepsError, TooManyFailuresError
from rlsys.types import TrajectoryGroup


def causes(first: str, last: str) -> str:
    """Return the end of a message about too many failures.

    It names the first failure, which often causes the others, and the last one.
    """
    return f"the first: {first}" + (f"; the last: {last}" if last != first else "")


@dataclass(slots=True, kw_only=True)
class FailureLimit:
    """Limit of failures as a share of all attempts. One failure is always allowed, unless the share is 0.

    Attributes:
        noun: the plural noun in messages, such as rollouts.
        field: the config field that holds `share`.
        remedy: what else the user can do than raise the share.
        failed, total: counts so far; a resumed run begins with those of its checkpoint.
    """

    noun: str
    field: str
    share: float
    remedy: str = "mend the cause"
    failed: int = 0
    total: int = 0
    _details: list[str] = dataclasses.field(default_factory=list)  # the first and the last failure of this command

    def add(self, *, total: int, failed: int = 0, details: Sequence[str] = ()) -> None:
        """Count more attempts and check the limit.

        Args:
            details: reasons of some of the failures, in order.
        Raises:
            TooManyFailuresError: more attempts failed than allowed.
        """
        self.count(failed=failed, total=total, details=details)
        if failed:
            self.check()

    def count(self, *, failed: int, total: int, details: Sequence[str]) -> None:
        """Count more attempts without a check; see `add`."""
        self.failed += failed
        self.total += total
        known = [*self._details, *details]
        self._details = [known[0], known[-1]] if known else []

    def check(self) -> None:
        """Raise TooManyFailuresError if more attempts failed than allowed."""
        allowed = max(1.0, self.share * self.total) if self.share else 0.0
        if self.failed > allowed:
            raise TooManyFailuresError(
                f"{self.failed} of {self.total} {self.noun} failed, more than {self.field} = {self.share:g}; "
                f"{self.remedy}, or raise this key; {causes(*self._details)}"
            )

    def add_verdicts(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Count the verifications of groups; a searched group has those of the answers in its tree.

        Raises:
            TooManyFailuresError: more verifications than allowed raised or ran out of time.
        """
        counts = [_verifications(group) for group in groups]
        self.add(
            failed=sum(failed for failed, _, _ in counts),
            total=sum(total for _, total, _ in counts),
            details=[detail for _, _, details in counts for detail in details],
        )


def _verifications(group: TrajectoryGroup) -> tuple[int, int, list[str]]:
    """Return failed verifications, all verifications, and the reasons of the failures. Values of nodes are included."""
    if group.searched:
        failed = int(group.metrics["verifier_errors"] + group.metrics["value_errors"])
        total = int(group.metrics["verifier_errors"] + group.metrics["scored"] + group.metrics["values"])
        detail = f"in the tree of prompt {group.prompt.prompt_id}, see the log of its actor"
        return failed, total, [detail] if failed else []
    name = group.prompt.prompt_id
    details = [f"prompt {name}: {trajectory.detail}" for trajectory in group.trajectories if not trajectory.judged]
    return len(details), len(group.trajectories), details


def verifier_limit(share: float, failed: int = 0, total: int = 0) -> FailureLimit:
    """Return the limit of train.max_verifier_failures, beginning with the counts of a resumed run."""
    field = "train.max_verifier_failures"
    remedy = "mend the function that failed (after a timeout, also rewards.timeout_s)"
    return FailureLimit(noun="verifications", field=field, share=share, remedy=remedy, failed=failed, total=total)


@dataclass(slots=True, kw_only=True)
class SkippedSteps:
    """Count of training steps that were skipped because a loss or gradient was not finite.

    Attributes:
        limit: consecutive steps that may be skipped, learner.max_skipped_steps.
        total: skipped steps of the stage so far.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0
    _first: str = ""  # the reason of the first step in the row

    def end_row(self) -> None:
        """End the row of skipped steps, because a step was made."""
        self.in_a_row = 0

    def skip(self, error: NonFiniteLossError) -> None:
        """Count a skipped step.

        Raises:
            NonFiniteStepsError: too many steps in a row were skipped.
        """
        self.total += 1
        self.in_a_row += 1
        self._first = error.message if self.in_a_row == 1 else self._first
        if self.in_a_row > self.limit:
            raise NonFiniteStepsError(
                f"{self.in_a_row} training steps in a row were not finite, more than learner.max_skipped_steps = "
                f"{self.limit}; {causes(self._first, error.message)}"
            )
