"""The counters of a stage that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Counts since the beginning of the stage. A run state keeps them as floats, in this order.

    Attributes:
        unlogged_tokens: tokens of failed, replaced and skipped rollouts that no row of metrics contains yet.
    """

    failed_rollouts: int = 0
    failed_verifications: int = 0
    verifications: int = 0
    filtered_groups: int = 0
    filtered_tokens: int = 0
    unlogged_tokens: int = 0
    skipped_steps: int = 0

    @classmethod
    def of(cls, counters: Mapping[str, float]) -> Counters:
        """Return the counters of a run state; missing ones are 0."""
        return cls(**{field.name: int(counters.get(field.name, 0)) for field in fields(cls)})

    def as_floats(self) -> dict[str, float]:
        """Return the counters as a run state keeps them."""
        return {name: float(value) for name, value in asdict(self).items()}
