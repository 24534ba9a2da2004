"""Ends of the chains of one tree: what is asked about them, and the rewards that they back up.

An answer is judged once. A chain that the proposing model ended without an answer is judged as the completion or the
episode that it is, but it is no scored answer. If such a completion would go on, the chain has reward 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from actors.search.backtracking import Backtracking
from actors.search.jobs import Job
from actors.search.requesting import Requesting
from actors.search.requests import SearchModel, proposing_role
from actors.search.simulations import Simulation, Simulations
from actors.search.stopping import StopRule, is_correct, thinking_of
from actors.search.tree import GrowingTree, Node
from actors.search.turns import Turns, has_end_token, is_cut_off
from rlsys.trees import ENDINGS, Role
from rlsys.types import Verdict


class Endings:
    """The ends of the chains of one tree.

    Args:
        backtracking: Gets the wrong answers.
        models: Models by role.
        turns: None without an environment.
    """

    def __init__(
        self,
        tree: GrowingTree,
        jobs: Requesting,
        simulations: Simulations,
        stop: StopRule,
        backtracking: Backtracking,
        models: Mapping[Role, SearchModel],
        turns: Turns | None,
    ) -> None:
        self._tree, self._jobs, self._simulations, self._stop = tree, jobs, simulations, stop
        self._backtracking, self._turns = backtracking, turns
        self._proposer = proposing_role(models)
        self._model = models[self._proposer]

    def judge(self, node: Node, simulation: Simulation) -> None:
        """Back up the verdict of a whole chain, or request the verdict if there is none yet.

        No other simulation arrives before the verdict: the node is blocked, and completions wait for open verdicts.
        """
        if node.verdict is not None:
            self._simulations.end(simulation, node.verdict)
        elif self._turns and node.reply is None:
            self._jobs.ask("reply", node, simulation)
        else:
            self._jobs.ask("verdict", node, simulation)

    def has_failed(self, node: Node) -> bool:
        """Return whether the proposer's chain has failed at a node without an answer."""
        return node.defect in ENDINGS and node.writer == self._proposer

    def fail(self, node: Node, simulation: Simulation | None) -> None:
        """Back up the reward of a chain that has failed at a node, or request first what a completion would.

        Args:
            simulation: The one that ends there; None if no simulation has entered the node.
        """
        if kind := self._open_request(node):
            self._jobs.ask(kind, node, simulation)
        elif node.verdict is None or node.verdict.outcome in ("ok", "wrong"):
            self._simulations.fail(node, simulation, self._reward(node))
        elif simulation is not None:
            self._simulations.leave(simulation)

    def _open_request(self, node: Node) -> Literal["reply", "verdict"] | None:
        """Return what a completion or an episode with the tokens of a failed chain would request next."""
        if node.verdict is not None:
            return None
        if self._turns:
            return self._turns.open_request(node)
        return "verdict" if is_cut_off(node) or has_end_token(node, self._model) else None

    def _reward(self, node: Node) -> float:
        """Return the reward of a chain that failed at a node."""
        if self._turns:
            return self._turns.unanswered_reward(node)
        return node.verdict.reward if node.verdict else 0.0

    def fail_children(self, children: Iterable[Node]) -> None:
        """End the chains that have failed at new children, which no simulation has entered."""
        for child in dict.fromkeys(children):
            if self.has_failed(child):
                self.fail(child, None)

    def take_verdict(self, job: Job, verdict: Verdict) -> None:
        """Take the verdict on the chain that ends at the node of a job."""
        node = job.node
        node.verdict = verdict = self._turns.rewarded(node, verdict) if self._turns else verdict
        is_scored = verdict.outcome in ("ok", "wrong")
        if not is_scored:
            self._tree.counts[f"verifier_{verdict.outcome}"] += 1
        if node.defect:
            self._jobs.close(job)
            self.fail(node, next(iter(job.simulations), None))
            return
        [simulation] = job.simulations
        node.scored_tokens = self._stop.tokens
        if is_scored:
            node.scored = self._stop.scored
        self._stop.count(verdict, thinking_of(node, self._tree.pattern))
        self._jobs.close(job)
        self._simulations.end(simulation, verdict)
        if is_scored and not is_correct(verdict):
            self._backtracking.plan(node)
