"""A tree as a page: the walk through its nodes, and the pairs that the extraction makes of it."""

from __future__ import annotations

from pathlib import Path

from tree_samples import END, OTHER_END, CharCodec, answer, golden, node, tree

from rlsys.config.search import ExtractConfig
from rlsys.search.extract import preferred_chains, preferred_steps
from rlsys.search.marks import chain_digest
from rlsys.viewer.tree_view import end_tokens, events, pairs

ENDS = frozenset((END, OTHER_END))


def test_the_walk_opens_and_closes_every_node_around_its_children() -> None:
    grown = golden()
    stack, parents = [0], {}
    for kind, view in events(grown, {}):
        if kind == "open":
            parents[view.number] = stack[-1]
            stack.append(view.number)
        else:
            assert stack.pop() == view.number
    assert stack == [0] and parents == {n: each.parent for n, each in enumerate(grown.nodes) if n}


def test_the_way_to_the_first_right_answer_is_open() -> None:
    grown = golden()
    views = {view.number: view for _, view in events(grown, {})}
    first = next(number for number in grown.answers() if grown.nodes[number].correct)
    assert {number for number, view in views.items() if view.open} == set(grown.path(first))
    wide = {view.number for _, view in events(grown, {}, node=16) if view.open}
    assert wide == {*grown.path(first), *grown.path(16)}
    assert {view.number for _, view in events(grown, {}, node=99) if view.open} == set(grown.path(first))
    assert {number for number, view in views.items() if view.right} == {1, 2, 3, 5, 6, 8, 9, 10, 13}


def test_a_chain_of_two_thousand_nodes_is_walked() -> None:
    grown = tree(*(node(number, "x") for number in range(2000)))
    assert sum(kind == "open" for kind, _ in events(grown, {})) == 2000


def test_pairs_are_those_of_the_extraction() -> None:
    grown, config = golden(), ExtractConfig(max_backtracks=None, step_min_visits=1, pairs_per_tree=3)
    views = pairs(grown, {}, config, ENDS)
    assert views is not None
    chains = [view for view in views if view.kind == "chains"]
    expected = preferred_chains(grown, config, CharCodec())
    assert [(v.prefix + v.chosen[0], v.prefix + v.rejected[0]) for v in chains] == [
        (a.text, b.text) for a, b in expected
    ]
    steps = [view for view in views if view.kind == "nodes"]
    assert [(v.prefix, v.chosen[0], v.rejected[0]) for v in steps] == [
        (better.prefix, better.text, worse.text) for better, worse in preferred_steps(grown, config, CharCodec())
    ]
    assert len(chains) == 3 and len(steps) > 1


def test_a_marked_chain_is_in_no_pair() -> None:
    grown, config = golden(), ExtractConfig(max_backtracks=None)
    before = pairs(grown, {}, config, ENDS) or []
    marks = {"p": {chain_digest(grown, number) for number in grown.answers() if grown.nodes[number].correct}}
    assert [view.kind for view in before].count("chains") == 1
    assert not [view for view in pairs(grown, marks, config, ENDS) or [] if view.kind == "chains"]
    assert sum(view.marked for kind, view in events(grown, marks) if kind == "open") == 4


def test_nodes_of_another_tokenizer_have_no_pairs_here() -> None:
    mixed = tree(answer(0, "x", "ok", writer="model"), tokenizers={"policy": "letters", "model": "others"})
    assert pairs(mixed, {}, ExtractConfig(), ENDS) is None


def test_end_tokens_of_a_model_folder(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(tmp_path) == frozenset((7,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert end_tokens(tmp_path) == frozenset((1, 2))
    (tmp_path / "generation_config.json").write_text("[]")
    assert end_tokens(tmp_path) == frozenset((7,))
