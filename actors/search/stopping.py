"""The limits that end the search of one prompt."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from actors.search.tree import Node
from rlsys.config.patterns import Pattern
from rlsys.config.search import StopConfig
from rlsys.search.votes import certainty
from rlsys.tasks import tags
from rlsys.trees import StopReason
from rlsys.types import Verdict


def is_correct(verdict: Verdict) -> bool:
    return verdict.correct


def thinking_of(answer: Node, pattern: Pattern) -> str:
    """Return the texts of the <thinking> nodes and turns that lead to an answer; without any, the whole chain.

    Chains that differ in a sub-task or a double check alone are one way to the answer.
    """
    path = answer.path()
    ways = {name for name, node in pattern.types.items() if node.tag == tags.THINKING} | pattern.turn_ends
    thinking = [node.text.strip() for node in path if node is not answer and node.type in ways]
    return "".join(thinking or [node.text for node in path])


@dataclass(slots=True)
class StopRule:
    """Counts of one search, compared with its limits.

    Attributes:
        begun: Simulations begun, without those that others blocked before their first request.
        finished: Those that ended.
        tokens: Generated tokens of all models.
        scored: Distinct answers with the outcome "ok" or "wrong".
        correct: Correct answers that are distinct by their thinking (`thinking_of`).
        votes: Chains that ended at a scored answer and were not told of a wrong one, by the text of the answer.
        reason: First limit that was reached; None if no limit was reached.
    """

    config: StopConfig
    begun: int = 0
    finished: int = 0
    tokens: int = 0
    scored: int = 0
    reason: StopReason | None = None
    votes: Counter[str] = field(default_factory=Counter)
    _right: set[str] = field(default_factory=set)

    @property
    def correct(self) -> int:
        return len(self._right)

    def count(self, verdict: Verdict, thinking: str) -> None:
        """Count the verdict on a distinct answer with a given thinking."""
        self.scored += verdict.outcome in ("ok", "wrong")
        if is_correct(verdict):
            self._right.add(thinking)

    def is_reached(self) -> bool:
        """Return whether a limit forbids further requests to models. Once true, it stays true."""
        config = self.config
        if self.reason is None:
            if any(self.correct >= rule.count and self.finished >= rule.after for rule in config.correct):
                self.reason = "correct"
            elif config.answers is not None and self.scored >= config.answers:
                self.reason = "answers"
            elif config.tokens is not None and self.tokens >= config.tokens:
                self.reason = "tokens"
            elif config.sure is not None and certainty([*self.votes.values()]) >= config.sure:
                self.reason = "sure"
        return self.reason is not None

    def may_begin(self) -> bool:
        """Return whether another simulation may begin."""
        return not self.is_reached() and self.begun < self.config.simulations

    @property
    def final_reason(self) -> StopReason:
        """Reason why a finished search ended."""
        return self.reason or ("simulations" if self.begun >= self.config.simulations else "exhausted")
