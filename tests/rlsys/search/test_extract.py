"""Training data from trees: by hand on a golden tree, and properties of all trees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_samples import END, OTHER_END, PROMPT, CharCodec, answer, golden, ids, node, plain, renumbered, tree, trees

from rlsys.config.search import ChainRule, ExtractConfig
from rlsys.search import extract
from rlsys.search.paths import path_tokens
from rlsys.search.supervised import chain_rows, supervised_rows
from rlsys.trees import Tree
from rlsys.types import Demonstration, Preference

CODEC = CharCodec()
RULES = ("highest_value", "longest", "median", "shortest", "by_difficulty", "retrospective")


def picked(of: Tree, rule: ChainRule, codec: CharCodec) -> int | None:
    """Return the number of the last node of the chain of a rule."""
    chain = extract.pick_chain(of, rule, codec)
    return chain.number if chain else None


def demonstration(of: Tree, number: int, codec: CharCodec) -> Demonstration:
    """Return the row of a whole correct chain."""
    (chain,) = [chain for chain in extract.correct_chains(of, codec) if chain.number == number]
    (row,) = chain_rows(of, chain, ExtractConfig(), codec)
    return row.demonstration


def text(token_ids: np.ndarray) -> str:
    """Return the text of token ids, with ^ $ and ! for PROMPT, END and OTHER_END."""
    marks = {PROMPT: "^", END: "$", OTHER_END: "!"}
    return "".join(marks.get(token, chr(token)) for token in token_ids.tolist())


def sides(pairs: list[Preference]) -> list[tuple[str, str, int]]:
    return [(text(pair.chosen_ids), text(pair.rejected_ids), pair.common) for pair in pairs]


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        # Lengths with the end token: 6 of number 3, 7 of numbers 6 and 10, 8 of number 13.
        ("shortest", 3),
        ("longest", 13),
        ("median", 6),  # the second of 6, 7, 7, 8; aabcdX sorts before effffX
        # The means of the node values are (1/2 + 1/2 + 1) / 3 = 0.667 for 3 and 6, and (2/5 + 2/3 + 1) / 3 = 0.689
        # for 10 and 13. Of the latter, effffX$ has the smaller ids, because $ is 0.
        ("highest_value", 10),
        ("none", None),
    ],
)
def test_the_chain_of_a_rule(rule: ChainRule, number: int | None) -> None:
    assert picked(golden(), rule, CODEC) == number


def test_the_value_of_a_chain() -> None:
    chain = extract.pick_chain(golden(), "highest_value", CODEC)
    assert chain is not None
    assert chain.value == pytest.approx((2 / 5 + 2 / 3 + 1) / 3, rel=1e-12)
    assert (chain.reward, chain.length, chain.text) == (1.0, 7, "effffX")


def test_an_even_number_of_chains_and_an_odd_one() -> None:
    two = tree(answer(0, "aaa", "ok"), answer(0, "b", "ok"))
    assert picked(two, "median", CODEC) == 2
    three = tree(answer(0, "aaa", "ok"), answer(0, "b", "ok"), answer(0, "cc", "ok"))
    assert picked(three, "median", CODEC) == 3


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_without_a_correct_chain_has_none(rule: ChainRule) -> None:
    wrong = tree(node(0, "a"), answer(1, "b", "wrong"), answer(1, "c", "timeout"))
    assert picked(wrong, rule, CODEC) is None
    assert extract.preference_pairs(wrong, ExtractConfig(chosen=rule), CODEC) == []


def test_a_demonstration_is_the_prompt_the_chain_and_one_end_token() -> None:
    row = demonstration(golden(), 3, CODEC)
    assert text(row.token_ids) == "^qaabbX$"
    assert row.loss_mask.tolist() == [False] * 2 + [True] * 6


def test_an_end_token_that_the_policy_chose_stays_and_is_the_only_one() -> None:
    ended = tree(answer(0, "a", "ok", token_ids=ids("a", OTHER_END)), answer(0, "b", "wrong", token_ids=ids("b", END)))
    assert text(demonstration(ended, 1, CODEC).token_ids) == "^qa!"
    assert sides(extract.preference_pairs(ended, ExtractConfig(), CODEC)) == [("^qa!", "^qb$", 2)]


def test_rejected_chains_share_the_shortest_prefix() -> None:
    # With ^qaabbX$ (shortest), ehhhu and effffw share only the 2 tokens of the prompt, and ehhhu has the same length.
    # aabcdz shares 2 + 3 tokens and aabby 2 + 4. The chain whose verifier failed (effffv) is not used.
    expected = [
        ("^qaabbX$", "^qehhhu$", 2),
        ("^qaabbX$", "^qeffffw$", 2),
        ("^qaabbX$", "^qaabcdz$", 5),
        ("^qaabbX$", "^qaabby$", 6),
    ]
    assert sides(extract.preference_pairs(golden(), ExtractConfig(), CODEC)) == expected[:1]
    assert sides(extract.preference_pairs(golden(), ExtractConfig(pairs_per_tree=3), CODEC)) == expected[:3]
    assert sides(extract.preference_pairs(golden(), ExtractConfig(pairs_per_tree=9), CODEC)) == expected


def test_the_visits_of_a_pair_are_those_of_the_nodes_where_it_diverges() -> None:
    pairs = extract.preference_pairs(golden(), ExtractConfig(pairs_per_tree=9), CODEC)
    # From aabbX, ehhhu and effffw diverge in nodes 1 and 8, aabcdz diverges in 2 and 5, and aabby in the answers.
    assert [(pair.chosen_visits, pair.rejected_visits) for pair in pairs] == [(4, 5), (4, 5), (2, 2), (1, 1)]


def test_chains_do_not_diverge_in_nodes_of_equal_tokens() -> None:
    # Both nodes "a" have other visits (2 and 3) than the answers in which the chains diverge.
    two_equal = tree(
        node(0, "a"), answer(1, "b", "ok"), answer(1, "d", "wrong"),
        node(0, "a", backtrack=True), answer(4, "c", "wrong", samples=3),
    )  # fmt: skip
    pair = extract.preference_pairs(two_equal, ExtractConfig(max_backtracks=None), CODEC)[0]
    assert (sides([pair]), pair.chosen_visits, pair.rejected_visits) == ([("^qab$", "^qac$", 3)], 1, 3)
    # A chain that was told of a wrong answer is on no side by default.
    pair = extract.preference_pairs(two_equal, ExtractConfig(), CODEC)[0]
    assert sides([pair]) == [("^qab$", "^qad$", 3)]


def test_pairs_follow_the_rule_of_the_chosen_side() -> None:
    # With ^qeffffXx$ (longest, 8 tokens), all share the prompt alone. aabcdz (7) is closer in length than aabby (6).
    pairs = extract.preference_pairs(golden(), ExtractConfig(chosen="longest", pairs_per_tree=2), CODEC)
    assert sides(pairs) == [("^qeffffXx$", "^qaabcdz$", 2), ("^qeffffXx$", "^qaabby$", 2)]
    assert extract.preference_pairs(golden(), ExtractConfig(chosen="none"), CODEC) == []


def test_token_ids_order_pairs_of_equal_prefix_and_length() -> None:
    three = tree(answer(0, "c", "wrong"), answer(0, "b", "wrong"), answer(0, "a", "ok"))
    assert sides(extract.preference_pairs(three, ExtractConfig(), CODEC)) == [("^qa$", "^qb$", 2)]


def test_a_chain_that_begins_with_the_other_differs_in_the_end_token() -> None:
    one = tree(node(0, "a"), answer(1, "b", "ok"), answer(1, "bc", "wrong"))
    pair = extract.preference_pairs(one, ExtractConfig(), CODEC)[0]
    assert sides([pair]) == [("^qab$", "^qabc$", 4)]
    assert pair.prompt_length == 2
    assert (pair.chosen_visits, pair.rejected_visits) == (1, 1)  # visits of the answers; the node before has 2


def test_chains_of_equal_tokens_are_not_a_pair() -> None:
    same = tree(node(0, "a"), answer(1, "bc", "ok"), node(0, "ab"), answer(3, "c", "wrong"))
    assert extract.preference_pairs(same, ExtractConfig(), CODEC) == []


@pytest.mark.parametrize("outcome", ["error", "timeout"])
def test_a_chain_that_was_not_judged_is_not_a_rejected_side(outcome: Any) -> None:
    unjudged = tree(answer(0, "a", "ok"), answer(0, "b", outcome))
    assert extract.preference_pairs(unjudged, ExtractConfig(), CODEC) == []


def test_an_answer_judged_without_reward_is_wrong() -> None:
    unrewarded = tree(answer(0, "a", "ok"), answer(0, "b", "ok", reward=0.0))
    assert sides(extract.preference_pairs(unrewarded, ExtractConfig(), CODEC)) == [("^qa$", "^qb$", 2)]


def steps(of: Tree, **config: Any) -> list[tuple[Any, ...]]:
    pairs = extract.step_preferences(of, ExtractConfig(**{"step_min_visits": 2, **config}), CODEC)
    return [
        (text(s.prefix_ids), text(s.chosen_ids), text(s.rejected_ids), s.chosen_value, s.rejected_value,
         s.chosen_visits, s.rejected_visits)
        for s in pairs
    ]  # fmt: skip


def test_step_preferences_by_hand() -> None:
    # With 2 visits or more: aa (1/2) and e (2/5) differ by 0.1, bb and bcd by 0, ffff (2/3) and hhh (0) by 0.67.
    below_e = ("^qe", "ffff", "hhh", 2 / 3, 0.0, 3, 2)
    assert steps(golden()) == [below_e]
    assert steps(golden(), step_min_gap=0.1) == [("^q", "aa", "e", 0.5, 0.4, 4, 5), below_e]
    assert steps(golden(), step_min_gap=0.7) == []
    # With 1 visit the answers take part. Below effff the best is X, with smaller ids than Xx; v was not judged.
    assert steps(golden(), step_min_visits=1) == [
        ("^qaabb", "X", "y", 1.0, 0.0, 1, 1),
        ("^qaabcd", "X", "z", 1.0, 0.0, 1, 1),
        below_e,
        ("^qeffff", "X", "w", 1.0, 0.0, 1, 1),
    ]
    assert steps(golden(), step_preferences=False) == []


def test_steps_by_estimates_need_no_visits() -> None:
    """Estimates of three siblings, of which the first was pruned, and no rewards. The fourth one has none."""
    kinds = ((0.2, "pruned"), (0.5, None), (0.9, None), (None, None))
    names = zip(("a", "b", "c", "d"), kinds, strict=True)
    of = tree(*(replace(node(0, name), estimate=value, defect=defect) for name, (value, defect) in names))
    assert steps(of) == []
    assert steps(of, step_value="estimate") == [("^q", "c", "a", 0.9, 0.2, 1, 1)]
    values = extract.step_values(of, CODEC, "estimate")
    assert [(step.text, step.value, step.visits) for step in values] == [("a", 0.2, 1), ("b", 0.5, 1), ("c", 0.9, 1)]


def test_one_pair_a_parent_of_the_best_and_the_worst_by_value_then_visits() -> None:
    several = tree(
        *(node(0, name) for name in "abcd"),
        answer(1, "1", "ok", samples=2),
        answer(2, "1", "ok", samples=3),  # the value of a, with more visits
        answer(3, "2", "wrong", samples=2),
        answer(4, "2", "wrong", samples=2),  # the value and visits of c, which has smaller ids
    )
    assert steps(several) == [("^q", "b", "c", 1.0, 0.0, 3, 2)]


def test_steps_after_a_hint_are_compared_with_each_other_only() -> None:
    several = tree(
        node(0, "a"),
        node(0, "b", "reflection", backtrack=True),  # right after a hint of the verifier
        node(0, "c", "reflection", backtrack=True),
        answer(1, "2", "wrong", samples=2),
        answer(2, "1", "ok", samples=2),
        answer(3, "2", "wrong", samples=2),
    )
    assert steps(several) == [("^q", "b", "c", 1.0, 0.0, 2, 2)]
    plain = replace(several, nodes=tuple(replace(n, backtrack=False) for n in several.nodes))
    assert steps(plain) == [("^q", "b", "a", 1.0, 0.0, 2, 2)]


def test_a_step_that_no_model_wrote_is_not_used() -> None:
    fixed = tree(
        node(0, "ab"),
        node(0, "cd", "reflection", forced=2),
        answer(1, "1", "ok", samples=2),
        answer(2, "2", "wrong", samples=2),
    )
    assert steps(fixed) == []
    partly = replace(fixed, nodes=tuple(replace(n, forced=min(n.forced, 1)) for n in fixed.nodes))
    assert steps(partly) == [("^q", "ab", "cd", 1.0, 0.0, 2, 2)]


def test_step_values_by_hand() -> None:
    small = tree(node(0, "a", "sub_task"), node(1, "c"), node(1, "b"), answer(3, "1", "ok"), answer(3, "2", "wrong"))
    values = [(s.prefix, s.text, s.type, text(s.token_ids), s.start, s.value, s.visits)
              for s in extract.step_values(small, CODEC)]  # fmt: skip
    assert values == [  # c has no visits
        ("", "a", "sub_task", "^qa", 2, 0.5, 2),
        ("a", "b", "thinking", "^qab", 3, 0.5, 2),
        ("ab", "1", "answer", "^qab1", 4, 1.0, 1),
        ("ab", "2", "answer", "^qab2", 4, 0.0, 1),
    ]


def test_equal_nodes_are_pooled() -> None:
    twice = tree(node(0, "a"), answer(1, "1", "ok", samples=3), node(0, "a"), answer(3, "2", "wrong"))
    values = {s.prefix + s.text: (s.value, s.visits) for s in extract.step_values(twice, CODEC)}
    assert values == {"a": (0.75, 4), "a1": (1.0, 3), "a2": (0.0, 1)}


def test_the_pooled_value_does_not_depend_on_the_order_of_the_sum() -> None:
    # In floating point, (0.1 + 0.2) + 0.3 differs from (0.3 + 0.2) + 0.1.
    def pooled(*rewards: float) -> float:
        below = [n for i, r in enumerate(rewards) for n in (node(0, "a"), answer(2 * i + 1, str(r), "ok", r))]
        return extract.step_values(tree(*below), CODEC)[0].value

    assert pooled(0.1, 0.2, 0.3) == pooled(0.3, 0.2, 0.1) == pytest.approx(0.2)


def test_equal_parents_give_one_pair() -> None:
    below = [
        n
        for first in (1, 4)
        for n in (node(0, "a"), answer(first, "1", "ok", samples=2), answer(first, "2", "wrong", samples=2))
    ]
    assert steps(tree(*below)) == [("^qa", "1", "2", 1.0, 0.0, 2, 2)]


def test_nodes_of_another_tokenizer_become_tokens_of_the_policy() -> None:
    mixed = tree(
        node(0, "ab", token_ids=ids("", 9), writer="model"),
        answer(1, "c", "ok", token_ids=ids("", 8), writer="model"),
        tokenizers={"model": "other"},
        prompt_token_ids={"model": ids("", 5)},
    )
    assert text(demonstration(mixed, 2, CODEC).token_ids) == "^qabc$"
    assert [text(s.token_ids) for s in extract.step_values(mixed, CODEC)] == ["^qab", "^qabc"]


def generated(of: Tree) -> dict[str, str]:
    """Return, by the text of a chain, the letters of its last node that a model generated."""
    return {s.prefix + s.text: text(s.token_ids[s.loss_mask]) for s in extract.step_values(of, CODEC)}


def test_the_mask_of_a_step_marks_generated_tokens() -> None:
    mixed = tree(
        node(0, "abcd", forced=3),
        node(1, "ef", "reflection", forced=2, writer="reviewer"),  # no model wrote it
        node(2, "ghi", forced=1, writer="reviewer"),
        answer(3, "j", "ok", token_ids=ids("j", END)),
        tokenizers={"policy": "letters", "reviewer": "letters"},
    )
    chains = {"abcd": "d", "abcdef": "", "abcdefghi": "hi", "abcdefghij": "j$"}
    assert generated(mixed) == chains
    # For a node in another tokenizer it is only known whether a model wrote any part of it.
    foreign = replace(mixed, tokenizers={"policy": "letters", "reviewer": "other"})
    assert generated(foreign) == {**chains, "abcdefghi": "ghi"}


def test_the_mask_of_pooled_steps_is_that_of_the_most_generated_tokens() -> None:
    for first, second in ((2, 1), (1, 2)):
        below = [node(0, "abc", forced=first), node(0, "abc", forced=second)]
        assert generated(tree(*below, answer(1, "1", "ok"), answer(2, "1", "ok")))["abc"] == "bc"


def test_the_origins_of_the_tokens_of_a_chain() -> None:
    mixed = tree(
        node(0, "abcd", forced=3),
        node(1, "ef", "reflection", forced=2, writer="reviewer"),  # no model wrote it
        node(2, "ghi", forced=1, writer="reviewer"),
        answer(3, "j", "ok"),
        tokenizers={"policy": "letters", "reviewer": "letters"},
    )
    # policy: d and j; forced: abc and ef; other_model: ghi
    assert extract.token_origins(mixed, 4, CODEC) == {"policy": 2, "forced": 5, "other_model": 3}


def everything(of: Tree, config: ExtractConfig) -> Any:
    """Return everything that is extracted, as comparable values without node numbers."""
    chains = [extract.pick_chain(of, rule, CODEC) for rule in RULES]
    rows = [supervised_rows(of, config.model_copy(update={"supervised": rule}), CODEC) for rule in RULES]
    return plain((
        [row.demonstration for each in rows for row in each],
        [None if chain is None else replace(chain, number=0) for chain in chains],
        extract.preference_pairs(of, config, CODEC),
        extract.step_preferences(of, config, CODEC),
        extract.preferred_steps(of, config, CODEC),
        extract.step_values(of, CODEC),
    ))  # fmt: skip


CONFIGS = st.builds(
    ExtractConfig,
    chosen=st.sampled_from(RULES),
    supervised_rows=st.sampled_from(["chain", "node"]),
    pairs_per_tree=st.integers(1, 4),
    step_min_visits=st.integers(1, 2),
    step_min_gap=st.sampled_from((0.05, 0.5)),
)


@given(of=trees(), config=CONFIGS, order=st.permutations(range(15)))
def test_the_order_of_the_nodes_changes_nothing(of: Tree, config: ExtractConfig, order: list[int]) -> None:
    assert everything(renumbered(of, order), config) == everything(of, config)


@given(order=st.permutations(range(17)))
def test_the_order_of_the_nodes_of_the_golden_tree_changes_nothing(order: list[int]) -> None:
    config = ExtractConfig(pairs_per_tree=4, step_min_visits=1)
    assert everything(renumbered(golden(), order), config) == everything(golden(), config)


def completions(of: Tree, correct: bool) -> set[str]:
    judged = [n for n in of.answers() if of.nodes[n].verdict.outcome in ("ok", "wrong")]  # type: ignore[union-attr]
    numbers = [n for n in judged if of.nodes[n].correct == correct]
    return {text(extract.with_end(path_tokens(of, n, CODEC).token_ids, CODEC)) for n in numbers}


@given(of=trees(), config=CONFIGS)
def test_properties_of_every_pair(of: Tree, config: ExtractConfig) -> None:
    pairs = extract.preference_pairs(of, config, CODEC)
    assert len(pairs) <= config.pairs_per_tree
    assert [pair.common for pair in pairs] == sorted(pair.common for pair in pairs)
    assert len({text(pair.rejected_ids) for pair in pairs}) == len(pairs)
    wrong, right = completions(of, False), completions(of, True)
    for pair in pairs:
        chosen, rejected, common = text(pair.chosen_ids), text(pair.rejected_ids), pair.common
        assert chosen in right and rejected in wrong
        assert chosen[:common] == rejected[:common] and chosen[common] != rejected[common]
        assert chosen.count("$") + chosen.count("!") == 1 and chosen[-1] in "$!"
        assert common >= pair.prompt_length
    possible = [w for w in wrong if pairs and w != text(pairs[0].chosen_ids)]
    assert len(pairs) == min(config.pairs_per_tree, len(possible))


@given(of=trees(), config=CONFIGS)
def test_properties_of_every_step(of: Tree, config: ExtractConfig) -> None:
    values = extract.step_values(of, CODEC)
    visited = [n for n, node in enumerate(of.nodes) if n and node.visits]
    assert sum(step.visits for step in values) == sum(of.nodes[n].visits for n in visited)
    assert {step.prefix + step.text for step in values} == {of.completion(n) for n in visited}
    whole = {text(path_tokens(of, n, CODEC).token_ids) for n in visited}
    assert {text(step.token_ids) for step in values} == whole
    for pair in extract.step_preferences(of, config, CODEC):
        assert pair.chosen_value - pair.rejected_value > config.step_min_gap - 1e-8
        assert min(pair.chosen_visits, pair.rejected_visits) >= config.step_min_visits
        for side in (pair.chosen_ids, pair.rejected_ids):
            assert text(np.concatenate([pair.prefix_ids, side])) in whole
