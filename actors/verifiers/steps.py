"""The judgement of steps as a verdict, in which form it leaves a verifier process.

The outcome is "wrong" if a node is wrong, and the reward is then the number of this node. `answered` is False if the
task cannot tell.
"""

from __future__ import annotations

from rlsys.types import StepVerdict, Verdict


def as_verdict(judgement: StepVerdict | None) -> Verdict:
    """Return the judgement of `Task.check_steps` as a verdict."""
    if judgement is None:
        return Verdict(outcome="ok", reward=0.0, answered=False)
    if judgement.wrong_node is None:
        return Verdict(outcome="ok", reward=0.0, answered=True)
    return Verdict(outcome="wrong", reward=float(judgement.wrong_node), answered=True, detail=judgement.detail)


def wrong_node(verdict: Verdict) -> int | None:
    """Return the number of the wrong node that a verdict names, from 0; None if it names none."""
    return int(verdict.reward) if verdict.outcome == "wrong" else None
