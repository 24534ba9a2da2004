"""From a node to the calls that ask for what follows it, and from completions to nodes."""

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

    type: of the node that is asked for; None where the writer may go on as it likes.
    forced: tokens put before the completion; before: the part of their text that the token ahead of them holds.
    own_limit: the call ends at the longest node of its type, not where chain or context is full.
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
    """What an expansion asks for, and the nodes that need no model."""

    parts: list[Part] = field(default_factory=list)
    fixed: list[NewNode] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ChainPiece:
    """A node read from a chain; handover: not taken, because the reviewer is to write one of this type."""

    node: NewNode
    handover: bool = False


class Expander:
    """Makes calls and reads completions for one tree; draws prefixes with the tree's generator.

    Args:
        max_chain_tokens: longest chain, in tokens of whoever writes.
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
        self._grower: Writer = "model" if "model" in writers else "policy"
        self._seed, self._max_chain_tokens = tree_seed, max_chain_tokens
        self._types = {node_type.tag: name for name, node_type in self._pattern.types.items()}
        self._draws: dict[int, int] = {}

    def children(self, node: Node) -> Plan:
        """All children that the table allows here; the siblings of one type share a prefix."""
        plan = Plan()
        for name, count in self._tree.allowed(node).items():
            self._plan_nodes(plan, node, name, count, backtrack=False)
        return plan

    def single(self, node: Node, name: str, *, backtrack: bool) -> Plan:
        """One child of a type."""
        plan = Plan()
        self._plan_nodes(plan, node, name, 1, backtrack=backtrack)
        return plan

    def chain(self, node: Node) -> Plan:
        """The rest of a chain, as the grower likes."""
        return Plan(self._parts(node, None, self._grower, "", 1))

    def backtrack_chain(self, node: Node, name: str) -> Plan:
        """The rest of a chain that begins with a node of a type, which the grower writes."""
        node_type = self._pattern.types[name]
        text = f"<{node_type.tag}>{self._prefix(name)}"
        return Plan(self._parts(node, name, self._grower, text, 1, backtrack=True))

    def writer_of(self, name: str) -> Writer | None:
        """Who writes nodes of a type; None where the prefix is all of it."""
        writer = self._pattern.types[name].writer
        if writer == "nobody":
            return None
        return "reviewer" if writer == "reviewer" and "reviewer" in self._writers else self._grower

    def read_node(self, part: Part, drawn: Drawn) -> NewNode:
        """The one node of a call that was to stop at its closing tag."""
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
        """The nodes of a chain below `node`, up to the end of the chain, its first defect or a handover."""
        ids, readings = self._read(part, drawn)
        before, depth, forced = node.type, node.depth, len(part.forced)
        for number, reading in enumerate(readings):
            name = self._types.get(reading.tag or "", TEXT)
            defect: Defect | None = reading.defect
            given = part.backtrack and number == 0
            if defect is None and not given and name not in self._pattern.children.get(before, {}):
                defect = "off_pattern"
            if defect is None and self._tree.max_depth is not None and depth >= self._tree.max_depth:
                defect = "too_deep"
            if defect is None and self._is_too_long(name, reading, len(part.forced) if given else 0):
                defect = "too_long"
            terminal = name in self._pattern.types and self._pattern.types[name].terminal
            last = number + 1 == len(readings)
            if defect is None and terminal and not last:
                defect = "malformed"  # as the verifier would find of the whole completion
            if defect is None and last and not terminal and drawn.finish_reason == "stop":
                defect = "unanswered"
            handover = defect in (None, "unanswered") and not given and self._is_for_reviewer(name)
            rest = readings[number:] if defect else [reading]
            start, stop = reading.start, rest[-1].stop
            own = max(0, forced - start)  # forced tokens stand at the very front
            low, high = max(0, start - forced), stop - forced
            new = NewNode(
                type=name,
                text="".join(piece.text for piece in rest),
                token_ids=ids[start:stop],
                forced=own,
                logprobs=drawn.logprobs[low:high].tolist(),
                spill=reading.spill if defect is None else "",
                writer=part.writer,
                finish_reason=drawn.finish_reason,
                versions=tuple(_shifted(drawn.versions, low, high, own)),
                defect=defect,
                backtrack=given,
            )
            yield ChainPiece(new, handover)
            if defect or handover or terminal:
                return
            before, depth = name, depth + 1

    def _limit(self, name: str) -> int:
        return self._pattern.types[name].max_tokens or self._config.max_node_tokens

    def _is_too_long(self, name: str, reading: Reading, forced: int) -> bool:
        """Whether a node of a chain has more tokens than a call for it alone could; its opening tag does not count."""
        codec = self._writers[self._grower].codec
        opening = forced or len(codec.encode(f"<{self._pattern.types[name].tag}>"))
        return reading.stop - reading.start - opening > self._limit(name)

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
        """Calls that differ in nothing but their seed; none where the context leaves no room for a token (counted).

        Args:
            text: what is put before the completion.
            stop: where the one node of a call ends; without it the rest of the chain is asked for.
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
        """Seed of the next draw from a node."""
        draw = self._draws[node.number] = self._draws.get(node.number, -1) + 1
        run_seed, prompt_id = self._seed
        return sample_seed(run_seed, prompt_id, f"{node.number}.{draw}")

    def _other_begun(self, node: Node, text: str) -> bool:
        """Whether the last token of a node already holds the beginning of another text than this (counted)."""
        if text.startswith(node.spill):
            return False
        self._tree.counts["other_node_begun"] += 1
        return True

    def _context(self, node: Node, writer: Writer) -> tuple[list[int], str]:
        """Prompt and chain in the writer's tokens, and what the last token holds of the text to come."""
        facts, ids, spill = self._writers[writer], list(self._writers[writer].prompt_ids), ""
        for step, tokens in node_ids(node.path(), lambda who: self._is_native(who, writer), facts.codec):
            ids += tokens
            spill = step.spill if self._is_native(step.writer, writer) else ""
        return ids, spill

    def _is_native(self, who: Writer, reader: Writer) -> bool:
        return self._writers[who].codec.digest == self._writers[reader].codec.digest

    def _prefix(self, name: str) -> str:
        prefixes = self._pattern.types[name].prefixes
        return self._rng.choice(prefixes) if prefixes else ""

    def _fixed(self, node: Node, name: str, text: str, backtrack: bool) -> NewNode:
        tag = self._pattern.types[name].tag
        whole = f"<{tag}>{text}</{tag}>"
        _, spill = self._context(node, self._grower)
        ids = self._writers[self._grower].codec.encode(whole.removeprefix(spill))
        return NewNode(
            type=name,
            text=whole,
            token_ids=ids,
            forced=len(ids),
            logprobs=(),
            spill="",
            writer=self._grower,
            finish_reason=None,
            versions=(),
            defect=None,
            backtrack=backtrack,
        )


def _begins(start: str) -> Callable[[str], bool]:
    return lambda text: text.startswith(start)


def _shifted(spans: Sequence[VersionSpan], low: int, high: int, offset: int) -> Iterator[VersionSpan]:
    """Version spans of tokens [low, high) of a completion, counted from `low` and moved by `offset`."""
    for number, span in enumerate(spans):
        stop = spans[number + 1].start if number + 1 < len(spans) else high
        if stop > low and span.start < high:
            yield replace(span, start=max(span.start, low) - low + offset)
