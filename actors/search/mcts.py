"""Monte Carlo tree search over thought nodes for one prompt, as a state machine without input or output.

`start` and `deliver` answer with what is to be asked next. Whatever the order in which answers are delivered, those of
the writers are applied in the order in which they were asked for, each with the verdict on the chain that it ends: a
verdict comes before all completions that were asked for meanwhile, so that a short chain's place is not held by longer
ones behind it. So a tree is a function of its seed and the answers alone.

A simulation goes down from the prompt, or from the node that the frontier offers, until it finds a node with capacity;
it asks for children there, goes on into one of them, and ends at an answer, which is judged once and backed up, or
where nothing can follow. Up to `parallel_simulations` are under way at once; each counts along its path (WU-UCT).
Sources: Marco-o1 v2, arXiv:2503.01461, sec. 3; Liu et al., WU-UCT, ICLR 2020.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from actors.rollouts.single_turn import sample_seed
from actors.search.expansion import Expander, Plan
from actors.search.requests import Ask, Drawn, Judge, SearchWriter
from actors.search.selection import choose, draw_best, frontier_score
from actors.search.tree import GrowingTree, Node, Status
from rlsys.config.patterns import Pattern
from rlsys.config.search import FrontierConfig, SearchConfig
from rlsys.trees import ENDINGS, StopReason, Tree, Writer
from rlsys.types import Prompt, Verdict

Request = Ask | Judge


@dataclass(slots=True, eq=False)
class _Simulation:
    """One pass under way; path: from the prompt down to where it is; asked: a writer was asked for it."""

    path: list[Node] = field(default_factory=list)
    asked: bool = False

    @property
    def node(self) -> Node:
        return self.path[-1]

    def enter(self, node: Node) -> None:
        node.in_flight += 1
        self.path.append(node)


@dataclass(slots=True, eq=False)
class _Job:
    """Something asked for and not applied yet: what comes below a node, or its verdict."""

    number: int
    kind: Literal["children", "single", "chain", "verdict"]
    node: Node
    simulations: list[_Simulation]
    plan: Plan = field(default_factory=Plan)


class TreeSearch:
    """The search of one prompt.

    Args:
        writers: "policy" or "model", who grows the tree, and "reviewer" where there is one.
        max_chain_tokens: longest chain, in tokens of whoever writes.
        seed: run.seed; with the prompt's id it decides everything that is drawn.
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
        self._grower: Writer = "model" if "model" in writers else "policy"
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
        self._jobs: deque[_Job] = deque()
        self._verdicts: deque[_Job] = deque()
        self._answers: dict[int, Sequence[Drawn] | Verdict] = {}
        self._expansions: dict[Node, _Job] = {}
        self._backtracks: deque[tuple[Node, str]] = deque()
        self._requests: list[Request] = []
        self._stop: StopReason | None = None
        self._numbered = self._running = self._begun = self._finished = 0
        self._scored = self._correct = self._calls = self._tokens = 0

    def start(self) -> list[Request]:
        """The first requests. None at all where the prompt leaves no room for a node: the tree is finished then."""
        self._begin_simulations()
        return self._take_requests()

    def deliver(self, number: int, answer: Sequence[Drawn] | Verdict) -> list[Request]:
        """Take the answer to a request; apply all answers whose turn it is; what is to be asked next."""
        self._answers[number] = answer
        while (queue := self._verdicts or self._jobs) and queue[0].number in self._answers:
            job = queue.popleft()
            self._apply(job, self._answers.pop(job.number))
            self._begin_simulations()
        return self._take_requests()

    @property
    def finished(self) -> bool:
        """Whether nothing is under way any more."""
        return not self._jobs and not self._verdicts

    def tree(self) -> Tree:
        """The finished tree."""
        used_up = self._begun >= self._config.stop.simulations
        tree, stop = self._tree, self._stop or ("simulations" if used_up else "exhausted")
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
            nodes=tuple(node.freeze() for node in tree.nodes),
            stop=stop,
            simulations=self._begun,
            calls=self._calls,
            tokens=self._tokens,
            counts=dict(sorted(tree.counts.items())),
        )

    # --- simulations ---

    def _begin_simulations(self) -> None:
        """As many as may be under way. Backtracking comes first: it is what a wrong answer has just called for."""
        limit = self._config.stop.simulations
        while not self._is_stopped() and self._begun < limit and self._running < self._config.parallel_simulations:
            if self._backtracks:
                self._backtrack(*self._backtracks.popleft())
            elif self._tree.root.status is Status.OPEN:
                begun = self._begun
                self._continue(self._begin(self._frontier() if self._is_frontier else self._tree.root))
                if self._begun == begun:  # others are in the way
                    return
            else:
                return

    def _begin(self, node: Node) -> _Simulation:
        simulation = _Simulation()
        for above in [*node.upwards()][::-1]:
            simulation.enter(above)
        self._begun += 1
        self._running += 1
        return simulation

    def _continue(self, simulation: _Simulation) -> None:
        """Go down until something has to be asked, or nothing can follow."""
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
                    self._leave(simulation)
                    return
                if self._expand(node, simulation):
                    return
            children = [child for child in node.children if child.status is Status.OPEN]
            if not children:
                self._leave(simulation)
                return
            simulation.enter(children[choose(children, node, self._config.selection, self._rng)])

    def _leave(self, simulation: _Simulation) -> None:
        """End a simulation without an answer. One that asked for nothing, others being in its way, has never been."""
        ended = simulation.asked or simulation.node.status is not Status.BLOCKED
        self._finished += ended
        self._begun -= not ended
        self._running -= 1
        for node in simulation.path:
            node.in_flight -= 1
            node.tried += ended

    def _back_up(self, simulation: _Simulation, reward: float) -> None:
        self._finished += 1
        self._running -= 1
        for node in simulation.path:
            node.in_flight -= 1
        self._tree.back_up(simulation.node, reward)

    def _ends(self, node: Node) -> bool:
        """Whether the one who grows the tree ended the chain here without an answer. Such a chain has reward 0."""
        return node.defect in ENDINGS and node.writer == self._grower

    @property
    def _is_frontier(self) -> bool:
        return isinstance(self._config.selection, FrontierConfig)

    def _frontier(self) -> Node:
        """The best of all nodes from which a simulation can ask or judge something at once."""
        config = self._config.selection
        assert isinstance(config, FrontierConfig)  # noqa: S101 - see _is_frontier
        able = [node for node in self._tree.nodes if node.status is Status.OPEN and self._can_act(node)]
        # A node that is being expanded is open as well, but another one is better.
        nodes = [node for node in able if not node.expanding] or able
        deepest = self._tree.max_depth or max(node.depth for node in self._tree.nodes)
        scores = [frontier_score(node, node.parent, node.depth, deepest, config) for node in nodes]
        return nodes[draw_best(scores, self._rng)]

    def _can_act(self, node: Node) -> bool:
        return node.expanding or self._tree.has_capacity(node) or (node.terminal and not node.defect)

    # --- asking ---

    def _expand(self, node: Node, simulation: _Simulation) -> bool:
        """Ask for children of a node; False where nothing had to be asked or nothing could be."""
        if self._tree.chains:
            plan = self._expander.chain(node)
            node.asked += 1
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

    def _hand_over(self, node: Node, name: str, simulation: _Simulation) -> None:
        """Let the reviewer write the node of a chain that is his."""
        plan = Plan() if self._is_stopped() else self._expander.single(node, name, backtrack=False)
        job = self._job("single", node, simulation, plan)
        if not plan.parts:
            self._apply_single(job, ())

    def _backtrack(self, node: Node, name: str) -> None:
        """Begin a simulation with a child of a type below the ancestor of a wrong answer."""
        simulation = self._begin(node)
        chain = self._tree.chains and self._expander.writer_of(name) not in (None, "reviewer")
        if chain:
            plan = self._expander.backtrack_chain(node, name)
        else:
            plan = self._expander.single(node, name, backtrack=True)
        node.waiting -= 1  # it was counted when it was put in the queue
        job = self._job("chain" if chain else "single", node, simulation, plan)
        self._tree.counts["backtracks"] += 1
        if not plan.parts:
            self._apply_single(job, ())

    def _judge(self, node: Node, simulation: _Simulation) -> None:
        """Back up the verdict of a whole chain; ask for it where there is none yet.

        No other simulation comes here meanwhile: none goes to a node that waits, and no completion is applied.
        """
        if node.verdict is not None:
            self._end(simulation, node.verdict)
            return
        job = _Job(self._numbered, "verdict", node, [simulation])
        node.waiting += 1
        self._ask(job, Judge(job.number, "".join(step.text for step in node.path())))
        self._tree.refresh(node)

    def _job(
        self, kind: Literal["children", "single", "chain"], node: Node, simulation: _Simulation, plan: Plan
    ) -> _Job:
        """A job for a plan, which is asked for where a model has to be."""
        node.waiting += 1
        job = _Job(self._numbered, kind, node, [simulation], plan)
        if plan.parts:
            self._ask(job, Ask(job.number, tuple(part.call for part in plan.parts)))
            self._calls += len(plan.parts)
            simulation.asked = True
            self._tree.refresh(node)
        return job

    def _ask(self, job: _Job, request: Request) -> None:
        self._numbered += 1
        (self._verdicts if isinstance(request, Judge) else self._jobs).append(job)
        self._requests.append(request)

    def _take_requests(self) -> list[Request]:
        found, self._requests = self._requests, []
        return found

    # --- applying answers ---

    def _apply(self, job: _Job, answer: Sequence[Drawn] | Verdict) -> None:
        if isinstance(answer, Verdict):
            self._apply_verdict(job, answer)
            return
        self._tokens += sum(len(drawn.token_ids) for drawn in answer)
        if job.kind == "children":
            self._apply_children(job, answer)
            for simulation in job.simulations:
                self._continue(simulation)
        elif job.kind == "single":
            self._apply_single(job, answer)
        else:
            self._apply_chain(job, answer[0])

    def _returned(self, job: _Job) -> None:
        job.node.waiting -= 1
        self._tree.refresh(job.node)

    def _apply_children(self, job: _Job, answer: Sequence[Drawn]) -> None:
        node = job.node
        node.expanding, node.expanded = False, True
        del self._expansions[node]
        found = [*job.plan.fixed, *map(self._expander.read_node, job.plan.parts, answer)]
        for new in found:
            child = self._tree.add(node, new)
            self._tree.refresh(child)
            if self._ends(child):  # seen without a simulation of its own
                self._tree.back_up(child, 0.0)
        self._returned(job)

    def _apply_single(self, job: _Job, answer: Sequence[Drawn]) -> None:
        [simulation] = job.simulations
        for new in [*job.plan.fixed, *map(self._expander.read_node, job.plan.parts, answer)]:
            child = self._tree.add(job.node, new)
            simulation.enter(child)
            self._tree.refresh(child)
        self._returned(job)
        if simulation.node is job.node:  # there was no room for it
            self._leave(simulation)
        elif self._ends(simulation.node):
            self._back_up(simulation, 0.0)
        else:
            self._continue(simulation)

    def _apply_chain(self, job: _Job, drawn: Drawn) -> None:
        [simulation], [part] = job.simulations, job.plan.parts
        handed_over: str | None = None
        for piece in self._expander.read_chain(job.node, part, drawn):
            node = simulation.node
            if node is not job.node:  # one draw from every node that the chain goes through
                node.asked += 1
            if piece.handover:
                handed_over = piece.node.type
                break
            simulation.enter(self._tree.add(node, piece.node))
        for node in reversed(simulation.path[simulation.path.index(job.node) + 1 :]):
            self._tree.refresh(node)
        self._returned(job)
        if handed_over is not None:
            self._hand_over(simulation.node, handed_over, simulation)
        elif self._ends(simulation.node):
            self._back_up(simulation, 0.0)
        elif simulation.node is job.node or not simulation.node.terminal:
            self._leave(simulation)
        else:
            self._continue(simulation)

    def _apply_verdict(self, job: _Job, verdict: Verdict) -> None:
        node, [simulation] = job.node, job.simulations
        node.verdict, node.scored_tokens = verdict, self._tokens
        if verdict.outcome in ("ok", "wrong"):
            node.scored, self._scored = self._scored, self._scored + 1
        else:
            self._tree.counts[f"verifier_{verdict.outcome}"] += 1
        if verdict.outcome == "ok" and verdict.reward > 0:
            self._correct += 1
        elif verdict.outcome in ("ok", "wrong") and self._config.backtracking:
            self._plan_backtrack(node)
        self._returned(job)
        self._end(simulation, verdict)

    def _plan_backtrack(self, answer: Node) -> None:
        """Queue one child, of the type that the table names, for the nearest ancestor that has any such row."""
        for node in answer.upwards():
            row = self._pattern.after_wrong.get(node.type)
            if node is answer or row is None:
                continue
            name = next((name for name, most in row.items() if node.backtracks[name] < most), None)
            if name is not None and self._tree.fits(node, name):
                node.backtracks[name] += 1
                node.waiting += 1
                self._backtracks.append((node, name))
                self._tree.refresh(node)
            return

    def _end(self, simulation: _Simulation, verdict: Verdict) -> None:
        if verdict.outcome in ("ok", "wrong"):
            self._back_up(simulation, verdict.reward)
        else:  # masked: an answer that could not be judged says nothing of the chain
            self._leave(simulation)

    def _is_stopped(self) -> bool:
        """Whether nothing more may be asked of a writer. Once true it stays true."""
        stop = self._config.stop
        if self._stop is None:
            if any(self._correct >= rule.count and self._finished >= rule.after for rule in stop.correct):
                self._stop = "correct"
            elif stop.answers is not None and self._scored >= stop.answers:
                self._stop = "answers"
            elif stop.tokens is not None and self._tokens >= stop.tokens:
                self._stop = "tokens"
        return self._stop is not None
