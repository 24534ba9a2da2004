"""Training data out of finished trees.

Nothing depends on the order of a node's children: ties go by token ids and texts, never by node numbers.
Token ids are the policy's throughout (`rlsys.search.paths`). Lengths are in tokens and relative to one tree.

Source: Marco-o1 v2, arXiv:2503.01461, sec. 3 and 4 (chains, pairs, thoughts length balance, prefix masking).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rlsys.config.search import ExtractConfig
from rlsys.search.paths import Codec as PathCodec
from rlsys.search.paths import PathTokens, path_tokens
from rlsys.trees import ThoughtNode, Tree
from rlsys.types import BoolArray, Demonstration, Int32Array, Preference, StepPreference

ROUNDING = 1e-9
"""Values are quotients: 0.5 - 0.4 counts as a difference of 0.1."""

Rule = Literal["highest_value", "longest", "median", "shortest", "none"]


class Codec(PathCodec, Protocol):
    """What is needed of the policy's tokenizer; see `rlsys.search.codec.TagCodec`."""

    end_token_id: int
    end_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A judged chain of a tree.

    number: its terminal node. token_ids: [T] int32, the prompt first, one end token last.
    value: mean over its nodes of their search values (mean reward of the scored answers below and at a node).
    nodes: where each of its nodes ends in token_ids, and how many visits it has.
    """

    number: int
    token_ids: Int32Array
    prompt_length: int
    text: str
    value: float
    reward: float
    nodes: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens after the prompt, the end token included."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValue:
    """What the search found a thought node to be worth.

    prefix: text of the chain before the node. text: the node's.
    token_ids: [T] int32, the prompt, the chain before and the node; the node's own are token_ids[start:].
    forced: how many of those, the first ones, no model generated. Of a node that was encoded from its text it is not
        known: none, or all where nobody wrote the node.
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
        """[T] bool, True on the tokens of the node that a model generated."""
        return np.arange(len(self.token_ids)) >= self.start + self.forced


def supervised_chain(tree: Tree, rule: Rule, codec: Codec) -> int | None:
    """Number of the terminal node of the correct chain that a rule picks; None without one, or for "none".

    `longest` and `shortest` go by tokens after the prompt, `median` is the lower one of an even number, and
    `highest_value` is the largest mean, over the nodes of the chain, of their values: mean rewards of the scored
    answers below and at a node. Ties: the smallest token ids, compared from the left.
    """
    found = pick_chain(tree, rule, codec)
    return found.number if found else None


