"""Rows that cannot be used: they are left out and counted, up to a share of all rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from rlsys.errors import DataError

_EXAMPLES = 3
"""Number of rows that an error lists."""


@dataclass(slots=True, kw_only=True)
class LeftOut:
    """The rows of one data set that are left out, with the reasons.

    Attributes:
        where: Name of the data set, for messages.
        noun: Name of its rows.
        limit: Config field of the largest share.
        share: Largest share of rows that may be left out, from 0 to 1.
        total: Number of all rows, also of the usable ones.
    """

    where: str
    noun: str
    limit: str
    share: float
    total: int = 0
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, index: int, reason: str) -> None:
        """Leave out the row with an index, which may be added more than once."""
        self.reasons[index] = reason

    def others(self, size: int) -> list[int]:
        """Return the indices below `size` of the rows that are not left out."""
        return [index for index in range(size) if index not in self.reasons]

    def digest(self, digest: str) -> str:
        """Return the digest of a data set without these rows, from its digest with them."""
        if not self.reasons:
            return digest
        return hashlib.sha256(json.dumps([digest, self.noun, sorted(self.reasons)]).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """The line about these rows for the user; none without such rows."""
        if not self.reasons:
            return ()
        return (
            f"{self.where}: {len(self.reasons)} of {self.total} {self.noun} left out, the first: {self._ordered()[0]}",
        )

    def check(self) -> None:
        """Raise DataError if too many rows are left out, or all."""
        count, reasons = len(self.reasons), "; ".join(self._ordered()[:_EXAMPLES])
        if count > self.share * self.total:
            raise DataError(
                f"{self.where}: {count} of {self.total} {self.noun} are unusable, more than {self.limit} "
                f"{self.share:g}; mend or remove them, or raise it; the first: {reasons}"
            )
        if self.total and count == self.total:
            raise DataError(f"{self.where}: all {count} {self.noun} are unusable; the first: {reasons}")

    def _ordered(self) -> list[str]:
        return [self.reasons[index] for index in sorted(self.reasons)]
