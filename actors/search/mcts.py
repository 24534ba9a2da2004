"""Monte Carlo tree search over thought nodes for one prompt, as a state machine without input or output.

A simulation starts at the prompt, or at a node of the frontier, and goes down to a node that may have more children. It
requests children there and enters one of them. It ends at an answer or at a node that nothing can follow. An answer is
judged once, and its reward is backed up in every simulation that ends there. Up to `parallel_simulations` run at once;
an unfinished one counts as in flight at all nodes of its path (WU-UCT).

The tree depends only on the seed and the answers: `JobQueue` fixes the order in which answers are applied.
Sources: Marco-o1 v2, arXiv:2503.01461, sec. 3; Liu et al., WU-UCT, ICLR 2020.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from actors.engine import Completion
from actors.rollouts.seeds import sample_seed
from actors.search.backtracking import Backtracking
from actors.search.expansion import Expander, Plan
from actors.search.frontier import frontier
from actors.search.growth import Growth
from actors.search.jobs import Answer, Job, JobQueue
from actors.search.places import ChainPlaces, chain_places
from actors.search.reading import CompletionReader
from actors.search.requests import Request, SearchModel, Values, proposing_role
from actors.search.selection import choose
from actors.search.simulations import Simulation, Simulations
from actors.search.snapshot import finished_tree
from actors.search.stopping import StopRule, is_correct, thinking_of
from actors.search.tree import GrowingTree, Node, Status
from actors.search.values.agreement import agreement
from actors.search.values.valuation import valuation
from rlsys.config.patterns import Pattern
from rlsys.config.search import SearchConfig
from rlsys.trees import Role, Tree
from rlsys.types import Prompt, Verdict


class TreeSearch:
    """The search of one prompt.

    Args:
        models: Models by role: "policy" or "model", which proposes the nodes, and "reviewer" if there is one.
        max_chain_tokens: Longest chain, in tokens of the model that continues it.
        seed: run.seed. It decides all random draws, together with the prompt's id.
    """

    def __init__(
        self,
        prompt: Prompt,
        pattern: Pattern,
        config: SearchConfig,
        models: Mapping[Role, SearchModel],
        *,
        max_chain_tokens: int,
        seed: int,
    ) -> None:
        self.prompt = prompt
        self._config, self._models = config, models
        self._rng = random.Random(sample_seed(seed, prompt.prompt_id, "search"))
        self._tree = GrowingTree(pattern, chains=config.expansion == "chain", max_depth=config.max_depth)
        self._expander = Expander(
            self._tree,
            config,
            models,
            self._rng,
            tree_seed=(seed, prompt.prompt_id),
            max_chain_tokens=max_chain_tokens,
        )
        self._queue = JobQueue()
        self._backtracking = Backtracking(self._tree, config)
        self._stop = StopRule(config.stop)
        self._simulations = Simulations(self._tree, self._stop, agreement(self._tree, config.value))
        self._places = chain_places(self._tree, self._expander, config.selection)
        self._growth = Growth(
            self._tree,
            CompletionReader(self._tree, config, models),
            self._places,
            valuation(self._tree, self._expander, config.value),
            proposing_role(models),
        )
        self._frontier = frontier(self._tree, config.selection, self._rng)
        self._expansions: dict[Node, Job] = {}
        self._calls = 0

    def start(self) -> list[Request]:
        """Return the first requests. There are none if no node fits after the prompt; the tree is finished then."""
        self._begin_simulations()
        return self._queue.take_requests()

    def deliver(self, number: int, answer: Answer) -> list[Request]:
        """Take the answer to a request, apply all answers whose turn it is, and return new requests."""
        self._queue.put_answer(number, answer)
        while answered := self._queue.take_answered():
            self._apply(*answered)
            self._begin_simulations()
        return self._queue.take_requests()

    @property
    def finished(self) -> bool:
        """True if no request is open."""
        return self._queue.is_empty

    def tree(self) -> Tree:
        """Return the finished tree."""
        return finished_tree(self.prompt, self._tree, self._models, self._stop, self._calls)

    def _begin_simulations(self) -> None:
        """Begin as many simulations as may run at once. Queued backtracking children come first."""
        while self._stop.may_begin() and self._simulations.running < self._config.parallel_simulations:
            if self._backtracking.queue:
                self._backtrack(*self._backtracking.take())
            elif self._places is not None:
                if not self._begin_at_place(self._places):
                    return
            elif self._tree.root.status is Status.OPEN:
                begun, node = self._stop.begun, self._frontier.best() if self._frontier else None
                self._continue(self._simulations.begin(node or self._tree.root))
                if self._stop.begun == begun:  # others block the new simulation
                    return
            else:
                return

    def _begin_at_place(self, places: ChainPlaces) -> bool:
        """Begin a simulation at the next place; return False if it must wait."""
        if planned := places.next_chain(self._simulations.running):
            node, plan = planned
            job = self._job("chain", node, self._simulations.begin(node), plan)
            if not plan.calls:
                self._receive(job, ())
        return planned is not None

    def _continue(self, simulation: Simulation) -> None:
        """Move a simulation down until it requests something, waits for an expansion, or ends."""
        while True:
            node = simulation.node
            if node.terminal and not node.defect:
                self._judge(node, simulation)
                return
            if node.expanding:
                self._expansions[node].simulations.append(simulation)
                return
            if self._tree.has_capacity(node):
                if self._stop.is_reached():
                    self._simulations.leave(simulation)
                    return
                if self._expand(node, simulation):
                    return
            children = [child for child in node.children if child.status is Status.OPEN]
            if not children:
                self._simulations.leave(simulation)
                return
            simulation.enter(children[choose(children, node, self._config.selection, self._rng)])

    def _expand(self, node: Node, simulation: Simulation) -> bool:
        """Request children of a node. Return False if no request was possible or necessary."""
        if self._tree.chains:
            plan = self._expander.chain(node)
            node.drawn_chains += 1
            node.full = not plan.calls  # the room for a child never grows
            job = self._job("chain", node, simulation, plan)
        else:
            plan = self._expander.children(node)
            node.expanding = True
            job = self._expansions[node] = self._job("children", node, simulation, plan)
        if plan.calls or not self._read(job, ()):
            return True
        if job.kind == "children":
            self._add_children(job)
        else:
            self._close(job)
        return False

    def _request_review(self, node: Node, name: str, simulation: Simulation) -> None:
        """Request the next node of a chain, of type `name`, from the reviewer."""
        plan = Plan() if self._stop.is_reached() else self._expander.single(node, name, backtrack=False)
        job = self._job("single", node, simulation, plan)
        if not plan.calls:
            self._receive(job, ())

    def _backtrack(self, node: Node, name: str) -> None:
        """Begin a simulation at an ancestor of a wrong answer and request its backtracking child of type `name`."""
        simulation = self._simulations.begin(node)
        is_chain = self._tree.chains and self._expander.role_of(name) not in (None, "reviewer")
        if is_chain:
            plan = self._expander.backtrack_chain(node, name)
        else:
            plan = self._expander.single(node, name, backtrack=True)
        job = self._job("chain" if is_chain else "single", node, simulation, plan)
        if not plan.calls:
            self._receive(job, ())

    def _judge(self, node: Node, simulation: Simulation) -> None:
        """Back up the verdict of a whole chain, or request the verdict if there is none yet.

        No other simulation arrives before the verdict: the node is blocked, and completions wait for open verdicts.
        """
        if node.verdict is not None:
            self._simulations.end(simulation, node.verdict)
            return
        node.waiting += 1
        self._queue.add(Job("verdict", node, [simulation]))
        self._tree.refresh(node)

    def _job(self, kind: Literal["children", "single", "chain"], node: Node, simulation: Simulation, plan: Plan) -> Job:
        """Return a job for a plan. Queue it if the plan has calls."""
        node.waiting += 1
        job = Job(kind, node, [simulation], plan)
        if plan.calls:
            self._queue.add(job)
            self._calls += len(plan.calls)
            simulation.has_requested = True
            self._tree.refresh(node)
        return job

    def _close(self, job: Job) -> None:
        job.node.waiting -= 1
        self._tree.refresh(job.node)

    def _apply(self, job: Job, answer: Answer) -> None:
        if isinstance(answer, Verdict):
            self._apply_verdict(job, answer)
        elif isinstance(answer, Values):
            self._stop.tokens += answer.tokens
            self._growth.value(job, answer)
            self._add(job)
        else:
            self._stop.tokens += sum(len(completion.token_ids) for completion in answer)
            self._receive(job, answer)

    def _receive(self, job: Job, completions: Sequence[Completion]) -> None:
        """Add the nodes of completions to the tree, or ask for their values first."""
        if self._read(job, completions):
            self._add(job)

    def _read(self, job: Job, completions: Sequence[Completion]) -> bool:
        """Read the nodes of completions, and return False if they must wait for their values."""
        self._growth.read(job, completions, asks=not self._stop.is_reached())
        if job.unvalued:
            self._queue.add_values(job)
            self._calls += sum(len(calls) for each in job.unvalued for calls in each.thoughts.rollouts)
            self._tree.refresh(job.node)
        return not job.unvalued

    def _add(self, job: Job) -> None:
        """Add the nodes that a job has brought, and continue its simulations."""
        if job.kind == "children":
            self._add_children(job)
            for simulation in job.simulations:
                self._continue(simulation)
            return
        [simulation], reviewed_type = job.simulations, None
        if job.kind == "chain":
            reviewed_type = self._growth.add_chain(job, simulation)
        else:
            self._growth.add_single(job, simulation)
        self._close(job)
        if reviewed_type is not None:
            self._request_review(simulation.node, reviewed_type, simulation)
        elif self._growth.has_failed(simulation.node):
            self._simulations.back_up(simulation, 0.0)
        elif simulation.node is job.node or (job.kind == "chain" and not simulation.node.terminal):
            self._simulations.leave(simulation)
        else:
            self._continue(simulation)

    def _add_children(self, job: Job) -> None:
        del self._expansions[job.node]
        self._growth.add_children(job)
        self._close(job)

    def _apply_verdict(self, job: Job, verdict: Verdict) -> None:
        node, [simulation] = job.node, job.simulations
        node.verdict, node.scored_tokens = verdict, self._stop.tokens
        is_scored = verdict.outcome in ("ok", "wrong")
        if is_scored:
            node.scored = self._stop.scored
        else:
            self._tree.counts[f"verifier_{verdict.outcome}"] += 1
        self._stop.count(verdict, thinking_of(node, self._tree.pattern))
        self._close(job)
        self._simulations.end(simulation, verdict)
        if is_scored and not is_correct(verdict) and self._config.backtracking:
            self._backtracking.plan(node)
