"""Judges the steps of a chain, node by node, with the rules of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from rlsys.tasks import tags
from rlsys.types import StepVerdict

State = TypeVar("State")
"""What the thoughts so far have led to. Only right thoughts change it."""


class WrongStepError(Exception):
    """A node that is wrong. The message says what is wrong with it."""


class StepRules(ABC, Generic[State]):
    """Rules of one problem.

    Attributes:
        start: The state before the first thought.
    """

    start: State

    @abstractmethod
    def think(self, state: State, text: str) -> State:
        """Return the state after a thought, or raise WrongStepError."""

    @abstractmethod
    def reflect(self, before: State, thought: str, text: str, fault: str) -> None:
        """Raise WrongStepError if a reflection must not take back a thought.

        Args:
            before: The state before the thought.
            thought: The text of the thought.
            text: The text of the reflection.
            fault: What is wrong with the thought; "" if it is right.
        """

    @abstractmethod
    def note(self, state: State, tag: str, text: str) -> None:
        """Raise WrongStepError if a node that is neither a thought nor a reflection is wrong."""


def judge_steps(rules: StepRules[State], completion: str) -> StepVerdict:
    """Return the first wrong node of a chain or of its beginning.

    A reflection directly after a thought takes it back: the next thought starts from the state before it. So a wrong
    thought counts only if something else, or nothing, follows. An unfinished last node is ignored.
    """
    nodes, may_go_on = tags.complete_nodes(completion)
    state = before = rules.start
    thought, fault = None, ""  # of the thinking node directly before
    for number, (tag, text) in enumerate(nodes):
        if fault and tag != tags.REFLECTION:
            return StepVerdict(wrong_node=number - 1, detail=fault)
        try:
            if tag == tags.THINKING:
                before, thought = state, text
                state = rules.think(before, text)
                continue
            if tag != tags.REFLECTION:
                rules.note(state, tag, text)
            elif thought is None:
                raise WrongStepError("a reflection, but no thought before it")
            else:
                rules.reflect(before, thought, text, fault)
                state = before
            thought, fault = None, ""
        except WrongStepError as error:
            if tag != tags.THINKING:
                return StepVerdict(wrong_node=number, detail=str(error))
            fault = str(error)
    if fault:
        return StepVerdict(wrong_node=len(nodes) - 1, detail=fault)
    return StepVerdict() if may_go_on else StepVerdict(wrong_node=len(nodes), detail="not a node between its two tags")
