"""A tree as the page of a tree shows it: nested nodes, and the pairs that `rlsys extract` would make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.search import ExtractConfig
from rlsys.search.extract import preferred_chains, preferred_steps
from rlsys.search.marks import Marks, chain_digest, marked_nodes, without_chains
from rlsys.search.outline import STOPS, node_facts, right_nodes, verdict_text
from rlsys.trees import Tree
from rlsys.viewer.curves import shown_number


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node with its children.

    Attributes:
        open: whether its children show at first.
        right: whether it is on the way to a right answer.
        facts: what else there is to know of it, as short texts.
        digest: of the chain that ends here, if it can be marked; "" otherwise.
        marked: whether this chain is marked as bad.
    """

    number: int
    type: str
    text: str
    value: float | None
    visits: int
    open: bool
    right: bool
    leaf: bool
    facts: tuple[str, ...]
    verdict: str
    detail: str
    digest: str
    marked: bool


Event = tuple[str, NodeView]
"""("open", node), or ("close", node) after its children."""


def events(tree: Tree, marks: Marks, node: int = 0) -> Iterator[Event]:
    """Yield the nodes of a tree as a walk through it, without recursion: chains may be long.

    Args:
        node: the way to this node is open too; 0 for none.
    """
    children: dict[int, list[int]] = {}
    for number, child in enumerate(tree.nodes[1:], start=1):
        children.setdefault(child.parent, []).append(number)
    right = right_nodes(tree)
    first = next((n for n in tree.answers() if tree.nodes[n].correct), None)
    shown = {*(tree.path(first) if first is not None else []), *(tree.path(node) if node < len(tree.nodes) else [])}
    marked = set(marked_nodes(tree, marks))
    waiting = [("open", number) for number in reversed(children.get(0, []))]
    while waiting:
        kind, number = waiting.pop()
        below = children.get(number, [])
        yield kind, _node(tree, number, opened=number in shown, right=number in right, leaf=not below, marks=marked)
        if kind == "open":
            waiting.append(("close", number))
            waiting += [("open", child) for child in reversed(below)]


def _node(tree: Tree, number: int, *, opened: bool, right: bool, leaf: bool, marks: set[int]) -> NodeView:
    node = tree.nodes[number]
    return NodeView(
        number=number,
        type=node.type,
        text=node.text.strip(),
        value=node.value,
        visits=node.visits,
        open=opened,
        right=right,
        leaf=leaf,
        facts=tuple(node_facts(node)),
        verdict=verdict_text(node),
        detail=node.verdict.detail if node.verdict else "",
        digest=chain_digest(tree, number) if node.scored >= 0 else "",
        marked=number in marks,
    )


@dataclass(slots=True)
class _StoredTokens:
    """Codec of trees whose nodes all have tokens of the policy's tokenizer, so that nothing is encoded."""

    digest: str
    end_token_ids: frozenset[int]
    end_token_id: int

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError(text)

    def prompt(self, question: Any) -> list[int]:
        raise NotImplementedError(question)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairView:
    """A preference pair.

    Attributes:
        kind: "chains" or "nodes".
        prefix: text that both sides share.
        chosen: text of the better side after it, with its value or reward.
        rejected: the same of the worse side.
    """

    kind: str
    prefix: str
    chosen: tuple[str, str]
    rejected: tuple[str, str]


def pairs(tree: Tree, marks: Marks, config: ExtractConfig, end_token_ids: frozenset[int]) -> list[PairView] | None:
    """Return the pairs of a tree; None if another tokenizer than the policy's wrote some of it."""
    policy = tree.tokenizers.get("policy")
    if policy is None or any(digest != policy for digest in tree.tokenizers.values()):
        return None
    codec = _StoredTokens(policy, end_token_ids, min(end_token_ids, default=-1))
    marked = marked_nodes(tree, marks)
    tree = without_chains(tree, marked) if marked else tree
    views = []
    for chosen, rejected in preferred_chains(tree, config, codec):
        common = set(tree.path(chosen.number)) & set(tree.path(rejected.number))
        prefix = tree.completion(max(common, default=0))  # a child has a larger number than its parent
        sides = [(chain.text[len(prefix) :], f"reward {shown_number(chain.reward)}") for chain in (chosen, rejected)]
        views.append(PairView(kind="chains", prefix=prefix, chosen=sides[0], rejected=sides[1]))
    for better, worse in preferred_steps(tree, config, codec):
        sides = [(step.text, f"value {step.value:.2f} of {step.visits}") for step in (better, worse)]
        views.append(PairView(kind="nodes", prefix=better.prefix, chosen=sides[0], rejected=sides[1]))
    return views


def end_tokens(folder: Path) -> frozenset[int]:
    """Return the end tokens that a model folder names; none if it cannot be read."""
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(each, int) for each in ids):
            return frozenset(ids)
    return frozenset()


def facts(tree: Tree, marks: Marks) -> Mapping[str, Any]:
    """Return the figures of a tree for the list of trees."""
    return {
        "nodes": len(tree.nodes) - 1,
        "answers": len(tree.answers()),
        "right": sum(node.correct for node in tree.nodes),
        "stop": STOPS[tree.stop],
        "tokens": tree.tokens,
        "marked": len(marked_nodes(tree, marks)),
    }
