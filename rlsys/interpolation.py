"""The share of a teacher in the distribution that the policy learns, from one training step to the next (TAID)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MOMENTUM = 0.99
_NAMES = {"share": "teacher_share", "momentum": "teacher_momentum", "loss": "teacher_loss"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherShare:
    """The share t of a teacher, and what its next value depends on.

    Attributes:
        share: t, in (0, 1].
        momentum: moving mean of the relative fall of the loss.
        loss: loss of the step before; None before the first step.
    """

    share: float
    momentum: float = 0.0
    loss: float | None = None

    def after(self, loss: float, *, linear: float, last: float, rate: float) -> TeacherShare:
        """Return the share of the next step.

        m <- 0.99 m + 0.01 (l_before - l) / l_before
        t <- min(last, max(linear, t + rate sigmoid(m) (1 - t)))

        The first step has no loss before it and moves only along the line. A loss of 0 has no relative fall.

        Args:
            loss: l, loss of the step that was made with this share.
            linear: share of the next step on the line from the first to the last one.
            last: share at which the growth ends.
            rate: largest growth in a step, alpha in the paper.

        Source: TAID, arXiv:2501.16937, sec. 3.2 and its algorithm 1.
        """
        if self.loss is None:
            return TeacherShare(share=max(linear, self.share), loss=loss)
        fall = (self.loss - loss) / self.loss if self.loss else 0.0
        momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * fall
        growth = rate / (1 + math.exp(-momentum)) * (1 - self.share)
        return TeacherShare(share=min(last, max(linear, self.share + growth)), momentum=momentum, loss=loss)

    def as_floats(self) -> dict[str, float]:
        """Return the values as the counters of a run state keep them."""
        values = {name: getattr(self, field) for field, name in _NAMES.items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, counters: Mapping[str, float], first: float) -> TeacherShare:
        """Return the share in the counters of a run state; `first` if there is none."""
        if _NAMES["share"] not in counters:
            return cls(share=first)
        return cls(**{field: counters[name] for field, name in _NAMES.items() if name in counters})
