"""Extraction of training data from finished trees.

The order of a node's children has no influence: token ids and texts break ties, node numbers never do.
All token ids are in the policy's tokenizer (`rlsys.search.paths`). Lengths are in tokens and relative to one tree.

Source: Marco-o1 v2, arXiv:2503.01461, sec. 3 and 4 (chains, pairs, thoughts length balance, prefix masking).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rlsys.config.search import ChainRule, ExtractConfig
from rlsys.search.paths import Codec as PathCodec
from rlsys.search.paths import PathTokens, path_tokens
from rlsys.search.rules import choose, tie
from rlsys.sequences import common_prefix_length, order_key
from rlsys.trees import ENVIRONMENT, ThoughtNode, Tree
from rlsys.types import BoolArray, Int32Array, Preference, StepPreference

ROUNDING = 1e-9
"""Tolerance for differences of values, which are quotients: 0.5 - 0.4 counts as a difference of 0.1."""

StepValueRule = Literal["mean", "estimate"]


class Codec(PathCodec, Protocol):
    """Interface to the policy's tokenizer; see `rlsys.search.codec.TagCodec`."""

    end_token_id: int
    end_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A judged chain of a tree.

    Attributes:
        number: Number of its terminal node.
        token_ids: [T] int32, from the prompt to one end token.
        value: Mean of the values of its nodes. The value of a node is the mean reward of the chains that ended at or
            below it.
        nodes: (end, visits, type) of each of its nodes; `end` is an index into token_ids.
        backtracks: Number of its nodes that follow a wrong answer.
        written: [T] bool, False on the replies of an environment; None without one.
    """

    number: int
    token_ids: Int32Array
    prompt_length: int
    text: str
    value: float
    reward: float
    nodes: tuple[tuple[int, int, str], ...]
    backtracks: int = 0
    written: BoolArray | None = None

    @property
    def length(self) -> int:
        """Tokens after the prompt, the end token included."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValue:
    """A thought node with its value in the search, or with its estimate.

    Attributes:
        prefix: Text of the chain before the node.
        text: Text of the node.
        token_ids: [T] int32: the prompt, the chain before the node, and the node as token_ids[start:].
        forced: Number of tokens at the start of the node that no model generated. This number is unknown for a node
            that was encoded from its text; it is then 0, or all tokens if no model wrote any part of the node.
    """

    prefix: str
    text: str
    type: str
    token_ids: Int32Array
    start: int
    forced: int
    value: float
    visits: int

    @property
    def loss_mask(self) -> BoolArray:
        """[T] bool mask, True for the tokens of the node that a model generated."""
        return np.arange(len(self.token_ids)) >= self.start + self.forced


def pick_chain(tree: Tree, rule: ChainRule, codec: Codec, max_backtracks: int | None = None) -> Chain | None:
    """Return the correct chain that a rule selects (`rlsys.search.rules`); None without one, or for "none".

    Args:
        tree: A finished tree.
        rule: The rule.
        codec: Codec of the policy.
        max_backtracks: Largest number of nodes after a wrong answer; None for no limit.
    """
    chains = correct_chains(tree, codec, max_backtracks) if rule != "none" else []
    if not chains:
        return None
    visits, total = unhinted(tree)[0]
    return choose(chains, rule, total / visits if visits else 0.0)


def correct_chains(tree: Tree, codec: Codec, max_backtracks: int | None = None) -> list[Chain]:
    """Return the correct chains of a tree with at most a number of nodes after a wrong answer."""
    chains = _chains(tree, codec, lambda node: node.correct)
    return [chain for chain in chains if max_backtracks is None or chain.backtracks <= max_backtracks]


def preference_pairs(tree: Tree, config: ExtractConfig, codec: Codec) -> list[Preference]:
    """Return the preference pairs of a tree; see `preferred_chains`."""
    return [preference(chosen, rejected) for chosen, rejected in preferred_chains(tree, config, codec)]


def preferred_chains(tree: Tree, config: ExtractConfig, codec: Codec) -> list[tuple[Chain, Chain]]:
    """Return at most `extract.pairs_per_tree` pairs of the correct chain and a wrong chain of a tree.

    The rule `extract.chosen` selects the correct chain. A wrong chain is complete and was judged wrong; a chain whose
    verifier failed is not used. The order of the pairs follows `extract.pairs`; of equal prefixes, the closest lengths
    come first, then the smallest token ids. A chain includes its end token, so two chains can differ even if the text
    of one begins with the text of the other.
    """
    chosen = pick_chain(tree, config.chosen, codec, config.max_backtracks)
    if chosen is None:
        return []
    ranked = []
    for wrong in _chains(tree, codec, is_wrong):
        if config.max_backtracks is not None and wrong.backtracks > config.max_backtracks:
            continue
        common = common_prefix_length(chosen.token_ids, wrong.token_ids)
        mine, other = _diverging(chosen, wrong, common)
        if config.pairs == "same_type" and mine[2] != other[2]:
            continue
        if common < min(len(chosen.token_ids), len(wrong.token_ids)):
            place = -common if config.pairs == "longest_prefix" else common
            ranked.append((place, abs(chosen.length - wrong.length), *tie(wrong), wrong))
    ranked.sort(key=lambda entry: entry[:-1])
    return [(chosen, entry[-1]) for entry in ranked[: config.pairs_per_tree]]


