"""A tree while it grows: nodes, their counts, and the status that says where a simulation may still go.

One thread uses it, without locks. Backing up costs O(depth).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from rlsys.config.patterns import Pattern
from rlsys.config.search import START
from rlsys.trees import Defect, ThoughtNode, Writer
from rlsys.types import FinishReason, Verdict, VersionSpan


class Status(IntEnum):
    """Availability of a node and of the nodes below it: now, after answers that are under way, or never again."""

    OPEN = 0
    BLOCKED = 1
    EXHAUSTED = 2


@dataclass(slots=True, kw_only=True)
class NewNode:
    """A node that was read from a completion and is not in the tree yet.

    Attributes:
        logprobs: log-probabilities of the generated tokens, in nats; forced tokens have none.
    """

    type: str
    text: str
    token_ids: Sequence[int]
    forced: int
    logprobs: Sequence[float]
    spill: str
    writer: Writer
    finish_reason: FinishReason | None
    versions: tuple[VersionSpan, ...]
    defect: Defect | None
    backtrack: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """A node of the growing tree; it becomes a `rlsys.trees.ThoughtNode`.

    Attributes:
        tried: simulations through the node that the search broke off or that could not be judged. They do not change
            its value.
        logprob: sum of the log-probabilities of the tokens that the model chose, in nats.
        drawn: number of these tokens.
        draws: chains that were drawn from this node so far (chain expansion).
        in_flight: running simulations that have passed the node.
        waiting: requests under way for this node, and backtracking children that are not requested yet.
        expanding: whether its children are requested (node expansion).
        expanded: whether its children are known (node expansion).
        full: whether the context has no room for a child.
        backtracks: backtracking children that it has or will get, by type.
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
    writer: Writer = "policy"
    finish_reason: FinishReason | None = None
    versions: tuple[VersionSpan, ...] = ()
    defect: Defect | None = None
    backtrack: bool = False
    terminal: bool = False
    samples: int = 1
    visits: int = 0
    total: float = 0.0
    tried: int = 0
    verdict: Verdict | None = None
    scored: int = -1
    scored_tokens: int = 0
    logprob: float = 0.0
    drawn: int = 0
    draws: int = 0
    in_flight: int = 0
    waiting: int = 0
    expanding: bool = False
    expanded: bool = False
    full: bool = False
    status: Status = Status.OPEN
    children: list[Node] = field(default_factory=list)
    by_ids: dict[tuple[str, tuple[int, ...], tuple[VersionSpan, ...]], Node] = field(default_factory=dict)
    backtracks: Counter[str] = field(default_factory=Counter)

    def path(self) -> list[Node]:
        """Return the nodes from the first one below the prompt to this one."""
        nodes, node = deque[Node](), self
        while node.parent is not None:
            nodes.appendleft(node)
            node = node.parent
        return list(nodes)

    def upwards(self) -> Iterator[Node]:
        """Yield this node and its ancestors, up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def freeze(self) -> ThoughtNode:
        """Return the finished node."""
        logprobs = np.zeros(len(self.token_ids), dtype=np.float32)
        logprobs[self.forced :] = self.logprobs
        return ThoughtNode(
            parent=self.parent.number if self.parent else -1,
            type=self.type,
            text=self.text,
            token_ids=np.asarray(self.token_ids, dtype=np.int32),
            forced=self.forced,
            logprobs=logprobs,
            spill=self.spill,
            writer=self.writer,
            finish_reason=self.finish_reason,
            versions=self.versions,
            defect=self.defect,
            backtrack=self.backtrack,
            samples=self.samples,
            visits=self.visits,
            total=self.total,
            verdict=self.verdict,
            scored=self.scored,
            scored_tokens=self.scored_tokens,
        )


class GrowingTree:
    """The nodes of a tree, and the children that the pattern allows each of them.

    Args:
        chains: whether chains are drawn one by one (chain expansion). A node that was drawn s times may then have s
            times the children of its table row, as s separate siblings would.
        max_depth: nodes of the longest chain; None for no limit.
    """

    def __init__(self, pattern: Pattern, *, chains: bool, max_depth: int | None) -> None:
        self.pattern = pattern
        self.chains = chains
        self.max_depth = max_depth
        self._shortest = _shortest(pattern)
        self._allowed: dict[tuple[str, int], dict[str, int]] = {}
        self.root = Node(0, None, 0, START)
        self.nodes = [self.root]
        self.counts: Counter[str] = Counter()
        self.refresh(self.root)

    def add(self, parent: Node, new: NewNode) -> Node:
        """Add a node below its parent, or count one more draw of a sibling with equal tokens and weight versions."""
        key = (new.type, tuple(new.token_ids), new.versions)
        same = parent.by_ids.get(key)
        if same is not None:
            same.samples += 1
            self.counts["duplicates"] += 1
            return same
        node = Node(
            len(self.nodes),
            parent,
            parent.depth + 1,
            new.type,
            text=new.text,
            token_ids=key[1],
            forced=new.forced,
            logprobs=new.logprobs,
            spill=new.spill,
            writer=new.writer,
            finish_reason=new.finish_reason,
            versions=new.versions,
            defect=new.defect,
            backtrack=new.backtrack,
            terminal=new.type in self.pattern.types and self.pattern.types[new.type].terminal,
            logprob=float(sum(new.logprobs)),
            drawn=len(new.logprobs),
        )
        self.nodes.append(node)
        parent.children.append(node)
        parent.by_ids[key] = node
        if new.defect:
            self.counts[new.defect] += 1
        return node

    def allowed(self, node: Node) -> Mapping[str, int]:
        """Return the types that may follow a node, with their numbers.

        Near the depth limit only types that can still lead to an answer are allowed.
        """
        if node.defect or node.terminal:
            return {}
        key = node.type, node.depth
        allowed = self._allowed.get(key)
        if allowed is None:
            row = self.pattern.children.get(node.type, {})
            allowed = self._allowed[key] = {name: count for name, count in row.items() if self.fits(node, name)}
        return allowed

    def fits(self, node: Node, name: str) -> bool:
        """Return whether a chain that continues with a type can reach an answer within the depth limit."""
        return self.max_depth is None or node.depth + self._shortest[name] <= self.max_depth

    def has_capacity(self, node: Node) -> bool:
        """Return whether more children of a node may be requested."""
        if node.full:
            return False
        if self.chains:
            return node.draws < sum(self.allowed(node).values()) * node.samples
        return not (node.expanded or node.expanding) and bool(self.allowed(node))

    def back_up(self, node: Node, reward: float) -> None:
        """Add the reward of a chain to the node where it ended and to all its ancestors."""
        for above in node.upwards():
            above.visits += 1
            above.total += reward

    def refresh(self, node: Node) -> None:
        """Update the status of a node and of its ancestors."""
        for above in node.upwards():
            status = self._status(above)
            if status == above.status and above is not node:
                return
            above.status = status

    def _status(self, node: Node) -> Status:
        if node.terminal and not node.defect:
            if node.verdict is not None:
                return Status.EXHAUSTED
            return Status.BLOCKED if node.waiting else Status.OPEN
        if node.expanding or self.has_capacity(node):  # several simulations may wait for the same expansion
            return Status.OPEN
        best = min((child.status for child in node.children), default=Status.EXHAUSTED)
        return min(best, Status.BLOCKED) if node.waiting else best


def _shortest(pattern: Pattern) -> dict[str, int]:
    """Return, by type, the number of nodes of the shortest chain that begins with it and ends with an answer."""
    lengths = {name: 1 for name, node_type in pattern.types.items() if node_type.terminal}
    length = 1
    while length in lengths.values():
        nearer, length = [name for name in lengths if lengths[name] == length], length + 1
        for name, row in pattern.children.items():
            if name not in lengths and any(child in nearer for child in row):
                lengths[name] = length
    return lengths
