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

from actors.engine import Completion
from actors.rollouts.seeds import sample_seed
from actors.search.backtracking import Backtracking
from actors.search.endings import Endings
from actors.search.expansion import Expander, Plan
from actors.search.frontier import frontier
from actors.search.growth import Growth
from actors.search.jobs import Answer, Job, JobQueue
from actors.search.places import ChainPlaces, chain_places, growing_tree
from actors.search.reading import CompletionReader
from actors.search.requesting import Requesting
from actors.search.requests import Request, SearchModel, Values
from actors.search.selection import choose
from actors.search.simulations import Simulation, Simulations
from actors.search.snapshot import finished_tree
from actors.search.stopping import StopRule
from actors.search.tree import Node, Status
from actors.search.turns import SearchedEnvironment, Turns
from actors.search.values.agreement import agreement
from actors.search.values.valuation import valuation
from rlsys.config.patterns import Pattern
from rlsys.config.search import SearchConfig
from rlsys.interfaces import Reply
from rlsys.trees import Role, Tree
from rlsys.types import Prompt, Verdict


class TreeSearch:
    """The search of one prompt.

    Args:
        models: Models by role: "policy" or "model", which proposes the nodes, and "reviewer" if there is one.
        max_chain_tokens: Longest chain, in tokens of the model that continues it, without replies of an environment.
        seed: run.seed. It decides all random draws, together with the prompt's id.
        environment: Answers the turns of the policy; None without one.
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
        environment: SearchedEnvironment | None = None,
    ) -> None:
        self.prompt = prompt
        self._config, self._models = config, models
        self._rng = random.Random(sample_seed(seed, prompt.prompt_id, "search"))
        self._tree = growing_tree(pattern, config)
        self._expander = Expander(
            self._tree,
            config,
            models,
            self._rng,
            tree_seed=(seed, prompt.prompt_id),
            max_chain_tokens=max_chain_tokens,
            turn_stop=environment.config.stop if environment else (),
        )
        self._turns = Turns(self._tree, environment, models["policy"], max_chain_tokens) if environment else None
        self._queue = JobQueue()
        self._jobs = Requesting(self._tree, self._queue)
        self._backtracking = Backtracking(self._tree, config)
        self._stop = StopRule(config.stop)
        self._simulations = Simulations(self._tree, self._stop, agreement(self._tree, config.value))
        self._places = chain_places(self._tree, self._expander, config.selection)
        reader = CompletionReader(self._tree, config, models)
        values = valuation(self._tree, self._expander, config.value)
        self._growth = Growth(self._tree, reader, self._places, values)
        self._endings = Endings(
            self._tree, self._jobs, self._simulations, self._stop, self._backtracking, models, self._turns
        )
        self._frontier = frontier(self._tree, config.selection, self._rng)
        self._expansions: dict[Node, Job] = {}

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
        return finished_tree(self.prompt, self._tree, self._models, self._stop, self._jobs.calls)

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
            job = self._jobs.expand("chain", node, self._simulations.begin(node), plan)
            if not plan.calls:
                self._receive(job, ())
        return planned is not None

    def _continue(self, simulation: Simulation) -> None:
        """Move a simulation down until it requests something, waits for an expansion, or ends."""
        while True:
            node = simulation.node
            if node.terminal and not node.defect:
                self._endings.judge(node, simulation)
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
        if self._tree.ends_turn(node.type):
            self._jobs.ask("reply", node, simulation)
            return True
        if self._tree.chains:
            plan = self._expander.chain(node)
            node.drawn_chains += 1
            node.full = not plan.calls  # the room for a child never grows
            job = self._jobs.expand("chain", node, simulation, plan)
        else:
            plan = self._expander.children(node)
            node.expanding = True
            job = self._expansions[node] = self._jobs.expand("children", node, simulation, plan)
        if plan.calls or not self._read(job, ()):
            return True
        if job.kind == "children":
            self._add_children(job)
        else:
            self._jobs.close(job)
        return False

    def _request_review(self, node: Node, name: str, simulation: Simulation) -> None:
        """Request the next node of a chain, of type `name`, from the reviewer."""
        plan = Plan() if self._stop.is_reached() else self._expander.single(node, name, backtrack=False)
        job = self._jobs.expand("single", node, simulation, plan)
        if not plan.calls:
            self._receive(job, ())

    def _backtrack(self, node: Node, name: str) -> None:
        """Begin a simulation at an ancestor of a wrong answer and request its backtracking child of type `name`."""
        simulation = self._simulations.begin(node)
        kind, plan = self._expander.backtrack(node, name)
        job = self._jobs.expand(kind, node, simulation, plan)
        if not plan.calls:
            self._receive(job, ())

    def _apply(self, job: Job, answer: Answer) -> None:
        if job.kind == "reply" and self._turns and isinstance(answer, Reply | Verdict):
            child = self._turns.take(job.node, answer)
            self._jobs.close(job)
            self._go_on_after_reply(job, child)
        elif isinstance(answer, Verdict):
            self._endings.take_verdict(job, answer)
        elif isinstance(answer, Values):
            self._stop.tokens += answer.tokens
            self._growth.value(job, answer)
            self._add(job)
        elif not isinstance(answer, Reply):
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
            self._jobs.ask_values(job)
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
        self._jobs.close(job)
        if reviewed_type is not None:
            self._request_review(simulation.node, reviewed_type, simulation)
        else:
            self._go_on(job, simulation)

    def _go_on(self, job: Job, simulation: Simulation) -> None:
        """Continue a simulation with the node that a job has brought, or end it there."""
        node = simulation.node
        is_end = node.terminal or self._tree.ends_turn(node.type)
        if self._endings.has_failed(node):
            self._endings.fail(node, simulation)
        elif job.kind == "reply" or (node is not job.node and (job.kind == "single" or is_end)):
            self._continue(simulation)
        else:
            self._simulations.leave(simulation)

    def _go_on_after_reply(self, job: Job, child: Node | None) -> None:
        """Continue the simulation at a turn that was answered with the node of the reply, if there is one."""
        if not job.simulations:
            self._endings.fail(job.node, None)
            return
        [simulation] = job.simulations
        if child is not None:
            simulation.enter(child)
            self._tree.refresh(child)
        self._go_on(job, simulation)

    def _add_children(self, job: Job) -> None:
        del self._expansions[job.node]
        children = self._growth.add_children(job)
        self._jobs.close(job)
        self._endings.fail_children(children)
