"""Monte Carlo tree search over thought nodes for one prompt, as a state machine without input or output.

`start` and `deliver` return the next requests. A tree is a function of its seed and of the answers alone, because
`actors.search.jobs` applies answers in a fixed order.

A simulation goes down from the prompt, or begins at the best node of the global frontier, until it reaches a node with
room for children. It requests children there and continues into one of them. It ends at an answer, which is judged
once and whose reward is backed up, or at a node that nothing can follow. Up to `parallel_simulations` simulations run
at once, and each counts along its path (WU-UCT).

Sources: Marco-o1 v2, arXiv:2503.01461, sec. 3; Liu et al., WU-UCT, ICLR 2020.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from actors.rollouts.single_turn import sample_seed
from actors.search.backtracking import Backtracking
from actors.search.expansion import Expander, Plan
from actors.search.jobs import Answer, Job, JobQueue, Request
from actors.search.requests import Ask, Drawn, Judge, SearchWriter
from actors.search.selection import choose, draw_best, frontier_score
from actors.search.simulations import Simulation, Simulations
from actors.search.stopping import StopRule
from actors.search.tree import GrowingTree, NewNode, Node, Status
from rlsys.config.patterns import Pattern
from rlsys.config.search import FrontierConfig, SearchConfig
from rlsys.trees import ENDINGS, Tree, Writer
from rlsys.types import Prompt, Verdict


class TreeSearch:
    """The search of one prompt.

    Args:
        writers: the models by role: "policy" or "model", which proposes nodes, and "reviewer" if there is one.
        max_chain_tokens: longest chain, in tokens of the model that writes it.
        seed: run.seed; together with the prompt's id it decides every draw.
    """

    def __init__(
        self,
        prompt: Prompt,
        pattern: Pattern,
        config: SearchConfig,
        writers: Mapping[Writer, SearchWriter],
        *,
        max_chain_tokens: int,
        seed: int,
    ) -> None:
        self.prompt = prompt
        self._pattern, self._config, self._writers = pattern, config, writers
        self._proposer: Writer = "model" if "model" in writers else "policy"
        self._rng = random.Random(sample_seed(seed, prompt.prompt_id, "search"))
        self._tree = GrowingTree(pattern, chains=config.expansion == "chain", max_depth=config.max_depth)
        self._expander = Expander(
            self._tree,
            config,
            writers,
            self._rng,
            tree_seed=(seed, prompt.prompt_id),
            max_chain_tokens=max_chain_tokens,
        )
        self._jobs = JobQueue()
        self._simulations = Simulations(self._tree)
        self._backtracking = Backtracking(self._tree)
        self._stop = StopRule(config.stop)
        self._expansions: dict[Node, Job] = {}
        self._calls = 0

    def start(self) -> list[Request]:
        """Return the first requests; none if the prompt leaves no room for a node, and the tree is then finished."""
        self._begin_simulations()
        return self._jobs.take_requests()

    def deliver(self, number: int, answer: Answer) -> list[Request]:
        """Take the answer to a request, apply all answers whose turn it is, and return the next requests."""
        self._jobs.answer(number, answer)
        while (ready := self._jobs.pop_ready()) is not None:
            self._apply(*ready)
            self._begin_simulations()
        return self._jobs.take_requests()

    @property
    def finished(self) -> bool:
        """Whether no request is under way."""
        return self._jobs.empty

    def tree(self) -> Tree:
        """Return the finished tree."""
        used_up = self._simulations.begun >= self._config.stop.simulations
        return Tree(
            prompt_id=self.prompt.prompt_id,
            question=self.prompt.question,
            answer=self.prompt.answer,
            pattern=self._pattern.name,
            tokenizers={name: writer.codec.digest for name, writer in self._writers.items()},
            models={name: writer.model for name, writer in self._writers.items()},
            prompt_token_ids={
                name: np.asarray(writer.prompt_ids, dtype=np.int32) for name, writer in self._writers.items()
            },
            nodes=tuple(node.freeze() for node in self._tree.nodes),
            stop=self._stop.reason or ("simulations" if used_up else "exhausted"),
            simulations=self._simulations.begun,
            calls=self._calls,
            tokens=self._stop.tokens,
            counts=dict(sorted(self._tree.counts.items())),
        )

    # --- simulations ---

    def _begin_simulations(self) -> None:
        """Begin as many simulations as may run. Backtracking comes first."""
        simulations, limit = self._simulations, self._config.stop.simulations
        while (
            not self._is_stopped()
            and simulations.begun < limit
            and simulations.running < self._config.parallel_simulations
        ):
            if self._backtracking.queue:
                self._backtrack()
            elif self._tree.root.status is Status.OPEN:
                begun = simulations.begun
                start = self._frontier(self._config.selection) if self._is_frontier else self._tree.root
                self._continue(simulations.begin(start))
                if simulations.begun == begun:  # other simulations block its way
                    return
            else:
                return

    def _continue(self, simulation: Simulation) -> None:
        """Go down until the simulation has to wait for an answer, or nothing can follow."""
        while True:
            node = simulation.node
            if node.terminal and not node.defect:
                self._judge(node, simulation)
                return
            if node.expanding:
                self._expansions[node].simulations.append(simulation)
                return
            if self._tree.has_capacity(node):
                if self._is_stopped():  # nothing more is generated
                    self._simulations.leave(simulation)
                    return
                if self._expand(node, simulation):
                    return
            children = [child for child in node.children if child.status is Status.OPEN]
            if not children:
                self._simulations.leave(simulation)
                return
            simulation.enter(children[choose(children, node, self._config.selection, self._rng)])

    def _is_wrong_ending(self, node: Node) -> bool:
        """Return whether the proposer ended the chain here without an answer. Such a chain has reward 0."""
        return node.defect in ENDINGS and node.writer == self._proposer

    @property
    def _is_frontier(self) -> bool:
        return isinstance(self._config.selection, FrontierConfig)

    def _frontier(self, config: object) -> Node:
        """Return the best node at which a simulation can request something at once."""
        assert isinstance(config, FrontierConfig)  # noqa: S101 - see _is_frontier
        able = [node for node in self._tree.nodes if node.status is Status.OPEN and self._can_act(node)]
        # A node that is being expanded is open as well, but another one is better.
        nodes = [node for node in able if not node.expanding] or able
        deepest = self._tree.max_depth or max(node.depth for node in self._tree.nodes)
        scores = [frontier_score(node, node.parent, node.depth, deepest, config) for node in nodes]
        return nodes[draw_best(scores, self._rng)]

    def _can_act(self, node: Node) -> bool:
        return node.expanding or self._tree.has_capacity(node) or (node.terminal and not node.defect)

    def _is_stopped(self) -> bool:
        """Return whether nothing more may be generated."""
        return self._stop.reached(self._simulations.finished)

    # --- requests ---

    def _expand(self, node: Node, simulation: Simulation) -> bool:
        """Request children of a node. Return False if no request was necessary or possible."""
        if self._tree.chains:
            plan = self._expander.chain(node)
            node.draws += 1
            node.full = not plan.parts  # there will not be more room later
            job = self._job("chain", node, simulation, plan)
        else:
            plan = self._expander.children(node)
            node.expanding = True
            job = self._expansions[node] = self._job("children", node, simulation, plan)
        if plan.parts:
            return True
        if job.kind == "children":
            self._apply_children(job, ())
        else:
            self._returned(job)
        return False

    def _request_review(self, node: Node, type_name: str, simulation: Simulation) -> None:
        """Request a node that the reviewer writes within a chain."""
        plan = Plan() if self._is_stopped() else self._expander.single(node, type_name, backtrack=False)
        job = self._job("single", node, simulation, plan)
        if not plan.parts:
            self._apply_single(job, ())

    def _backtrack(self) -> None:
        """Begin a simulation with the next backtracking child."""
        node, type_name = self._backtracking.take()
        simulation = self._simulations.begin(node)
        chain = self._tree.chains and self._expander.writer_of(type_name) not in (None, "reviewer")
        if chain:
            plan = self._expander.backtrack_chain(node, type_name)
        else:
            plan = self._expander.single(node, type_name, backtrack=True)
        job = self._job("chain" if chain else "single", node, simulation, plan)
        self._tree.counts["backtracks"] += 1
        if not plan.parts:
            self._apply_single(job, ())

    def _judge(self, node: Node, simulation: Simulation) -> None:
        """Back up the verdict of a complete chain, or request the verdict if there is none yet.

        No other simulation can arrive here meanwhile: none goes to a waiting node, and no completion is applied.
        """
        if node.verdict is not None:
            self._end(simulation, node.verdict)
            return
        job = Job(self._jobs.next_number, "verdict", node, [simulation])
        node.waiting += 1
        self._jobs.put(job, Judge(job.number, "".join(step.text for step in node.path())))
        self._tree.refresh(node)

    def _job(self, kind: Literal["children", "single", "chain"], node: Node, simulation: Simulation, plan: Plan) -> Job:
        """Return the job of a plan, and request its completions if it has any."""
        node.waiting += 1
        job = Job(self._jobs.next_number, kind, node, [simulation], plan)
        if plan.parts:
            self._jobs.put(job, Ask(job.number, tuple(part.call for part in plan.parts)))
            self._calls += len(plan.parts)
            simulation.requested = True
            self._tree.refresh(node)
        return job

    # --- answers ---

    def _apply(self, job: Job, answer: Answer) -> None:
        if isinstance(answer, Verdict):
            self._apply_verdict(job, answer)
            return
        self._stop.tokens += sum(len(drawn.token_ids) for drawn in answer)
        if job.kind == "children":
            self._apply_children(job, answer)
            for simulation in job.simulations:
                self._continue(simulation)
        elif job.kind == "single":
            self._apply_single(job, answer)
        else:
            self._apply_chain(job, answer[0])

    def _returned(self, job: Job) -> None:
        job.node.waiting -= 1
        self._tree.refresh(job.node)

    def _apply_children(self, job: Job, answer: Sequence[Drawn]) -> None:
        node = job.node
        node.expanding, node.expanded = False, True
        del self._expansions[node]
        for new in self._new_nodes(job, answer):
            child = self._tree.add(node, new)
            self._tree.refresh(child)
            if self._is_wrong_ending(child):  # it is backed up although no simulation went to it
                self._tree.back_up(child, 0.0)
        self._returned(job)

    def _apply_single(self, job: Job, answer: Sequence[Drawn]) -> None:
        [simulation] = job.simulations
        for new in self._new_nodes(job, answer):
            child = self._tree.add(job.node, new)
            simulation.enter(child)
            self._tree.refresh(child)
        self._returned(job)
        if simulation.node is job.node:  # there was no room for a child
            self._simulations.leave(simulation)
        elif self._is_wrong_ending(simulation.node):
            self._simulations.back_up(simulation, 0.0)
        else:
            self._continue(simulation)

    def _new_nodes(self, job: Job, answer: Sequence[Drawn]) -> list[NewNode]:
        return [*job.plan.fixed, *map(self._expander.read_node, job.plan.parts, answer)]

    def _apply_chain(self, job: Job, drawn: Drawn) -> None:
        [simulation], [part] = job.simulations, job.plan.parts
        reviewed_type: str | None = None
        for piece in self._expander.read_chain(job.node, part, drawn):
            node = simulation.node
            if node is not job.node:  # one draw from every node that the chain goes through
                node.draws += 1
            if piece.for_reviewer:
                reviewed_type = piece.node.type
                break
            simulation.enter(self._tree.add(node, piece.node))
        for node in reversed(simulation.path[simulation.path.index(job.node) + 1 :]):
            self._tree.refresh(node)
        self._returned(job)
        if reviewed_type is not None:
            self._request_review(simulation.node, reviewed_type, simulation)
        elif self._is_wrong_ending(simulation.node):
            self._simulations.back_up(simulation, 0.0)
        elif simulation.node is job.node or not simulation.node.terminal:
            self._simulations.leave(simulation)
        else:
            self._continue(simulation)

    def _apply_verdict(self, job: Job, verdict: Verdict) -> None:
        node, [simulation] = job.node, job.simulations
        node.verdict, node.scored_tokens = verdict, self._stop.tokens
        if verdict.outcome in ("ok", "wrong"):
            node.scored, self._stop.scored = self._stop.scored, self._stop.scored + 1
        else:
            self._tree.counts[f"verifier_{verdict.outcome}"] += 1
        if verdict.outcome == "ok" and verdict.reward > 0:
            self._stop.correct += 1
        elif verdict.outcome in ("ok", "wrong") and self._config.backtracking:
            self._backtracking.plan(node)
        self._returned(job)
        self._end(simulation, verdict)

    def _end(self, simulation: Simulation, verdict: Verdict) -> None:
        if verdict.outcome in ("ok", "wrong"):
            self._simulations.back_up(simulation, verdict.reward)
        else:  # masked: the verdict is missing, so the chain keeps its value
            self._simulations.leave(simulation)