def pick_chain(tree: Tree, rule: Rule, codec: Codec) -> Chain | None:
    """The chain of `supervised_chain`."""
    if rule == "none":
        return None
    chains = _chains(tree, codec, lambda node: node.correct)
    if not chains:
        return None
    if rule == "median":
        return sorted(chains, key=lambda chain: (chain.length, *_tie(chain)))[(len(chains) - 1) // 2]
    measure: dict[Rule, Callable[[Chain], float]] = {
        "highest_value": lambda chain: -chain.value,
        "longest": lambda chain: -chain.length,
        "shortest": lambda chain: chain.length,
    }
    return min(chains, key=lambda chain: (measure[rule](chain), *_tie(chain)))


def demonstration(tree: Tree, number: int, codec: Codec) -> Demonstration:
    """A complete chain as a supervised row: prompt, chain, end token; everything after the prompt is trained on."""
    path = path_tokens(tree, number, codec)
    token_ids = _ended(path.token_ids, codec)
    return Demonstration(token_ids=token_ids, loss_mask=np.arange(len(token_ids)) >= path.prompt_length)


def preference_pairs(tree: Tree, config: ExtractConfig, codec: Codec) -> list[Preference]:
    """Preference pairs of a tree, see `preferred_chains`."""
    return [preference(chosen, rejected) for chosen, rejected in preferred_chains(tree, config, codec)]


def preferred_chains(tree: Tree, config: ExtractConfig, codec: Codec) -> list[tuple[Chain, Chain]]:
    """Pairs of a correct chain and a wrong one, the shortest common token prefix first.

    The correct one is that of `extract.chosen`. The wrong ones are judged wrong (never those whose verifier failed),
    complete, and share as few tokens with it as there are; ties go to the closest length, then to the token ids.
    The end token counts, so that of two chains one of which begins with the other, one has only it to differ in.
    At most `extract.pairs_per_tree`.
    """
    chosen = pick_chain(tree, config.chosen, codec)
    if chosen is None:
        return []
    ranked = []
    for wrong in _chains(tree, codec, is_wrong):
        common = common_prefix(chosen.token_ids, wrong.token_ids)
        if common < min(len(chosen.token_ids), len(wrong.token_ids)):
            ranked.append((common, abs(chosen.length - wrong.length), *_tie(wrong), wrong))
    ranked.sort(key=lambda entry: entry[:-1])
    return [(chosen, entry[-1]) for entry in ranked[: config.pairs_per_tree]]


def preference(chosen: Chain, rejected: Chain) -> Preference:
    """Two chains of one tree as a pair. Its visits are those of the nodes in which they part."""
    common = common_prefix(chosen.token_ids, rejected.token_ids)
    chosen_visits, rejected_visits = _branch_visits(chosen, rejected, common)
    return Preference(
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        prompt_length=chosen.prompt_length,
        common=common,
        chosen_visits=chosen_visits,
        rejected_visits=rejected_visits,
    )


def _branch_visits(chosen: Chain, rejected: Chain, common: int) -> tuple[int, int]:
    """Visits of the first two nodes, one of each chain, that do not both lie in the common prefix.

    Two nodes of equal tokens are no branches, though the tree has both: one of them may follow a hint.
    """
    both = list(zip(chosen.nodes, rejected.nodes, strict=False))
    parted = ((mine[1], other[1]) for mine, other in both if max(mine[0], other[0]) > common)
    return next(parted, (both[-1][0][1], both[-1][1][1]))  # chains that differ in their end tokens alone


def step_preferences(tree: Tree, config: ExtractConfig, codec: Codec) -> list[StepPreference]:
    """Pairs of sibling nodes, see `preferred_steps`."""
    return [step_preference(better, worse) for better, worse in preferred_steps(tree, config, codec)]


def preferred_steps(tree: Tree, config: ExtractConfig, codec: Codec) -> list[tuple[StepValue, StepValue]]:
    """Of every node with several children, the best against the worst of them: at most one pair a parent.

    Backtracking children are no siblings of the others, only of one another: they follow a hint of the verifier.

    Only children count that a model wrote at least in part and that have `extract.step_min_visits` visits. Best and
    worst are by value, then the more visits, then the smallest token ids, then the fewer forced ones. A pair needs a
    difference of at least `extract.step_min_gap`, and two texts. Ordered by the token ids of prefix, better and worse
    node.
    """
    if not config.step_preferences:
        return []
    siblings = defaultdict(list)
    for number, step in _steps(tree, codec).items():
        if tree.nodes[number].generated and step.visits >= config.step_min_visits:
            siblings[tree.nodes[number].parent, tree.nodes[number].backtrack].append(step)
    pairs = []
    for steps in siblings.values():
        best = min(steps, key=lambda step: (-step.value, -step.visits, _place(step), step.forced))
        worst = min(steps, key=lambda step: (step.value, -step.visits, _place(step), step.forced))
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


def step_values(tree: Tree, codec: Codec) -> list[StepValue]:
    """Every node with visits, ordered by token ids.

    Nodes of equal tokens, text and type are pooled by visits; a token that one of them generated counts as generated.
    """
    pools = defaultdict(list)
    for number, step in _steps(tree, codec).items():
        pools[_place(step)].append((step, tree.nodes[number].total))
    found = []
    for _, pool in sorted(pools.items()):
        step, visits = pool[0][0], sum(step.visits for step, _ in pool)
        found.append(
            StepValue(
                prefix=step.prefix,
                text=step.text,
                type=step.type,
                token_ids=step.token_ids,
                start=step.start,
                forced=min(step.forced for step, _ in pool),
                value=math.fsum(total for _, total in pool) / visits,  # exact, so in any order the same
                visits=visits,
            )
        )
    return found


def common_prefix(first: Int32Array, second: Int32Array) -> int:
    """Length of the longest common prefix, in tokens."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def token_origins(tree: Tree, number: int, codec: Codec) -> dict[str, int]:
    """Tokens of a chain, by who they are from.

    `policy` chose them itself, `forced` were put into what it wrote or were written by nobody, and `other_model` are
    all tokens of nodes that search.model or search.reviewer wrote.
    """
    path = path_tokens(tree, number, codec)
    found = {"policy": 0, "forced": 0, "other_model": 0}
    for n, start, stop in path.spans:
        node, own = tree.nodes[n], int(path.chosen[start:stop].sum())
        found["policy"] += own
        found["forced" if node.writer == "policy" or not node.generated else "other_model"] += stop - start - own
    return found


def is_wrong(node: ThoughtNode) -> bool:
    """Whether a node ends a chain that the verifier judged, and not correct."""
    return node.verdict is not None and node.verdict.outcome in ("ok", "wrong") and not node.correct


def _chains(tree: Tree, codec: Codec, wanted: Callable[[ThoughtNode], bool]) -> list[Chain]:
    """The complete chains whose terminal node is as wanted, no two of the same token ids."""
    unique: dict[bytes, Chain] = {}
    numbers = [n for n in tree.answers() if tree.nodes[n].visits and wanted(tree.nodes[n])]
    for chain in sorted((_chain(tree, n, codec) for n in numbers), key=_tie):
        unique.setdefault(chain.token_ids.tobytes(), chain)
    return list(unique.values())


def _chain(tree: Tree, number: int, codec: Codec) -> Chain:
    path = path_tokens(tree, number, codec)
    values = [value for n in tree.path(number) if (value := tree.nodes[n].value) is not None]
    verdict = tree.nodes[number].verdict
    return Chain(
        number=number,
        token_ids=_ended(path.token_ids, codec),
        prompt_length=path.prompt_length,
        text=tree.completion(number),
        value=sum(values) / len(values),
        reward=verdict.reward if verdict else 0.0,
        nodes=tuple((stop, tree.nodes[n].visits) for n, _, stop in path.spans),
    )


def _ended(token_ids: Int32Array, codec: Codec) -> Int32Array:
    """With the end token, once; a chain that the writer ended keeps the one it chose."""
    if int(token_ids[-1]) in codec.end_token_ids:
        return token_ids
    return np.append(token_ids, np.int32(codec.end_token_id))


def _steps(tree: Tree, codec: Codec) -> dict[int, StepValue]:
    """All nodes with visits, by number."""
    found: dict[int, StepValue] = {}
    # Children have larger numbers than their parents, so every path is walked once, from its last node.
    for number in range(len(tree.nodes) - 1, 0, -1):
        if tree.nodes[number].visits and number not in found:
            path = path_tokens(tree, number, codec)
            found |= {step[0]: _step(tree, path, codec, *step) for step in path.spans if step[0] not in found}
    return found


def _step(tree: Tree, path: PathTokens, codec: Codec, number: int, start: int, stop: int) -> StepValue:
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
        value=node.total / node.visits,
        visits=node.visits,
    )


def _tie(chain: Chain) -> tuple[bytes, str, float, float, tuple[tuple[int, int], ...]]:
    """Order of chains that are otherwise equal: by all that becomes data."""
    return _sortable(chain.token_ids), chain.text, -chain.value, -chain.reward, chain.nodes


def _place(step: StepValue) -> tuple[bytes, bytes, str, str, str]:
    """Which node it is, without its number."""
    prefix_ids, own_ids = step.token_ids[: step.start], step.token_ids[step.start :]
    return _sortable(prefix_ids), _sortable(own_ids), step.prefix, step.text, step.type


def _sortable(token_ids: Int32Array) -> bytes:
    """Bytes in the order of the ids, compared from the left; ids are not negative."""
    return token_ids.astype(">i4").tobytes()
