"""Trees made by hand or at random, without a search, and a codec of single letters for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rlsys.trees import ThoughtNode, Tree
from rlsys.types import Int32Array, Outcome, Verdict

PROMPT, END, OTHER_END = 2, 0, 1


class CharCodec:
    """Codec with one token per letter. The prompt is PROMPT and the question. END and OTHER_END end a chain."""

    def __init__(self, digest: str = "letters") -> None:
        self.digest = digest
        self.end_token_id = END
        self.end_token_ids = frozenset((END, OTHER_END))

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def prompt(self, question: str) -> list[int]:
        return [PROMPT, *self.encode(question)]


def ids(text: str, *more: int) -> Int32Array:
    return np.array([*map(ord, text), *more], dtype=np.int32)


def node(parent: int, text: str, kind: str = "thinking", *, forced: int = 0, **fields: Any) -> ThoughtNode:
    """Return a node without a verdict. Its first `forced` letters are forced."""
    token_ids = fields.pop("token_ids", ids(text))
    logprobs = np.where(np.arange(len(token_ids)) < forced, 0, -0.5).astype(np.float32)
    return ThoughtNode(
        parent=parent, type=kind, text=text, token_ids=token_ids, forced=forced, logprobs=logprobs, **fields
    )


def answer(parent: int, text: str, outcome: Outcome, reward: float | None = None, **fields: Any) -> ThoughtNode:
    """Return a judged terminal node. The default reward is 1 for "ok", else 0."""
    if reward is None:
        reward = float(outcome == "ok")
    verdict = Verdict(outcome=outcome, reward=reward, answered=outcome in ("ok", "wrong"))
    return node(parent, text, "answer", verdict=verdict, **fields)


def tree(*below: ThoughtNode, prompt_id: str = "p", question: str = "q", **fields: Any) -> Tree:
    """Return a tree of the prompt and the nodes below it, from number 1. Visits, totals and scores are computed."""
    nodes = [replace(node(-1, ""), type="start"), *below]
    scored = 0
    for number, leaf in enumerate(below, start=1):
        if leaf.verdict is None:
            continue
        if leaf.defect is None:  # a chain that has failed is judged, and no answer
            nodes[number] = replace(nodes[number], scored=scored)
            scored += 1
        while leaf.verdict.outcome in ("ok", "wrong") and number >= 0:
            above = nodes[number]
            nodes[number] = replace(
                above, visits=above.visits + leaf.samples, total=above.total + leaf.samples * leaf.verdict.reward
            )
            number = above.parent
    values: dict[str, Any] = {
        "answer": "1",
        "pattern": "a",
        "tokenizers": {"policy": "letters"},
        "models": {"policy": "a model"},
        "prompt_token_ids": {"policy": ids("", PROMPT, *map(ord, question))},
        "stop": "simulations",
        "simulations": scored,
        "calls": len(below),
        "tokens": sum(child.generated for child in below),
        "counts": {},
    }
    return Tree(prompt_id=prompt_id, question=question, nodes=tuple(nodes), **values | fields)


def golden() -> Tree:
    """Return a tree with four correct chains, four wrong ones, one whose verifier failed and a truncated node.

    number  chain     verdict  tokens with the end token   value (visits) of the nodes
    3       aabbX     ok       6                           1: 2/4 (4)  2: 1/2 (2)  3: 1
    4       aabby     wrong    6
    6       aabcdX    ok       7                           1: 2/4 (4)  5: 1/2 (2)  6: 1
    7       aabcdz    wrong    7
    10      effffX    ok       7                           8: 2/5 (5)  9: 2/3 (3)  10: 1
    11      effffw    wrong    7
    12      effffv    error    7                           without visits
    13      effffXx   ok       8                           8: 2/5 (5)  9: 2/3 (3)  13: 1
    16      ehhhu     wrong    6    drawn twice            8: 2/5 (5)  15: 0/2 (2)  16: 0 (2)
    """
    return tree(
        node(0, "aa", "sub_task"),  # 1
        node(1, "bb"),
        answer(2, "X", "ok"),
        answer(2, "y", "wrong"),
        node(1, "bcd"),  # 5
        answer(5, "X", "ok"),
        answer(5, "z", "wrong"),
        node(0, "e", "sub_task"),
        node(8, "ffff", forced=2),
        answer(9, "X", "ok"),  # 10
        answer(9, "w", "wrong"),
        answer(9, "v", "error"),
        answer(9, "Xx", "ok"),
        node(8, "g", finish_reason="length", defect="truncated"),
        node(8, "hhh"),  # 15
        answer(15, "u", "wrong", samples=2),
    )


def children_of(tree: Tree, number: int) -> list[int]:
    """Return the numbers of a node's children."""
    return [child for child, node in enumerate(tree.nodes) if node.parent == number]


def renumbered(original: Tree, order: Sequence[int]) -> Tree:
    """Return the tree with its nodes in another order. `order` ranks the nodes, but parents always come first."""
    ranks = dict(enumerate(order))
    placed: list[int] = []
    open_nodes = [0]
    while open_nodes:
        number = min(open_nodes, key=lambda n: (ranks[n], n))
        open_nodes.remove(number)
        open_nodes.extend(children_of(original, number))
        placed.append(number)
    places = {number: place for place, number in enumerate(placed)} | {-1: -1}
    nodes = [replace(original.nodes[number], parent=places[original.nodes[number].parent]) for number in placed]
    scored = iter(range(len(nodes)))
    nodes = [replace(node, scored=next(scored)) if node.scored >= 0 else node for node in nodes]
    return replace(original, nodes=tuple(nodes))


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Draw small trees with two letters, so that equal nodes and prefixes are common, and two roles and tokenizers."""
    below: list[ThoughtNode] = []
    parents = [0]
    for number in range(1, draw(st.integers(1, 14)) + 1):
        text = draw(st.text("ab", min_size=1, max_size=2))
        fields: dict[str, Any] = {"samples": draw(st.integers(1, 2)), "writer": draw(_WRITERS)}
        if fields["writer"] == "reviewer":
            fields["token_ids"] = ids("", 7)
        if draw(st.booleans()):
            outcome = draw(_OUTCOMES)
            if fields["writer"] == "policy" and draw(st.booleans()):
                fields["token_ids"] = ids(text, draw(st.sampled_from((END, OTHER_END))))
            reward = draw(st.sampled_from((0.1, 0.7, 1.0))) if outcome == "ok" else 0.0
            below.append(answer(draw(st.sampled_from(parents)), text, outcome, reward, **fields))
        else:
            forced = len(text) if fields["writer"] == "policy" and draw(st.booleans()) else 0
            kind = draw(st.sampled_from(("thinking", "hypothesis")))
            below.append(node(draw(st.sampled_from(parents)), text, kind, forced=forced, **fields))
            parents.append(number)
    return tree(*below, tokenizers={"policy": "letters", "reviewer": "other"})


_WRITERS = st.sampled_from(("policy", "policy", "reviewer"))
_OUTCOMES = st.sampled_from(("ok", "wrong", "wrong", "error", "timeout"))


def plain(value: Any) -> Any:
    """Return dataclasses, sequences and arrays as nested tuples, which can be compared."""
    if dataclasses.is_dataclass(value):
        return tuple(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, np.ndarray):
        return (str(value.dtype), *value.tolist())
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value
