"""Supervised rows: the chain that `extract.supervised` selects, with the tokens of it that are trained.

A row may hold a chain without nodes that were not needed, and may train some types of nodes or one node alone; the
other nodes are context. Sources: chunk-wise training and skipping, Skip-Thinking, arXiv:2505.18642; training of plans,
Explore-Execute, arXiv:2509.23946.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from rlsys.config.search import ExtractConfig
from rlsys.search.extract import Chain, Codec, correct_chains, pick_chain, with_end
from rlsys.search.paths import path_tokens
from rlsys.search.rules import tie
from rlsys.search.scores import ScoreFile
from rlsys.trees import ENVIRONMENT, ThoughtNode, Tree
from rlsys.types import BoolArray, Demonstration, Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedRow:
    """A row to imitate.

    Attributes:
        prefix: text of the chain before the row's completion; "" unless a row trains one node.
        text: text of the completion.
        token_ids: [T] int32, the prompt first.
        loss_mask: [T] bool, True on the tokens to train.
        prompt_length: number of tokens of the prompt.
        chain: the chain that was selected.
    """

    prefix: str
    text: str
    token_ids: Int32Array
    loss_mask: BoolArray
    prompt_length: int
    chain: Chain

    @property
    def demonstration(self) -> Demonstration:
        return Demonstration(token_ids=self.token_ids, loss_mask=self.loss_mask)


@dataclass(frozen=True, slots=True)
class _Part:
    """A node of a chain with its tokens, and whether they are trained."""

    node: ThoughtNode
    token_ids: Int32Array
    trained: bool


def supervised_rows(
    tree: Tree, config: ExtractConfig, codec: Codec, scores: ScoreFile | None = None
) -> list[SupervisedRow]:
    """Return the supervised rows of a tree; none if no chain is selected or no node of it is trained.

    Args:
        tree: a finished tree.
        config: section `extract`.
        codec: codec of the policy.
        scores: scores of the chains, for the rule divergence alone.
    """
    chain = _selected(tree, config, codec, scores)
    if chain is None:
        return []
    return chain_rows(tree, chain, config, codec, without=_unneeded(tree, config, codec))


def chain_rows(
    tree: Tree, chain: Chain, config: ExtractConfig, codec: Codec, *, without: frozenset[str] = frozenset()
) -> list[SupervisedRow]:
    """Return the supervised rows of a chain.

    Args:
        tree: the tree of the chain.
        chain: the chain.
        config: which nodes are trained, and whether each has a row of its own.
        codec: codec of the policy.
        without: types of the nodes that are left out.
    """
    path = path_tokens(tree, chain.number, codec)
    prompt = path.token_ids[: path.prompt_length]
    types = config.supervised_nodes
    parts = [
        _Part(tree.nodes[n], path.token_ids[start:stop], _is_trained(tree.nodes[n].type, types))
        for n, start, stop in path.spans
    ]
    parts[-1] = _Part(parts[-1].node, with_end(parts[-1].token_ids, codec), parts[-1].trained)
    parts = _skipped(parts, without, lambda node: tree.tokenizers[node.writer] == codec.digest)
    trained = [number for number, part in enumerate(parts) if part.trained]
    if config.supervised_rows == "chain":
        return [_row(prompt, parts, 0, chain)] if trained else []
    return [_row(prompt, parts[: number + 1], number, chain) for number in trained]


def _is_trained(kind: str, types: Collection[str]) -> bool:
    """Return whether nodes of a type are trained: never replies of an environment."""
    return kind != ENVIRONMENT and (not types or kind in types)


def _selected(tree: Tree, config: ExtractConfig, codec: Codec, scores: ScoreFile | None) -> Chain | None:
    if config.supervised != "divergence":
        return pick_chain(tree, config.supervised, codec, config.max_backtracks)
    assert scores is not None  # noqa: S101 - the rules of the config refuse this rule where there are no scores
    chains = correct_chains(tree, codec, config.max_backtracks)
    divergences = scores.divergences(tree.prompt_id, chains)
    return min(chains, key=lambda chain: (-divergences[chain.number], *tie(chain)), default=None)


def _row(prompt: Int32Array, parts: list[_Part], begin: int, chain: Chain) -> SupervisedRow:
    """Return the row whose completion is the parts from `begin` on."""
    masks = [np.zeros(len(prompt), dtype=np.bool_)]
    masks += [np.full(len(part.token_ids), part.trained and n >= begin) for n, part in enumerate(parts)]
    return SupervisedRow(
        prefix="".join(part.node.text for part in parts[:begin]),
        text="".join(part.node.text for part in parts[begin:]),
        token_ids=np.concatenate([prompt, *(part.token_ids for part in parts)]),
        loss_mask=np.concatenate(masks),
        prompt_length=len(prompt),
        chain=chain,
    )


def _unneeded(tree: Tree, config: ExtractConfig, codec: Codec) -> frozenset[str]:
    """Return the types of `extract.skip` without which another chain of the tree is correct."""
    chains = correct_chains(tree, codec, config.max_backtracks) if config.skip else []
    types = [{kind for _, _, kind in chain.nodes} for chain in chains]
    return frozenset(kind for kind in config.skip if any(kind not in each for each in types))


def _skipped(parts: list[_Part], without: frozenset[str], is_native: Callable[[ThoughtNode], bool]) -> list[_Part]:
    """Return the parts without the nodes of some types; the last node, the answer, always stays.

    A token may hold the end of a node and the beginning of the next. A node between two such tokens stays, unless both
    hold the same beginning.
    """
    kept: list[_Part] = []
    spill = ""  # the text of the next node that the last token of the part before holds
    for number, part in enumerate(parts):
        own = part.node.spill if is_native(part.node) else ""
        if part.node.type in without and number < len(parts) - 1 and own == spill:
            continue
        kept.append(part)
        spill = own
    return kept
