"""Failures that are tolerated one by one, up to a share of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.errors import TooManyFailuresError
from rlsys.types import TrajectoryGroup


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

    def add(self, *, failed: int = 0, total: int, detail: str = "") -> None:
        """Count `failed` of `total` more; `detail`: why the last of them failed.

        Raises:
            TooManyFailuresError: there are more than allowed.
        """
        self.failed += failed
        self.total += total
        allowed = max(1.0, self.share * self.total) if self.share else 0.0
        if failed and self.failed > allowed:
            raise TooManyFailuresError(
                f"{self.failed} of {self.total} {self.what} failed, more than {self.field} = {self.share:g}; "
                f"the last: {detail}"
            )

    def add_verdicts(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Count the verifications of groups.

        Raises:
            TooManyFailuresError: more of them than allowed raised or ran out of time.
        """
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        failed = [trajectory.detail for trajectory in trajectories if not trajectory.judged]
        self.add(failed=len(failed), total=len(trajectories), detail=failed[-1] if failed else "")


def verifier_limit(share: float, failed: int = 0, total: int = 0) -> FailureLimit:
    """The limit of train.max_verifier_failures. failed, total: counted before, where a run is resumed."""
    field = "train.max_verifier_failures"
    return FailureLimit(what="verifications", field=field, share=share, failed=failed, total=total)
