"""A tree while it grows: nodes, their counts, and which of them a simulation may still go to.

One thread, no locks. Backing up costs O(depth).
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
    """Whether a simulation can get anywhere at or below a node: now; once what is under way is back; never again."""

    OPEN = 0
    BLOCKED = 1
    EXHAUSTED = 2


@dataclass(slots=True, kw_only=True)
class NewNode:
    """A node as it was read, before the tree has it. logprobs: of the generated tokens only."""

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
    """A node of the growing tree; see `rlsys.trees.ThoughtNode` for what it becomes.

    tried: simulations through it that the search broke off or that could not be judged: they say nothing of its value.
    logprob, drawn: sum over, and number of, the tokens that the writer chose.
    asked: draws from this node so far (chain expansion). in_flight: simulations under way through it.
    waiting: calls and verdicts under way that belong to it, and backtracking children that are still to be asked for.
    expanding, expanded: its children are being asked for, or have been (node expansion).
    full: the context leaves no room for a child.
    backtracks: how many backtracking children it was given, or is to get, by type.
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
    asked: int = 0
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
        """From the first node below the prompt to this one."""
        found, node = deque[Node](), self
        while node.parent is not None:
            found.appendleft(node)
            node = node.parent
        return list(found)

    def upwards(self) -> Iterator[Node]:
        """This node and all above it."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def freeze(self) -> ThoughtNode:
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
    """The nodes, and what the pattern allows below each of them.

    Args:
        chains: chain expansion: draws are asked for one by one, and a node that was drawn s times may have s times
            the children of its table row, as s separate siblings would.
        max_depth: nodes of the longest chain, None for no limit.
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
        """Put a node under its parent, or count one more draw of a sibling with the very same tokens and versions."""
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
        """Types that may follow a node and how many of each; near the depth limit only those that lead to an answer."""
        if node.defect or node.terminal:
            return {}
        place = node.type, node.depth
        found = self._allowed.get(place)
        if found is None:
            row = self.pattern.children.get(node.type, {})
            found = self._allowed[place] = {name: count for name, count in row.items() if self.fits(node, name)}
        return found

    def fits(self, node: Node, name: str) -> bool:
        """Whether a chain that goes on with a type can come to an answer within the depth limit."""
        return self.max_depth is None or node.depth + self._shortest[name] <= self.max_depth

    def has_capacity(self, node: Node) -> bool:
        """Whether more children may be asked of a node."""
        if node.full:
            return False
        if self.chains:
            return node.asked < sum(self.allowed(node).values()) * node.samples
        return not (node.expanded or node.expanding) and bool(self.allowed(node))

    def back_up(self, node: Node, reward: float) -> None:
        """Count a chain that ended at a node, there and at all above it."""
        for above in node.upwards():
            above.visits += 1
            above.total += reward

    def refresh(self, node: Node) -> None:
        """Bring the status of a node and of those above it up to date."""
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
        if node.expanding or self.has_capacity(node):  # simulations may wait for one and the same expansion
            return Status.OPEN
        best = min((child.status for child in node.children), default=Status.EXHAUSTED)
        return min(best, Status.BLOCKED) if node.waiting else best


def _shortest(pattern: Pattern) -> dict[str, int]:
    """Nodes of the shortest chain that begins with a type and ends with an answer."""
    found = {name: 1 for name, node_type in pattern.types.items() if node_type.terminal}
    length = 1
    while length in found.values():
        before, length = [name for name in found if found[name] == length], length + 1
        for name, row in pattern.children.items():
            if name not in found and any(child in before for child in row):
                found[name] = length
    return found
