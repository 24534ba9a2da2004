"""A tree under construction: its nodes, their counts, and their status for simulations.

One thread uses a tree, so there are no locks. Backing up a reward costs O(depth).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from rlsys.config.patterns import Pattern
from rlsys.config.search import START
from rlsys.interfaces import Reply
from rlsys.trees import ENVIRONMENT, Defect, Role
from rlsys.types import FinishReason, Verdict, VersionSpan


class Status(IntEnum):
    """Status of a node for a simulation that enters it.

    Attributes:
        OPEN: The simulation can request something at or below the node.
        BLOCKED: The simulation must wait for open requests.
        EXHAUSTED: Nothing at or below the node is left to request.
    """

    OPEN = 0
    BLOCKED = 1
    EXHAUSTED = 2


@dataclass(slots=True, kw_only=True)
class NewNode:
    """A node that was read from a completion and is not in the tree yet.

    Attributes:
        logprobs: Log-probabilities of the generated tokens only. The other fields are those of
            `rlsys.trees.ThoughtNode`.
    """

    type: str
    text: str
    token_ids: Sequence[int]
    forced: int
    logprobs: Sequence[float]
    spill: str
    writer: Role
    finish_reason: FinishReason | None
    versions: tuple[VersionSpan, ...]
    defect: Defect | None
    backtrack: bool = False
    estimate: float | None = None

    @property
    def key(self) -> tuple[str, tuple[int, ...], tuple[VersionSpan, ...]]:
        """Identity of the node among the children of a parent."""
        return self.type, tuple(self.token_ids), self.versions


@dataclass(slots=True, eq=False)
class Node:
    """A node of a growing tree. Fields that are missing here are those of `rlsys.trees.ThoughtNode`.

    Attributes:
        number: -1 for a draft, which is not in the tree.
        terminal: Whether the type of the node ends a chain, or the environment has ended it there.
        reply: Reply of the environment to the turn that ends here.
        unrewarded: Number of simulations through the node that ended without a reward. They leave the mean reward
            unchanged.
        logprob: Sum of the log-probabilities of the tokens that a model chose, in nats.
        chosen_tokens: Number of the tokens that a model chose.
        drawn_chains: Number of chains drawn from this node so far (chain expansion).
        in_flight: Number of unfinished simulations through the node.
        waiting: Number of open expansions and verdicts of the node, and of its queued backtracking children.
        expanding: Whether its children have been requested and have not arrived (node expansion).
        expanded: Whether its children have arrived (node expansion), or the reply to its turn was requested.
        full: Whether the context leaves no room for a child.
        children_by_ids: Children by type, tokens and weight versions.
        backtracks: Number of backtracking children, queued ones included, by type.
    """

    number: int
    parent: Node | None
    depth: int
    type: str
    text: str = ""
    token_ids: Sequence[int] = ()
    forced: int = 0
    logprobs: Sequence[float] = ()
    spill: str = ""
    writer: Role = "policy"
    finish_reason: FinishReason | None = None
    versions: tuple[VersionSpan, ...] = ()
    defect: Defect | None = None
    backtrack: bool = False
    terminal: bool = False
    samples: int = 1
    visits: int = 0
    total: float = 0.0
    unrewarded: int = 0
    estimate: float | None = None
    reply: Reply | None = None
    verdict: Verdict | None = None
    scored: int = -1
    scored_tokens: int = 0
    logprob: float = 0.0
    chosen_tokens: int = 0
    drawn_chains: int = 0
    in_flight: int = 0
    waiting: int = 0
    expanding: bool = False
    expanded: bool = False
    full: bool = False
    status: Status = Status.OPEN
    children: list[Node] = field(default_factory=list)
    children_by_ids: dict[tuple[str, tuple[int, ...], tuple[VersionSpan, ...]], Node] = field(default_factory=dict)
    backtracks: Counter[str] = field(default_factory=Counter)

    def path(self) -> list[Node]:
        """Return the nodes from the first one below the prompt to this one."""
        nodes, node = deque[Node](), self
        while node.parent is not None:
            nodes.appendleft(node)
            node = node.parent
        return list(nodes)

    def upwards(self) -> Iterator[Node]:
        """Yield this node and all its ancestors."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class GrowingTree:
    """The nodes of a tree, and the children that the pattern allows for each of them.

    Args:
        chains: Whether the search uses chain expansion, which draws chains one by one. A node that was drawn s times
            stands for s siblings, so it may have s times the children in its row of the table.
        max_depth: Largest number of nodes in a chain; None for no limit.
        by_rows: Whether the rows of the table limit the chains that are drawn after a reply; no limit for a search that
            goes down no path.

    Attributes:
        changed: Nodes whose status or record has changed, for a frontier, which empties it.
        deepest: Depth of the deepest node.
    """

    def __init__(self, pattern: Pattern, *, chains: bool, max_depth: int | None, by_rows: bool = True) -> None:
        self.pattern = pattern
        self.chains = chains
        self.max_depth = max_depth
        self._by_rows = by_rows
        self._chain_lengths = _shortest_chains(pattern)
        self._allowed: dict[tuple[str, int], dict[str, int]] = {}
        self._widths: dict[tuple[str, int], int] = {}  # sums of the entries of `_allowed`
        self.root = Node(0, None, 0, START)
        self.nodes = [self.root]
        self.counts: Counter[str] = Counter()
        self.changed: dict[Node, None] = {}
        self.deepest = 0
        self.refresh(self.root)

    def add(self, parent: Node, new: NewNode) -> Node:
        """Add a node, or count one more sample of the sibling with the same type, tokens and versions.

        Returns:
            The added node or the sibling.
        """
        duplicate = parent.children_by_ids.get(new.key)
        if duplicate is not None:
            duplicate.samples += 1
            self.counts["duplicates"] += 1
            return duplicate
        node = self.draft(parent, new)
        node.number = len(self.nodes)
        self.nodes.append(node)
        self.changed[node] = None
        self.deepest = max(self.deepest, node.depth)
        parent.children.append(node)
        parent.children_by_ids[new.key] = node
        if new.defect:
            self.counts[new.defect] += 1
        return node

    def draft(self, parent: Node, new: NewNode) -> Node:
        """Return a node with number -1 that knows its parent, and that the parent and the tree do not know."""
        return Node(
            -1,
            parent,
            parent.depth + 1,
            new.type,
            text=new.text,
            token_ids=tuple(new.token_ids),
            forced=new.forced,
            logprobs=new.logprobs,
            spill=new.spill,
            writer=new.writer,
            finish_reason=new.finish_reason,
            versions=new.versions,
            defect=new.defect,
            backtrack=new.backtrack,
            terminal=self.is_terminal(new),
            estimate=new.estimate,
            logprob=float(sum(new.logprobs)),
            chosen_tokens=len(new.logprobs),
        )

    def is_terminal(self, new: NewNode) -> bool:
        """Return whether the type of a node ends a chain."""
        return new.type in self.pattern.types and self.pattern.types[new.type].terminal

    def ends_turn(self, name: str) -> bool:
        """Return whether the environment answers after nodes of a type."""
        return ENVIRONMENT in self.pattern.children.get(name, {})

    def allowed(self, node: Node) -> Mapping[str, int]:
        """Return the number of children that a node may have, by type.

        Only types from which a chain can still reach an answer within the depth limit are included.
        """
        if node.defect or node.terminal:
            return {}
        key = node.type, node.depth
        if key not in self._allowed:
            row = self.pattern.children.get(node.type, {})
            self._allowed[key] = {name: count for name, count in row.items() if self.fits(node, name)}
        return self._allowed[key]

    def fits(self, node: Node, name: str) -> bool:
        """Return whether a chain that goes on with type `name` can still reach an answer within the depth limit."""
        return self.max_depth is None or node.depth + self._chain_lengths[name] <= self.max_depth

    def has_capacity(self, node: Node) -> bool:
        """Return whether more children of a node may be requested."""
        if node.full or node.defect or node.terminal:
            return False
        if self.chains and not self.ends_turn(node.type):
            key = node.type, node.depth
            if key not in self._widths:
                self._widths[key] = sum(self.allowed(node).values())
            return node.drawn_chains < self._widths[key] * self._draws(node)
        return not (node.expanded or node.expanding) and bool(self.allowed(node))

    def _draws(self, node: Node) -> float:
        """Return the number of siblings that a node stands for. A reply stands for as many as its turn."""
        if node.type != ENVIRONMENT or node.parent is None:
            return node.samples
        return node.parent.samples if self._by_rows else math.inf

    def back_up(self, node: Node, reward: float) -> None:
        """Add the reward of a chain that ended at a node to the node and all its ancestors."""
        for above in node.upwards():
            above.visits += 1
            above.total += reward
            self.changed[above] = None

    def refresh(self, node: Node) -> None:
        """Update the status of a node and of its ancestors."""
        for above in node.upwards():
            status = self._status(above)
            self.changed[above] = None
            if status == above.status and above is not node:
                return
            above.status = status

    def _status(self, node: Node) -> Status:
        if node.terminal and not node.defect:
            if node.verdict is not None:
                return Status.EXHAUSTED
            return Status.BLOCKED if node.waiting else Status.OPEN
        if node.expanding or self.has_capacity(node):  # several simulations may wait for one expansion
            return Status.OPEN
        best = min((child.status for child in node.children), default=Status.EXHAUSTED)
        return min(best, Status.BLOCKED) if node.waiting else best


def _shortest_chains(pattern: Pattern) -> dict[str, int]:
    """Return the number of nodes of the shortest chain from each type to an answer, both included."""
    lengths = dict.fromkeys(pattern.ends, 1)
    length = 1
    while length in lengths.values():
        newest, length = [name for name in lengths if lengths[name] == length], length + 1
        for name, row in pattern.children.items():
            if name not in lengths and any(child in newest for child in row):
                lengths[name] = length
    return lengths