def preference(chosen: Chain, rejected: Chain) -> Preference:
    """Return two chains of one tree as a pair, with the visits of the nodes in which they diverge."""
    common = common_prefix_length(chosen.token_ids, rejected.token_ids)
    mine, other = _diverging(chosen, rejected, common)
    return Preference(
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        prompt_length=chosen.prompt_length,
        common=common,
        chosen_mask=chosen.written,
        rejected_mask=rejected.written,
        chosen_visits=mine[1],
        rejected_visits=other[1],
    )


def _diverging(chosen: Chain, rejected: Chain, common: int) -> tuple[tuple[int, int, str], tuple[int, int, str]]:
    """Return the first pair of nodes, one per chain, that is not inside the common prefix; see `Chain.nodes`.

    The tree can have two nodes with equal tokens, for example if one follows a hint. The chains do not diverge there.
    """
    both = list(zip(chosen.nodes, rejected.nodes, strict=False))
    # The last pair is for chains that differ in their end tokens alone.
    return next(((mine, other) for mine, other in both if max(mine[0], other[0]) > common), both[-1])


def step_preferences(tree: Tree, config: ExtractConfig, codec: Codec) -> list[StepPreference]:
    """Return the preference pairs of sibling nodes; see `preferred_steps`."""
    return [step_preference(better, worse) for better, worse in preferred_steps(tree, config, codec)]


def preferred_steps(tree: Tree, config: ExtractConfig, codec: Codec) -> list[tuple[StepValue, StepValue]]:
    """Return the best and the worst node of each set of siblings as a pair.

    Children that backtrack are siblings of each other only, because they follow a hint of the verifier. A child takes
    part if a model wrote some of it and it has at least `extract.step_min_visits` visits, or an estimate where
    `extract.step_value` asks for it. A node at which a chain has failed is not taken as the best one, whatever reward
    functions say of the chain. Best and worst are determined by value, then by more visits, then by smaller token ids,
    then by fewer forced tokens. The values of a pair differ by at least `extract.step_min_gap`, and its texts differ.
    The pairs are ordered by the token ids of the prefix, the better node and the worse node.
    """
    if not config.step_preferences:
        return []
    siblings = defaultdict(list)
    least = config.step_min_visits if config.step_value == "mean" else 1
    for number, step in _steps(tree, codec, _records(tree, config.step_value)).items():
        if tree.nodes[number].generated and step.visits >= least:
            siblings[tree.nodes[number].parent, tree.nodes[number].backtrack].append((tree.nodes[number].defect, step))
    pairs = []
    for steps in siblings.values():
        whole = [step for defect, step in steps if defect is None]
        worst = min((step for _, step in steps), key=lambda step: (step.value, -step.visits, _place(step), step.forced))
        best = min(whole, key=lambda step: (-step.value, -step.visits, _place(step), step.forced), default=worst)
        if best.value - worst.value > config.step_min_gap - ROUNDING and best.text != worst.text:
            pairs.append((best, worst))
    ordered = sorted(pairs, key=lambda pair: [(_place(step), -step.value, -step.visits, step.forced) for step in pair])
    unique: dict[object, tuple[StepValue, StepValue]] = {}
    for pair in ordered:
        unique.setdefault(tuple(_place(step) for step in pair), pair)
    return list(unique.values())


def step_preference(better: StepValue, worse: StepValue) -> StepPreference:
    return StepPreference(
        prefix_ids=better.token_ids[: better.start],
        chosen_ids=better.token_ids[better.start :],
        rejected_ids=worse.token_ids[worse.start :],
        chosen_value=better.value,
        rejected_value=worse.value,
        chosen_visits=better.visits,
        rejected_visits=worse.visits,
    )


def unhinted(tree: Tree) -> list[tuple[int, float]]:
    """Return visits and sum of rewards of every node, without the chains that backtracked below it.

    Such a chain was told that an earlier answer is wrong, which the policy is not told when it is used.
    """
    nodes = tree.nodes
    left_out = [(0, 0.0)] * len(nodes)
    for number in range(len(nodes) - 1, 0, -1):  # a child has a larger number than its parent
        node = nodes[number]
        visits, total = (node.visits, node.total) if node.backtrack else left_out[number]
        above = left_out[node.parent]
        left_out[node.parent] = above[0] + visits, above[1] + total
    pairs = zip(nodes, left_out, strict=True)
    return [(node.visits - visits, node.total - total) for node, (visits, total) in pairs]


def step_values(tree: Tree, codec: Codec, value: StepValueRule = "mean") -> list[StepValue]:
    """Return all nodes with a value (see `_records`), ordered by token ids.

    Nodes with equal tokens, text and type become one, with the mean value over all visits. A token counts as generated
    if a model generated it in at least one of them.
    """
    pools, records = defaultdict(list), _records(tree, value)
    for number, step in _steps(tree, codec, records).items():
        pools[_place(step)].append((step, records[number][1]))
    merged = []
    for _, pool in sorted(pools.items()):
        step, visits = pool[0][0], sum(step.visits for step, _ in pool)
        merged.append(
            StepValue(
                prefix=step.prefix,
                text=step.text,
                type=step.type,
                token_ids=step.token_ids,
                start=step.start,
                forced=min(step.forced for step, _ in pool),
                value=math.fsum(total for _, total in pool) / visits,  # fsum is exact, so the order has no influence
                visits=visits,
            )
        )
    return merged


