"""Turn a node into calls for its children, and completions into nodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.rollouts.single_turn import sample_seed
from actors.search.requests import Call, Drawn, SearchWriter
from actors.search.tree import GrowingTree, NewNode, Node
from rlsys.config.patterns import Pattern
from rlsys.config.search import SearchConfig
from rlsys.search.codec import Reading, Stop
from rlsys.search.paths import node_ids
from rlsys.trees import TEXT, Defect, Writer
from rlsys.types import VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call and how its completion is read.

    Attributes:
        type: type of the requested node; None if the model may continue the chain freely.
        forced: tokens placed before the completion.
        before: the part of their text that the token ahead of them already holds.
        own_limit: whether the call ends at the length limit of its node type, before chain or context are full.
    """

    type: str | None
    writer: Writer
    forced: list[int]
    before: str
    backtrack: bool
    own_limit: bool
    call: Call


@dataclass(slots=True)
class Plan:
    """The calls of an expansion, and its nodes that need no model."""

    parts: list[Part] = field(default_factory=list)
    fixed: list[NewNode] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ChainPiece:
    """A node read from a chain.

    Attributes:
        for_reviewer: whether the node is discarded because the reviewer has to write a node of this type.
    """

    node: NewNode
    for_reviewer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A node within a chain, as far as its defects depend on it.

    Attributes:
        given: whether the search asked for this type, so that the table need not allow it.
        stopped: whether the model ended the completion itself.
        forced: forced tokens at the beginning of the chain.
    """

    reading: Reading
    type: str
    parent_type: str
    depth: int
    given: bool
    last: bool
    stopped: bool
    forced: int


class Expander:
    """Calls and their completions for one tree. Prefixes are drawn with the tree's random generator.

    Args:
        max_chain_tokens: longest chain, in tokens of the model that writes it.
    """

    def __init__(
        self,
        tree: GrowingTree,
        config: SearchConfig,
        writers: Mapping[Writer, SearchWriter],
        rng: random.Random,
        *,
        tree_seed: tuple[int, str],
        max_chain_tokens: int,
    ) -> None:
        self._tree, self._config, self._writers, self._rng = tree, config, writers, rng
        self._pattern: Pattern = tree.pattern
        self._proposer: Writer = "model" if "model" in writers else "policy"
        self._seed, self._max_chain_tokens = tree_seed, max_chain_tokens
        self._types = {node_type.tag: name for name, node_type in self._pattern.types.items()}
        self._draws: dict[int, int] = {}

    def children(self, node: Node) -> Plan:
        """Plan all children that the table allows below a node. Siblings of one type share a prefix."""
        plan = Plan()
        for name, count in self._tree.allowed(node).items():
            self._plan_nodes(plan, node, name, count, backtrack=False)
        return plan

    def single(self, node: Node, name: str, *, backtrack: bool) -> Plan:
        """Plan one child of a type."""
        plan = Plan()
        self._plan_nodes(plan, node, name, 1, backtrack=backtrack)
        return plan

    def chain(self, node: Node) -> Plan:
        """Plan the rest of a chain, which the proposer continues freely."""
        return Plan(self._parts(node, None, self._proposer, "", 1))

    def backtrack_chain(self, node: Node, name: str) -> Plan:
        """Plan the rest of a chain that begins with a node of a type and that the proposer writes."""
        node_type = self._pattern.types[name]
        text = f"<{node_type.tag}>{self._prefix(name)}"
        return Plan(self._parts(node, name, self._proposer, text, 1, backtrack=True))

    def writer_of(self, name: str) -> Writer | None:
        """Return the role that writes nodes of a type; None if the node is fixed text."""
        writer = self._pattern.types[name].writer
        if writer == "nobody":
            return None
        return "reviewer" if writer == "reviewer" and "reviewer" in self._writers else self._proposer

    def read_node(self, part: Part, drawn: Drawn) -> NewNode:
        """Return the node of a call that stops at the closing tag."""
        ids, readings = self._read(part, drawn)
        first = readings[0]
        defect: Defect | None = first.defect
        opening = (f"<{node_type.tag}>" for node_type in self._pattern.types.values())
        if defect is None and (len(readings) > 1 or (first.spill and not any(map(_begins(first.spill), opening)))):
            defect = "malformed"
        if defect == "truncated" and part.own_limit:
            defect = "too_long"
        whole = defect is None
        assert part.type is not None  # noqa: S101 - only chains leave the type open
        return NewNode(
            type=part.type,
            text="".join(reading.text for reading in readings),
            token_ids=ids,
            forced=len(part.forced),
            logprobs=drawn.logprobs.tolist(),
            spill=first.spill if whole else "",
            writer=part.writer,
            finish_reason=drawn.finish_reason,
            versions=tuple(_shifted(drawn.versions, 0, len(drawn.token_ids), len(part.forced))),
            defect=defect,
            backtrack=part.backtrack,
        )

    def read_chain(self, node: Node, part: Part, drawn: Drawn) -> Iterator[ChainPiece]:
        """Yield the nodes of a chain below `node`, up to its end, its first defect, or a node for the reviewer."""
        ids, readings = self._read(part, drawn)
        parent_type, depth = node.type, node.depth
        for number, reading in enumerate(readings):
            place = _Place(
                reading=reading,
                type=self._types.get(reading.tag or "", TEXT),
                parent_type=parent_type,
                depth=depth,
                given=part.backtrack and number == 0,
                last=number + 1 == len(readings),
                stopped=drawn.finish_reason == "stop",
                forced=len(part.forced),
            )
            defect = reading.defect or self._chain_defect(place)
            for_reviewer = defect in (None, "unanswered") and not place.given and self._is_for_reviewer(place.type)
            pieces = readings[number:] if defect else [reading]
            new = _chain_node(part, drawn, ids, pieces, type=place.type, defect=defect, backtrack=place.given)
            yield ChainPiece(new, for_reviewer)
            if defect or for_reviewer or self._is_terminal(place.type):
                return
            parent_type, depth = place.type, depth + 1

    def _chain_defect(self, place: _Place) -> Defect | None:
        """Return the first defect of a node within a chain; the tests run in this order."""
        max_depth = self._tree.max_depth
        tests: tuple[tuple[Defect, Callable[[], bool]], ...] = (
            ("off_pattern", lambda: not place.given and place.type not in self._children_of(place.parent_type)),
            ("too_deep", lambda: max_depth is not None and place.depth >= max_depth),
            ("too_long", lambda: self._is_too_long(place)),
            # The verifier would find the whole completion malformed.
            ("malformed", lambda: self._is_terminal(place.type) and not place.last),
            ("unanswered", lambda: place.last and not self._is_terminal(place.type) and place.stopped),
        )
        return next((defect for defect, fails in tests if fails()), None)

    def _children_of(self, type_name: str) -> Mapping[str, int]:
        return self._pattern.children.get(type_name, {})

    def _is_terminal(self, type_name: str) -> bool:
        return type_name in self._pattern.types and self._pattern.types[type_name].terminal

    def _limit(self, name: str) -> int:
        return self._pattern.types[name].max_tokens or self._config.max_node_tokens

    def _is_too_long(self, place: _Place) -> bool:
        """Return whether a node of a chain is longer than a call for this node alone allows.

        The opening tag does not count.
        """
        codec, reading = self._writers[self._proposer].codec, place.reading
        forced = place.forced if place.given else 0
        opening = forced or len(codec.encode(f"<{self._pattern.types[place.type].tag}>"))
        return reading.stop - reading.start - opening > self._limit(place.type)

    def _is_for_reviewer(self, name: str) -> bool:
        return self._pattern.types[name].writer == "reviewer" and "reviewer" in self._writers

    def _read(self, part: Part, drawn: Drawn) -> tuple[list[int], list[Reading]]:
        ids = [*part.forced, *drawn.token_ids.tolist()]
        return ids, self._writers[part.writer].codec.read(part.before, ids, drawn.finish_reason)

    def _plan_nodes(self, plan: Plan, node: Node, name: str, count: int, *, backtrack: bool) -> None:
        node_type, writer = self._pattern.types[name], self.writer_of(name)
        if writer is None:
            count = min(count, len(node_type.prefixes))
            if self._other_begun(node, f"<{node_type.tag}>"):
                return
            for text in self._rng.sample(node_type.prefixes, count):
                plan.fixed.append(self._fixed(node, name, text, backtrack))
            return
        text = f"<{node_type.tag}>{self._prefix(name)}"
        stop = self._writers[writer].codec.stop(node_type.tag)
        plan.parts += self._parts(node, name, writer, text, count, stop=stop, backtrack=backtrack)

    def _parts(
        self,
        node: Node,
        name: str | None,
        writer: Writer,
        text: str,
        count: int,
        *,
        stop: Stop | None = None,
        backtrack: bool = False,
    ) -> list[Part]:
        """Return calls that differ only in their seed, or none if the context has no room for a token.

        Args:
            text: text placed before the completion.
            stop: the end of the requested node; without it, the rest of the chain is requested.
        """
        facts = self._writers[writer]
        if text and self._other_begun(node, text):
            return []
        context, spill = self._context(node, writer)
        forced = facts.codec.encode(text.removeprefix(spill)) if text else []
        ids = [*context, *forced]
        room = min(facts.max_model_len - len(ids), self._max_chain_tokens - (len(ids) - len(facts.prompt_ids)))
        if room < 1:
            self._tree.counts["no_room"] += count
            return []
        tokens = min(room, self._limit(name)) if stop is not None and name is not None else room
        return [
            Part(
                type=name,
                writer=writer,
                forced=forced,
                before=spill,
                backtrack=backtrack,
                own_limit=tokens < room,
                call=Call(
                    writer=writer, token_ids=ids, seed=self._seed_of(node), max_tokens=tokens, stop=stop or Stop()
                ),
            )
            for _ in range(count)
        ]

    def _seed_of(self, node: Node) -> int:
        """Return the seed of the next draw from a node."""
        draw = self._draws[node.number] = self._draws.get(node.number, -1) + 1
        run_seed, prompt_id = self._seed
        return sample_seed(run_seed, prompt_id, f"{node.number}.{draw}")

    def _other_begun(self, node: Node, text: str) -> bool:
        """Return whether the last token of a node already holds the beginning of another text, and count it."""
        if text.startswith(node.spill):
            return False
        self._tree.counts["other_node_begun"] += 1
        return True

    def _context(self, node: Node, writer: Writer) -> tuple[list[int], str]:
        """Return prompt and chain in a model's tokens, and the text that the last token holds beyond them."""
        facts, ids, spill = self._writers[writer], list(self._writers[writer].prompt_ids), ""
        for step, tokens in node_ids(node.path(), lambda role: self._is_native(role, writer), facts.codec):
            ids += tokens
            spill = step.spill if self._is_native(step.writer, writer) else ""
        return ids, spill

    def _is_native(self, author: Writer, reader: Writer) -> bool:
        """Return whether two models have the same tokenizer."""
        return self._writers[author].codec.digest == self._writers[reader].codec.digest

    def _prefix(self, name: str) -> str:
        prefixes = self._pattern.types[name].prefixes
        return self._rng.choice(prefixes) if prefixes else ""

    def _fixed(self, node: Node, name: str, text: str, backtrack: bool) -> NewNode:
        tag = self._pattern.types[name].tag
        whole = f"<{tag}>{text}</{tag}>"
        _, spill = self._context(node, self._proposer)
        ids = self._writers[self._proposer].codec.encode(whole.removeprefix(spill))
        return NewNode(
            type=name,
            text=whole,
            token_ids=ids,
            forced=len(ids),
            logprobs=(),
            spill="",
            writer=self._proposer,
            finish_reason=None,
            versions=(),
            defect=None,
            backtrack=backtrack,
        )


