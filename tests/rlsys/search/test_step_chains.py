"""Chains of nodes with values: each node is new in one of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from tree_samples import CharCodec, answer, ids, node, tree, trees

from rlsys.search.extract import step_values
from rlsys.search.step_chains import step_chains
from rlsys.trees import Tree

CODEC = CharCodec()


def test_step_chains_by_hand() -> None:
    """a leads to the answers 1 and 2, b only to one without a value before it."""
    small = tree(
        node(0, "a", "sub_task"), answer(1, "1", "ok"), answer(1, "2", "wrong"), node(0, "b"), answer(4, "3", "ok")
    )
    steps = step_values(small, CODEC)
    chains = step_chains([step for step in steps if step.text != "b"])
    assert [([step.text for step in chain.steps], chain.known) for chain in chains] == [
        (["a", "1"], 0), (["a", "2"], 1), (["3"], 0)]  # fmt: skip
    assert [[chr(token) for token in chain.steps[-1].token_ids[chain.loss_mask]] for chain in chains] == [
        ["a", "1"], ["2"], ["3"]]  # fmt: skip
    assert (chains[2].steps[0].prefix, step_chains([])) == ("b", [])


def test_a_node_without_tokens_is_a_chain_of_its_own() -> None:
    """Another model ended its chain at once: its end token has no text, so no token of the policy."""
    of = tree(
        node(0, "", token_ids=ids("", 9), writer="model"),
        answer(0, "1", "ok", token_ids=ids("", 8), writer="model"),
        tokenizers={"model": "other"},
        prompt_token_ids={"model": ids("", 5)},
    )
    of = replace(of, nodes=(of.nodes[0], replace(of.nodes[1], visits=1), of.nodes[2]))
    chains = step_chains(step_values(of, CODEC))
    assert [[step.text for step in chain.steps] for chain in chains] == [[""], ["1"]]


@given(of=trees())
def test_step_chains_hold_every_step_once(of: Tree) -> None:
    steps = step_values(of, CODEC)
    chains = step_chains(steps)
    new = [step for chain in chains for step in chain.steps[chain.known :]]
    assert sorted(map(id, new)) == sorted(map(id, steps))
    for chain in chains:
        ends = [len(step.token_ids) for step in chain.steps]
        assert [step.start for step in chain.steps[1:]] == ends[:-1]
        assert chain.loss_mask.sum() == sum(step.loss_mask.sum() for step in chain.steps[chain.known :])