def token_origins(tree: Tree, number: int, codec: Codec) -> dict[str, int]:
    """Return the token counts of a chain by origin.

    The policy chose the tokens of `policy`. The search put the tokens of `forced` into the policy's nodes, or into
    nodes that no model wrote. `other_model` counts all tokens of nodes that search.model or search.reviewer wrote.
    """
    path = path_tokens(tree, number, codec)
    counts = {"policy": 0, "forced": 0, "other_model": 0}
    for n, start, stop in path.spans:
        node, own = tree.nodes[n], int(path.chosen[start:stop].sum())
        counts["policy"] += own
        counts["forced" if node.writer == "policy" or not node.generated else "other_model"] += stop - start - own
    return counts


def is_wrong(node: ThoughtNode) -> bool:
    """Return whether a node is a scored answer that is wrong."""
    return node.scored >= 0 and not node.correct


def _chains(tree: Tree, codec: Codec, accepts: Callable[[ThoughtNode], bool]) -> list[Chain]:
    """Return the complete chains whose terminal node `accepts` allows, without repeated token ids."""
    unique: dict[bytes, Chain] = {}
    numbers = [n for n in tree.answers() if tree.nodes[n].visits and accepts(tree.nodes[n])]
    for chain in sorted((_chain(tree, n, codec) for n in numbers), key=tie):
        unique.setdefault(chain.token_ids.tobytes(), chain)
    return list(unique.values())


def _chain(tree: Tree, number: int, codec: Codec) -> Chain:
    path = path_tokens(tree, number, codec)
    thoughts = [tree.nodes[n] for n in tree.path(number) if tree.nodes[n].type != ENVIRONMENT]
    values = [value for node in thoughts if (value := node.value) is not None]
    verdict = tree.nodes[number].verdict
    token_ids, written = with_end(path.token_ids, codec), None
    if replies := [span for span in path.spans if tree.nodes[span[0]].type == ENVIRONMENT]:
        written = np.ones(len(token_ids), dtype=np.bool_)
        for _, start, stop in replies:
            written[start:stop] = False
    return Chain(
        number=number,
        token_ids=token_ids,
        prompt_length=path.prompt_length,
        text=tree.completion(number),
        value=sum(values) / len(values),
        reward=verdict.reward if verdict else 0.0,
        nodes=tuple((stop, tree.nodes[n].visits, tree.nodes[n].type) for n, _, stop in path.spans),
        backtracks=sum(node.backtrack for node in thoughts),
        written=written,
    )


def with_end(token_ids: Int32Array, codec: Codec) -> Int32Array:
    """Append the end token, unless the writer of the chain ended it with one."""
    if int(token_ids[-1]) in codec.end_token_ids:
        return token_ids
    return np.append(token_ids, np.int32(codec.end_token_id))


def _records(tree: Tree, value: StepValueRule) -> list[tuple[int, float]]:
    """Return visits and sum of values of every node.

    mean: see `unhinted`. estimate: an estimate counts as the only visit; nodes without one have no visit.
    """
    if value == "mean":
        return unhinted(tree)
    return [(0, 0.0) if node.estimate is None else (1, node.estimate) for node in tree.nodes]


def _steps(tree: Tree, codec: Codec, records: Sequence[tuple[int, float]]) -> dict[int, StepValue]:
    """Return all nodes with visits by number."""
    steps: dict[int, StepValue] = {}
    # A child has a larger number than its parent, so this order encodes every path only once, from its last node.
    for number in range(len(tree.nodes) - 1, 0, -1):
        if records[number][0] and number not in steps:
            path = path_tokens(tree, number, codec)
            spans = [span for span in path.spans if span[0] not in steps and records[span[0]][0]]
            steps |= {span[0]: _step(tree, path, codec, *span, records[span[0]]) for span in spans}
    return steps


def _step(
    tree: Tree, path: PathTokens, codec: Codec, number: int, start: int, stop: int, record: tuple[int, float]
) -> StepValue:
    node = tree.nodes[number]
    native = tree.tokenizers[node.writer] == codec.digest
    forced = node.forced if native else 0 if node.generated else stop - start
    return StepValue(
        prefix=tree.completion(node.parent),
        text=node.text,
        type=node.type,
        token_ids=path.token_ids[:stop],
        start=start,
        forced=forced,
        value=record[1] / record[0],
        visits=record[0],
    )


def _place(step: StepValue) -> tuple[bytes, bytes, str, str, str]:
    """Return the identity of a node, independent of its number."""
    prefix_ids, own_ids = step.token_ids[: step.start], step.token_ids[step.start :]
    return order_key(prefix_ids), order_key(own_ids), step.prefix, step.text, step.type