def _begins(start: str) -> Callable[[str], bool]:
    return lambda text: text.startswith(start)


def _shifted(spans: Sequence[VersionSpan], low: int, high: int, offset: int) -> Iterator[VersionSpan]:
    """Yield the version spans of tokens [low, high) of a completion, relative to `low` and shifted by `offset`."""
    for number, span in enumerate(spans):
        stop = spans[number + 1].start if number + 1 < len(spans) else high
        if stop > low and span.start < high:
            yield replace(span, start=max(span.start, low) - low + offset)


def _chain_node(
    part: Part,
    drawn: Drawn,
    ids: Sequence[int],
    pieces: Sequence[Reading],
    *,
    type: str,
    defect: Defect | None,
    backtrack: bool,
) -> NewNode:
    """Return the node of consecutive readings of a chain.

    Args:
        ids: forced tokens and completion; the forced tokens come first.
    """
    start, stop, forced = pieces[0].start, pieces[-1].stop, len(part.forced)
    own_forced = max(0, forced - start)
    low, high = max(0, start - forced), stop - forced
    return NewNode(
        type=type,
        text="".join(piece.text for piece in pieces),
        token_ids=ids[start:stop],
        forced=own_forced,
        logprobs=drawn.logprobs[low:high].tolist(),
        spill=pieces[0].spill if defect is None else "",
        writer=part.writer,
        finish_reason=drawn.finish_reason,
        versions=tuple(_shifted(drawn.versions, low, high, own_forced)),
        defect=defect,
        backtrack=backtrack,
    )
