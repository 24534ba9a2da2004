"""Training data of trees: by hand on a golden tree, and what holds for every tree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tree_samples import END, OTHER_END, PROMPT, CharCodec, answer, golden, ids, node, plain, renumbered, tree, trees

from rlsys.config.search import ExtractConfig
from rlsys.search import extract
from rlsys.search.paths import path_tokens
from rlsys.trees import Tree
from rlsys.types import Preference

CODEC = CharCodec()
RULES = ("highest_value", "longest", "median", "shortest")


def text(token_ids: np.ndarray) -> str:
    """PROMPT, END and OTHER_END as ^ $ and !."""
    marks = {PROMPT: "^", END: "$", OTHER_END: "!"}
    return "".join(marks.get(token, chr(token)) for token in token_ids.tolist())


def sides(pairs: list[Preference]) -> list[tuple[str, str, int]]:
    return [(text(pair.chosen_ids), text(pair.rejected_ids), pair.common) for pair in pairs]


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        # Lengths with the end token: 3 has 6, 6 and 10 have 7, 13 has 8.
        ("shortest", 3),
        ("longest", 13),
        ("median", 6),  # of 6 7 7 8 the second; aabcdX is before effffX
        # Means of the nodes' values: 3 and 6 (1/2 + 1/2 + 1) / 3 = 0.667; 10 and 13 (2/5 + 2/3 + 1) / 3 = 0.689,
        # of which effffX$ has the smaller ids: $ is 0.
        ("highest_value", 10),
        ("none", None),
    ],
)
def test_the_chain_of_a_rule(rule: extract.Rule, number: int | None) -> None:
    assert extract.supervised_chain(golden(), rule, CODEC) == number


def test_the_value_of_a_chain() -> None:
    chain = extract.pick_chain(golden(), "highest_value", CODEC)
    assert chain is not None
    assert chain.value == pytest.approx((2 / 5 + 2 / 3 + 1) / 3, rel=1e-12)
    assert (chain.reward, chain.length, chain.text) == (1.0, 7, "effffX")


def test_an_even_number_of_chains_and_an_odd_one() -> None:
    two = tree(answer(0, "aaa", "ok"), answer(0, "b", "ok"))
    assert extract.supervised_chain(two, "median", CODEC) == 2
    three = tree(answer(0, "aaa", "ok"), answer(0, "b", "ok"), answer(0, "cc", "ok"))
    assert extract.supervised_chain(three, "median", CODEC) == 3


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_without_a_correct_chain_has_none(rule: extract.Rule) -> None:
    wrong = tree(node(0, "a"), answer(1, "b", "wrong"), answer(1, "c", "timeout"))
    assert extract.supervised_chain(wrong, rule, CODEC) is None
    assert extract.preference_pairs(wrong, ExtractConfig(chosen=rule), CODEC) == []


def test_a_demonstration_is_the_prompt_the_chain_and_one_end_token() -> None:
    row = extract.demonstration(golden(), 3, CODEC)
    assert text(row.token_ids) == "^qaabbX$"
    assert row.loss_mask.tolist() == [False] * 2 + [True] * 6


def test_an_end_token_that_the_policy_chose_stays_and_is_the_only_one() -> None:
    ended = tree(answer(0, "a", "ok", token_ids=ids("a", OTHER_END)), answer(0, "b", "wrong", token_ids=ids("b", END)))
    assert text(extract.demonstration(ended, 1, CODEC).token_ids) == "^qa!"
    assert sides(extract.preference_pairs(ended, ExtractConfig(), CODEC)) == [("^qa!", "^qb$", 2)]


def test_rejected_chains_share_the_shortest_prefix() -> None:
    # Against ^qaabbX$ (shortest): ehhhu and effffw share only the prompt's 2 tokens, and ehhhu has the same length;
    # aabcdz shares 2 + 3, aabby 2 + 4. The chain whose verifier failed (effffv) is never among them.
    expected = [
        ("^qaabbX$", "^qehhhu$", 2),
        ("^qaabbX$", "^qeffffw$", 2),
        ("^qaabbX$", "^qaabcdz$", 5),
        ("^qaabbX$", "^qaabby$", 6),
    ]
    assert sides(extract.preference_pairs(golden(), ExtractConfig(), CODEC)) == expected[:1]
    assert sides(extract.preference_pairs(golden(), ExtractConfig(pairs_per_tree=3), CODEC)) == expected[:3]
    assert sides(extract.preference_pairs(golden(), ExtractConfig(pairs_per_tree=9), CODEC)) == expected


def test_the_visits_of_a_pair_are_those_of_the_branches_in_which_it_parts() -> None:
    pairs = extract.preference_pairs(golden(), ExtractConfig(pairs_per_tree=9), CODEC)
    # Against aabbX: ehhhu and effffw part from it in nodes 1 and 8, aabcdz in 2 and 5, aabby in the answers.
    assert [(pair.chosen_visits, pair.rejected_visits) for pair in pairs] == [(4, 5), (4, 5), (2, 2), (1, 1)]


def test_nodes_of_equal_tokens_are_no_branches() -> None:
    # Both nodes "a" have other visits (2 and 3) than the answers in which the chains part.
    of = tree(
        node(0, "a"), answer(1, "b", "ok"), answer(1, "d", "wrong"),
        node(0, "a", backtrack=True), answer(4, "c", "wrong", samples=3),
    )  # fmt: skip
    pair = extract.preference_pairs(of, ExtractConfig(), CODEC)[0]
    assert (sides([pair]), pair.chosen_visits, pair.rejected_visits) == ([("^qab$", "^qac$", 3)], 1, 3)


def test_pairs_follow_the_rule_of_the_chosen_side() -> None:
    # Against ^qeffffXx$ (longest, 8): aabcdz (7) is closer in length than aabby (6), the prompt is all they share.
    pairs = extract.preference_pairs(golden(), ExtractConfig(chosen="longest", pairs_per_tree=2), CODEC)
    assert sides(pairs) == [("^qeffffXx$", "^qaabcdz$", 2), ("^qeffffXx$", "^qaabby$", 2)]
    assert extract.preference_pairs(golden(), ExtractConfig(chosen="none"), CODEC) == []


def test_equal_prefix_and_length_go_by_token_ids() -> None:
    three = tree(answer(0, "c", "wrong"), answer(0, "b", "wrong"), answer(0, "a", "ok"))
    assert sides(extract.preference_pairs(three, ExtractConfig(), CODEC)) == [("^qa$", "^qb$", 2)]


def test_a_chain_that_begins_with_the_other_differs_in_the_end_token() -> None:
    one = tree(node(0, "a"), answer(1, "b", "ok"), answer(1, "bc", "wrong"))
    pair = extract.preference_pairs(one, ExtractConfig(), CODEC)[0]
    assert sides([pair]) == [("^qab$", "^qabc$", 4)]
    assert pair.prompt_length == 2
    assert (pair.chosen_visits, pair.rejected_visits) == (1, 1)  # of the answers, not of the node before, which has 2


def test_chains_of_equal_tokens_are_no_pair() -> None:
    same = tree(node(0, "a"), answer(1, "bc", "ok"), node(0, "ab"), answer(3, "c", "wrong"))
    assert extract.preference_pairs(same, ExtractConfig(), CODEC) == []


@pytest.mark.parametrize("outcome", ["error", "timeout"])
def test_a_chain_that_was_not_judged_is_no_rejected_side(outcome: Any) -> None:
    unjudged = tree(answer(0, "a", "ok"), answer(0, "b", outcome))
    assert extract.preference_pairs(unjudged, ExtractConfig(), CODEC) == []


def test_an_answer_judged_without_reward_is_wrong() -> None:
    unrewarded = tree(answer(0, "a", "ok"), answer(0, "b", "ok", reward=0.0))
    assert sides(extract.preference_pairs(unrewarded, ExtractConfig(), CODEC)) == [("^qa$", "^qb$", 2)]


def steps(of: Tree, **config: Any) -> list[tuple[Any, ...]]:
    found = extract.step_preferences(of, ExtractConfig(**config), CODEC)
    return [
        (text(s.prefix_ids), text(s.chosen_ids), text(s.rejected_ids), s.chosen_value, s.rejected_value,
         s.chosen_visits, s.rejected_visits)
        for s in found
    ]  # fmt: skip


def test_step_preferences_by_hand() -> None:
    # Two visits at least: aa 1/2 against e 2/5 differ by 0.1, bb and bcd not at all, ffff 2/3 and hhh 0 by 0.67.
    below_e = ("^qe", "ffff", "hhh", 2 / 3, 0.0, 3, 2)
    assert steps(golden()) == [below_e]
    assert steps(golden(), step_min_gap=0.1) == [("^q", "aa", "e", 0.5, 0.4, 4, 5), below_e]
    assert steps(golden(), step_min_gap=0.7) == []
    # One visit is enough: the answers too. Below effff the best is X, before Xx by its ids; v was never judged.
    assert steps(golden(), step_min_visits=1) == [
        ("^qaabb", "X", "y", 1.0, 0.0, 1, 1),
        ("^qaabcd", "X", "z", 1.0, 0.0, 1, 1),
        below_e,
        ("^qeffff", "X", "w", 1.0, 0.0, 1, 1),
    ]
    assert steps(golden(), step_preferences=False) == []


def test_one_pair_a_parent_of_the_best_and_the_worst_by_value_then_visits() -> None:
    several = tree(
        *(node(0, name) for name in "abcd"),
        answer(1, "1", "ok", samples=2),
        answer(2, "1", "ok", samples=3),  # as good as a, and better known
        answer(3, "2", "wrong", samples=2),
        answer(4, "2", "wrong", samples=2),  # as bad as c, which has the smaller ids
    )
    assert steps(several) == [("^q", "b", "c", 1.0, 0.0, 3, 2)]


def test_a_step_after_a_hint_is_compared_with_its_like_only() -> None:
    several = tree(
        node(0, "a"),
        node(0, "b", "reflection", backtrack=True),  # right, but only because the verifier had spoken
        node(0, "c", "reflection", backtrack=True),
        answer(1, "2", "wrong", samples=2),
        answer(2, "1", "ok", samples=2),
        answer(3, "2", "wrong", samples=2),
    )
    assert steps(several) == [("^q", "b", "c", 1.0, 0.0, 2, 2)]
    plain = replace(several, nodes=tuple(replace(n, backtrack=False) for n in several.nodes))
    assert steps(plain) == [("^q", "b", "a", 1.0, 0.0, 2, 2)]


def test_a_step_that_nobody_wrote_is_no_side() -> None:
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
    found = [(s.prefix, s.text, s.type, text(s.token_ids), s.start, s.value, s.visits)
             for s in extract.step_values(small, CODEC)]  # fmt: skip
    assert found == [  # c has no visits
        ("", "a", "sub_task", "^qa", 2, 0.5, 2),
        ("a", "b", "thinking", "^qab", 3, 0.5, 2),
        ("ab", "1", "answer", "^qab1", 4, 1.0, 1),
        ("ab", "2", "answer", "^qab2", 4, 0.0, 1),
    ]


def test_equal_nodes_are_pooled() -> None:
    twice = tree(node(0, "a"), answer(1, "1", "ok", samples=3), node(0, "a"), answer(3, "2", "wrong"))
    found = {s.prefix + s.text: (s.value, s.visits) for s in extract.step_values(twice, CODEC)}
    assert found == {"a": (0.75, 4), "a1": (1.0, 3), "a2": (0.0, 1)}


def test_the_pooled_value_does_not_depend_on_the_order_of_the_sum() -> None:
    # In floating point (0.1 + 0.2) + 0.3 is not (0.3 + 0.2) + 0.1.
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
    assert text(extract.demonstration(mixed, 2, CODEC).token_ids) == "^qabc$"
    assert [text(s.token_ids) for s in extract.step_values(mixed, CODEC)] == ["^qab", "^qabc"]


def generated(of: Tree) -> dict[str, str]:
    """For the text of every chain, the letters of its last node that a model generated."""
    return {s.prefix + s.text: text(s.token_ids[s.loss_mask]) for s in extract.step_values(of, CODEC)}


def test_the_mask_of_a_step_is_what_a_model_generated_there() -> None:
    mixed = tree(
        node(0, "abcd", forced=3),
        node(1, "ef", "reflection", forced=2, writer="reviewer"),  # written by nobody
        node(2, "ghi", forced=1, writer="reviewer"),
        answer(3, "j", "ok", token_ids=ids("j", END)),
        tokenizers={"policy": "letters", "reviewer": "letters"},
    )
    chains = {"abcd": "d", "abcdef": "", "abcdefghi": "hi", "abcdefghij": "j$"}
    assert generated(mixed) == chains
    # Of nodes in another tokenizer it is only known whether anybody wrote them.
    foreign = replace(mixed, tokenizers={"policy": "letters", "reviewer": "other"})
    assert generated(foreign) == {**chains, "abcdefghi": "ghi"}


def test_of_pooled_steps_the_one_that_generated_more_decides_the_mask() -> None:
    for first, second in ((2, 1), (1, 2)):
        below = [node(0, "abc", forced=first), node(0, "abc", forced=second)]
        assert generated(tree(*below, answer(1, "1", "ok"), answer(2, "1", "ok")))["abc"] == "bc"


def test_whose_tokens_a_chain_is_made_of() -> None:
    mixed = tree(
        node(0, "abcd", forced=3),
        node(1, "ef", "reflection", forced=2, writer="reviewer"),  # written by nobody
        node(2, "ghi", forced=1, writer="reviewer"),
        answer(3, "j", "ok"),
        tokenizers={"policy": "letters", "reviewer": "letters"},
    )
    # d and j; abc and ef; ghi
    assert extract.token_origins(mixed, 4, CODEC) == {"policy": 2, "forced": 5, "other_model": 3}


def everything(of: Tree, config: ExtractConfig) -> Any:
    """All that is extracted, by content."""
    chains = [extract.supervised_chain(of, rule, CODEC) for rule in RULES]
    rows = [None if n is None else extract.demonstration(of, n, CODEC) for n in chains]
    picked = [extract.pick_chain(of, rule, CODEC) for rule in RULES]
    return plain((
        rows,
        [None if chain is None else replace(chain, number=0) for chain in picked],
        extract.preference_pairs(of, config, CODEC),
        extract.step_preferences(of, config, CODEC),
        extract.preferred_steps(of, config, CODEC),
        extract.step_values(of, CODEC),
    ))  # fmt: skip


CONFIGS = st.builds(
    ExtractConfig,
    chosen=st.sampled_from(RULES),
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
    return {text(extract.demonstration(of, n, CODEC).token_ids) for n in judged if of.nodes[n].correct == correct}


@given(of=trees(), config=CONFIGS)
def test_what_holds_for_every_pair(of: Tree, config: ExtractConfig) -> None:
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
def test_what_holds_for_every_step(of: Tree, config: ExtractConfig) -> None:
    values = extract.step_values(of, CODEC)
    visited = [n for n, found in enumerate(of.nodes) if n and found.visits]
    assert sum(step.visits for step in values) == sum(of.nodes[n].visits for n in visited)
    assert {step.prefix + step.text for step in values} == {of.completion(n) for n in visited}
    whole = {text(path_tokens(of, n, CODEC).token_ids) for n in visited}
    assert {text(step.token_ids) for step in values} == whole
    for pair in extract.step_preferences(of, config, CODEC):
        assert pair.chosen_value - pair.rejected_value > config.step_min_gap - 1e-8
        assert min(pair.chosen_visits, pair.rejected_visits) >= config.step_min_visits
        for side in (pair.chosen_ids, pair.rejected_ids):
            assert text(np.concatenate([pair.prefix_ids, side])) in whole
