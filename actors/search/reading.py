"""Reading of thought nodes from completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.engine import Completion
from actors.search.requests import PlannedCall, SearchModel, proposing_role
from actors.search.tree import GrowingTree, NewNode, Node
from rlsys.config.search import SearchConfig
from rlsys.search.codec import Reading
from rlsys.trees import TEXT, Defect, Role
from rlsys.types import FinishReason, VersionSpan


@dataclass(frozen=True, slots=True)
class ChainPiece:
    """A node that was read from a chain.

    Attributes:
        is_reviewed: Whether the reviewer must write another node of the same type in its place.
    """

    node: NewNode
    is_reviewed: bool = False


Line = list[ChainPiece]
"""Successive nodes, of which the first follows a node of the tree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A piece of a chain, its position, and the properties of its type.

    Attributes:
        parent_type: Type of the node before it.
        parent_depth: Depth of the node before it.
        given: Whether the search chose its type.
        forced: Number of its forced tokens, if the search chose its type.
        terminal: Whether its type ends a chain.
        last: Whether the completion has no text after it.
    """

    reading: Reading
    type: str
    parent_type: str
    parent_depth: int
    given: bool
    forced: int
    terminal: bool
    last: bool
    finish_reason: FinishReason


class CompletionReader:
    """Reader of the completions of one tree."""

    def __init__(self, tree: GrowingTree, config: SearchConfig, models: Mapping[Role, SearchModel]) -> None:
        self._tree, self._config, self._models = tree, config, models
        self._pattern = tree.pattern
        self._proposer = proposing_role(models)
        self._types = {node_type.tag: name for name, node_type in self._pattern.types.items()}
        # They are checked in this order. A later check may rely on the earlier ones.
        self._defects: tuple[tuple[Defect, Callable[[_Place], bool]], ...] = (
            ("off_pattern", self._is_off_pattern),
            ("too_deep", self._is_too_deep),
            ("too_long", self._is_too_long),
            # The verifier, too, refuses text after an answer.
            ("malformed", lambda place: place.terminal and not place.last),
            ("unanswered", lambda place: self._ends_after(place, "stop")),
            ("truncated", lambda place: self._ends_after(place, "length")),
        )

    def read_node(self, planned: PlannedCall, completion: Completion) -> NewNode:
        """Return the node of a call that requested a single node."""
        ids, readings = self._read(planned, completion)
        assert planned.type is not None  # noqa: S101 - only chains leave the type open
        if self._tree.ends_turn(planned.type):
            readings[0] = _with_spill(readings[0])
        first = readings[0]
        defect: Defect | None = first.defect
        if defect is None and (len(readings) > 1 or not self._may_begin_node(first.spill)):
            defect = "malformed"
        if defect == "truncated" and planned.limited_by_type:
            defect = "too_long"
        return NewNode(
            type=planned.type,
            text="".join(reading.text for reading in readings),
            token_ids=ids,
            forced=len(planned.forced),
            logprobs=completion.logprobs.tolist(),
            spill=first.spill if defect is None else "",
            writer=planned.role,
            finish_reason=completion.finish_reason,
            versions=tuple(_shifted(completion.versions, 0, len(completion.token_ids), len(planned.forced))),
            defect=defect,
            backtrack=planned.backtrack,
        )

    def read_chain(self, node: Node, planned: PlannedCall, completion: Completion) -> Iterator[ChainPiece]:
        """Yield the nodes of a chain up to a defect, the end of a turn, or a reviewed node."""
        ids, readings = self._read(planned, completion)
        parent_type, depth = node.type, node.depth
        for number, reading in enumerate(readings):
            name = self._types.get(reading.tag or "", TEXT)
            reading = _with_spill(reading) if self._tree.ends_turn(name) else reading
            given = planned.backtrack and number == 0
            place = _Place(
                reading=reading,
                type=name,
                parent_type=parent_type,
                parent_depth=depth,
                given=given,
                forced=len(planned.forced) if given else 0,
                terminal=name in self._pattern.types and self._pattern.types[name].terminal,
                last=number + 1 == len(readings),
                finish_reason=completion.finish_reason,
            )
            defect = self._defect(place)
            is_whole = reading.defect is None and defect in (None, "unanswered", "truncated")
            is_reviewed = is_whole and not given and self._is_reviewed(name)
            # A defective node includes all later text of the completion.
            rest = readings[number:] if defect else [reading]
            yield ChainPiece(_chain_node(place, rest, defect, ids, planned, completion), is_reviewed)
            if defect or is_reviewed or place.terminal:
                return
            if self._tree.ends_turn(name):  # text after it was drawn without the reply: the stop string was kept
                if dropped := sum(rest.stop - rest.start for rest in readings[number + 1 :]):
                    self._tree.counts["dropped_tokens"] += dropped
                return
            parent_type, depth = name, depth + 1

    def _read(self, planned: PlannedCall, completion: Completion) -> tuple[list[int], list[Reading]]:
        ids = [*planned.forced, *completion.token_ids.tolist()]
        return ids, self._models[planned.role].codec.read(planned.spill, ids, completion.finish_reason)

    def _may_begin_node(self, spill: str) -> bool:
        return not spill or any(f"<{tag}>".startswith(spill) for tag in self._types)

    def _is_reviewed(self, name: str) -> bool:
        return self._pattern.types[name].writer == "reviewer" and "reviewer" in self._models

    def _defect(self, place: _Place) -> Defect | None:
        if place.reading.defect is not None:
            return place.reading.defect
        return next((defect for defect, applies in self._defects if applies(place)), None)

    def _is_off_pattern(self, place: _Place) -> bool:
        return not place.given and place.type not in self._pattern.children.get(place.parent_type, {})

    def _ends_after(self, place: _Place, finish_reason: FinishReason) -> bool:
        """Return whether the completion ended for a reason after a whole node that is no answer and ends no turn."""
        ended = place.last and place.finish_reason == finish_reason
        return ended and not place.terminal and not self._tree.ends_turn(place.type)

    def _is_too_deep(self, place: _Place) -> bool:
        return self._tree.max_depth is not None and place.parent_depth >= self._tree.max_depth

    def _is_too_long(self, place: _Place) -> bool:
        """Return whether a node exceeds the token limit of its type. Forced tokens or the opening tag do not count."""
        node_type = self._pattern.types[place.type]
        opening = place.forced or len(self._models[self._proposer].codec.encode(f"<{node_type.tag}>"))
        length = place.reading.stop - place.reading.start - opening
        return length > (node_type.max_tokens or self._config.max_node_tokens)


def _with_spill(reading: Reading) -> Reading:
    """Return the end of a turn with all text of its last token, as the environment reads it."""
    return replace(reading, text=reading.text + reading.spill, spill="")


def _chain_node(
    place: _Place,
    rest: Sequence[Reading],
    defect: Defect | None,
    ids: list[int],
    planned: PlannedCall,
    completion: Completion,
) -> NewNode:
    """Return the node that joins the pieces `rest` of a chain. `ids` are the forced and the drawn tokens."""
    start, stop = place.reading.start, rest[-1].stop
    forced = len(planned.forced)  # forced tokens stand at the start of `ids`
    own_forced = max(0, forced - start)
    low, high = max(0, start - forced), stop - forced
    return NewNode(
        type=place.type,
        text="".join(piece.text for piece in rest) + (rest[-1].spill if defect else ""),
        token_ids=ids[start:stop],
        forced=own_forced,
        logprobs=completion.logprobs[low:high].tolist(),
        spill=place.reading.spill if defect is None else "",
        writer=planned.role,
        finish_reason=completion.finish_reason,
        versions=tuple(_shifted(completion.versions, low, high, own_forced)),
        defect=defect,
        backtrack=place.given,
    )


def _shifted(spans: Sequence[VersionSpan], low: int, high: int, offset: int) -> Iterator[VersionSpan]:
    """Yield the version spans of tokens [low, high) of a completion, shifted so that token `low` is at `offset`."""
    for number, span in enumerate(spans):
        stop = spans[number + 1].start if number + 1 < len(spans) else high
        if stop > low and span.start < high:
            start = max(span.start, low) - low + offset
            yield VersionSpan(start=start, version=span.version, attempt=span.attempt)
