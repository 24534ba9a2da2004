"""Turns of the policy in one tree, and the replies of an environment to them.

A turn ends with a node whose type ends with a stop string, or with an answer. Its reply is a node of its own, the only
child, whose tokens are all forced. A reply that ends the episode, or that nothing may follow, has no node: an episode
does not hold its tokens either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.rollouts.multi_turn import environment_failure, with_replies
from actors.search.requests import SearchModel
from actors.search.tree import GrowingTree, NewNode, Node
from rlsys.config.environment import EnvironmentConfig
from rlsys.interfaces import Reply
from rlsys.trees import ENDED_BY_VALUE, ENVIRONMENT
from rlsys.types import Verdict


@dataclass(frozen=True, slots=True)
class SearchedEnvironment:
    """The environment beside a search.

    Attributes:
        config: Section of the environment in use.
        encode: Gives the tokens of a reply; see `rlsys.models.turns.TurnEncoder.reply`.
    """

    config: EnvironmentConfig
    encode: Callable[[str], list[int]]


def turn_texts(node: Node) -> tuple[str, ...]:
    """Return the texts of the turns up to a node, at which the last one ends."""
    turns = [""]
    for step in node.path():
        if step.type == ENVIRONMENT:
            turns.append("")
        else:
            turns[-1] += step.text
    return tuple(turns)


def is_cut_off(node: Node) -> bool:
    """Return whether a bound of tokens has cut the chain off that ends at a node."""
    return node.defect not in (None, *ENDED_BY_VALUE) and node.finish_reason == "length"


def has_end_token(node: Node, model: SearchModel) -> bool:
    """Return whether a failed chain ends with an end token, after which its completion has no further token."""
    return node.defect is not None and node.token_ids[-1] in model.codec.end_token_ids


class Turns:
    """The turns of one tree.

    Args:
        model: The policy.
        max_own_tokens: Largest number of tokens of a chain, without those of replies.
    """

    def __init__(
        self, tree: GrowingTree, environment: SearchedEnvironment, model: SearchModel, max_own_tokens: int
    ) -> None:
        self._tree, self._environment, self._model = tree, environment, model
        self._max_own_tokens = max_own_tokens

    def take(self, node: Node, reply: Reply | Verdict) -> Node | None:
        """Take the reply to the turn that ends at a node; return its node, None if the chain ends.

        A failed environment ends the chain without a reward.
        """
        if isinstance(reply, Verdict):
            node.terminal, node.verdict = True, environment_failure(reply)
            self._tree.counts[f"environment_{reply.outcome}"] += 1
            return None
        node.reply = reply
        node.terminal = reply.done or (node.terminal and not node.defect)
        new = None if node.terminal or has_end_token(node, self._model) else self._next(node, reply)
        return None if new is None or node.defect else self._tree.add(node, new)

    def _next(self, node: Node, reply: Reply) -> NewNode | None:
        """Return the node of a reply; None if no turn may follow, or if it leaves no room for one."""
        if len(turn_texts(node)) >= self._environment.config.max_turns:
            node.terminal, node.finish_reason = True, "turns"
            return None
        token_ids = self._environment.encode(reply.text)
        if self._room(node, token_ids) < 1:
            node.finish_reason = "length"
            if node.defect is None:
                node.defect = "truncated"
                self._tree.counts["truncated"] += 1
            return None
        return NewNode(
            type=ENVIRONMENT,
            text=reply.text,
            token_ids=token_ids,
            forced=len(token_ids),
            logprobs=(),
            spill="",
            writer="policy",
            finish_reason=None,
            versions=(),
            defect=None,
        )

    def open_request(self, node: Node) -> Literal["reply", "verdict"] | None:
        """Return what an episode would request next after a chain that has failed at a node.

        A turn that has ended gets its reply. The chain is judged if the episode is over then, or was cut off. Where an
        episode would go on, the search has ended the chain, and nothing is requested.
        """
        if is_cut_off(node):
            return "verdict"
        has_ended = has_end_token(node, self._model)
        if node.reply is not None:
            return "verdict" if node.terminal or has_ended else None
        has_stop = any(node.text.rstrip().endswith(stop) for stop in self._environment.config.stop)
        return "reply" if has_stop or has_ended else None

    def rewarded(self, node: Node, verdict: Verdict) -> Verdict:
        """Return the verdict of the task on a chain with the rewards of its replies, as for an episode."""
        return with_replies(verdict, [step.reply for step in node.path() if step.reply is not None])

    def unanswered_reward(self, node: Node) -> float:
        """Return the reward of a chain that failed at a node, by its verdict or else by its replies.

        The node gets a verdict if there is such a reward, or if a reply has said that the problem is solved.
        """
        if node.verdict is not None:
            return node.verdict.reward
        failed = Verdict(outcome="wrong", reward=0.0, answered=False, detail=node.defect or "")
        verdict = self.rewarded(node, failed)
        if verdict != failed:
            node.verdict = verdict
        return verdict.reward

    def _room(self, node: Node, reply: Sequence[int]) -> int:
        """Return the number of tokens that the policy may still choose after a reply."""
        path = node.path()
        own = sum(len(step.token_ids) for step in path if step.type != ENVIRONMENT)
        given = len(self._model.prompt_ids) + sum(len(step.token_ids) for step in path) + len(reply)
        return min(self._max_own_tokens - own, self._model.max_model_len - given)
