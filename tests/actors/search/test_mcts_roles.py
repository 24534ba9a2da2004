"""Several models in one tree: the role that writes each node, and its tokens for the other roles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from search_world import BARE, Grown, Script, grow, search_model, table
from tree_samples import children_of

from actors.search.requests import SearchModel
from rlsys.config.search import NodeTypeConfig, SearchConfig, StopConfig
from rlsys.search.paths import path_tokens, prompt_tokens

CHILDREN = {"start": {"thinking": 1}, "thinking": {"double_check": 1}, "double_check": {"answer": 1}}
THINK, CHECK, ANSWER = "<thinking>a</thinking>", "<double-check>b</double-check>", "<answer>1</answer>"
NODE_BY_NODE = {
    "<thinking>": ["a</thinking>"],
    f"{THINK}<double-check>": ["b</double-check>"],
    f"{THINK}{CHECK}<answer>": ["1</answer>"],
}


def search(world: Script, models: dict[Any, SearchModel], **fields: Any) -> Grown:
    stop = StopConfig.model_validate({"correct": (), **fields.pop("stop", {})})
    grown = grow(world, SearchConfig(**{"parallel_simulations": 1, "stop": stop, **fields}), models=models)
    assert not any(world.left.values())
    return grown


def contexts(grown: Grown) -> list[tuple[str, list[int]]]:
    """Return role and context, without the prompt, of each call."""
    lengths = {name: len(ids) for name, ids in grown.tree.prompt_token_ids.items()}
    return [(call.role, call.token_ids[lengths[call.role] :]) for call, _ in grown.calls]


def test_models_of_different_tokenizers_share_text() -> None:
    policy, reviewer = search_model(), search_model("bytes", 2000)
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"policy": policy, "reviewer": reviewer})
    own, other = policy.codec.encode, reviewer.codec.encode
    checked = [*other(THINK), *other("<double-check>")]
    assert contexts(grown) == [
        ("policy", own("<thinking>")),
        ("reviewer", checked),
        ("policy", [*own("<thinking>"), *own("a</thinking>"), *own(CHECK), *own("<answer>")]),
    ]
    for call, _ in grown.calls:
        assert (
            tuple(call.token_ids[: len(grown.tree.prompt_token_ids[call.role])])
            == (reviewer if call.role == "reviewer" else policy).prompt_ids
        )
    check = grown.tree.nodes[2]
    assert (check.writer, check.text) == ("reviewer", CHECK)
    assert check.token_ids.tolist() == other(CHECK)  # in the tokens of its writer
    # In training its text is encoded, and none of its tokens is a choice of the policy.
    path = path_tokens(grown.tree, 3, policy.codec)
    [(_, _, _), (_, start, stop), (_, _, _)] = path.spans
    assert path.token_ids[start:stop].tolist() == own(CHECK)
    assert not path.chosen[start:stop].any() and not path.logprobs[start:stop].any()
    assert path.chosen.sum() == 4  # "a" and "1" and their closing tags


def test_without_a_reviewer_the_proposer_writes_all_nodes() -> None:
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"policy": search_model()})
    assert [role for role, _ in contexts(grown)] == ["policy"] * 3
    assert {node.writer for node in grown.tree.nodes} == {"policy"}


def test_another_model_proposes_the_nodes() -> None:
    model, policy = search_model("bytes", 2000), search_model()
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"model": model})
    tree = grown.tree
    assert ({node.writer for node in tree.nodes[1:]}, tree.proposer) == ({"model"}, "model")
    assert (tree.tokenizers, tree.models) == ({"model": "bytes"}, {"model": "bytes model"})
    path = path_tokens(tree, 3, policy.codec)
    whole = [*policy.prompt_ids, *(token for text in (THINK, CHECK, ANSWER) for token in policy.codec.encode(text))]
    assert path.token_ids.tolist() == whole
    assert not path.chosen.any() and path.versions == ()
    assert prompt_tokens(tree, policy.codec).tolist() == list(policy.prompt_ids)


def test_models_of_the_same_tokenizer_share_tokens() -> None:
    """No text is encoded a second time: an unusual encoding by the policy stays."""
    policy, reviewer = search_model(max_model_len=600), search_model(max_model_len=900)
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"policy": policy, "reviewer": reviewer})
    path = [node.token_ids.tolist() for node in grown.tree.nodes[1:]]
    assert contexts(grown)[2][1][:-1] == [*path[0], *path[1]]
    chosen = path_tokens(grown.tree, 3, policy.codec)
    assert chosen.token_ids[chosen.prompt_length :].tolist() == [token for ids in path for token in ids]
    assert chosen.chosen.sum() == 4  # the reviewer's tokens are not the policy's, even in the same tokenizer


def test_text_after_the_closing_tag_is_not_shared() -> None:
    """The model's tokenizer has a token "><". Its thought ends with this token, and "<" belongs to the next node."""
    model, reviewer = search_model("bpe", 900), search_model("bytes", 2000)
    said = {**NODE_BY_NODE, "<thinking>": [f"a</thinking>{CHECK}"]}
    grown = search(Script(table(CHILDREN), said), {"model": model, "reviewer": reviewer})
    thought = grown.tree.nodes[1]
    assert (thought.text, thought.spill) == (THINK, "<")
    (_, first), (_, second), (_, third) = contexts(grown)
    assert reviewer.codec.decode(second) == f"{THINK}<double-check>"
    # The model sees its own tokens, "<" included, and then the reviewer's text without "<".
    assert third[: len(thought.token_ids)] == thought.token_ids.tolist()
    assert model.codec.decode(third) == f"{THINK}{CHECK}<answer>"
    assert first == thought.token_ids.tolist()[: len(first)]


def test_a_chain_is_cut_before_the_reviewers_node() -> None:
    """The proposer's own check and answer are dropped; the reviewer's check takes their place."""
    policy, reviewer = search_model(), search_model("bytes", 2000)
    world = Script(
        table(CHILDREN),
        {
            "": [f"{THINK}<double-check>ab</double-check><answer>0</answer>"],
            f"{THINK}<double-check>": ["b</double-check>"],
            f"{THINK}{CHECK}": [ANSWER],
        },
    )
    grown = search(world, {"policy": policy, "reviewer": reviewer}, expansion="chain")
    nodes = grown.tree.nodes[1:]
    assert [(node.text, node.writer) for node in nodes] == [(THINK, "policy"), (CHECK, "reviewer"), (ANSWER, "policy")]
    assert [role for role, _ in contexts(grown)] == ["policy", "reviewer", "policy"]
    assert (grown.tree.simulations, grown.tree.nodes[0].visits, grown.tree.stop) == (1, 1, "exhausted")
    # The dropped tokens are counted.
    assert grown.tree.tokens == sum(len(drawn.token_ids) for _, drawn in grown.calls)
    assert grown.calls[0][1].token_ids.tolist()[: len(nodes[0].token_ids)] == nodes[0].token_ids.tolist()


def test_a_chain_that_begins_with_the_reviewers_node_is_one_draw() -> None:
    """The thought may have two children. Both chains below it begin with a check, and the reviewer writes two different
    checks."""
    children = {"start": {"thinking": 1}, "thinking": {"double_check": 2}, "double_check": {"answer": 1}}
    chain = f"{CHECK}{ANSWER}"
    world = Script(
        table(children),
        {
            "": [f"{THINK}{chain}"],
            f"{THINK}": [chain],
            f"{THINK}<double-check>": ["a</double-check>", "b</double-check>"],
            f"{THINK}<double-check>a</double-check>": [ANSWER],
            f"{THINK}<double-check>b</double-check>": [ANSWER],
        },
    )
    grown = search(world, {"policy": search_model(), "reviewer": search_model("bytes", 2000)}, expansion="chain")
    assert [grown.tree.nodes[n].writer for n in children_of(grown.tree, 1)] == ["reviewer"] * 2
    assert (grown.tree.simulations, len(grown.tree.answers())) == (2, 2)


def test_a_chain_ends_if_the_reviewer_has_no_room() -> None:
    """The reviewer's context ends after the opening tag. The thought stays without a check, which is counted."""
    reviewer = search_model("bytes", len(search_model("bytes").prompt_ids) + len(f"{THINK}<double-check>"))
    world = Script(table(CHILDREN), {"": [f"{THINK}{CHECK}{ANSWER}"]})
    tree = search(world, {"policy": search_model(), "reviewer": reviewer}, expansion="chain").tree
    assert ([node.text for node in tree.nodes[1:]], tree.stop) == ([THINK], "exhausted")
    assert (dict(tree.counts), tree.simulations, tree.calls) == ({"no_room": 1}, 1, 1)


def test_the_reviewer_is_not_asked_after_the_last_token() -> None:
    world = Script(table(CHILDREN), {"": [f"{THINK}{CHECK}{ANSWER}"]})
    tree = search(
        world, {"policy": search_model(), "reviewer": search_model()}, expansion="chain", stop={"tokens": 1}
    ).tree
    assert (tree.stop, tree.calls, [node.type for node in tree.nodes]) == ("tokens", 1, ["start", "thinking"])


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_backtracking_with_a_fixed_text_and_a_reviewer(expansion: str) -> None:
    """After a wrong answer "wait" is a fixed text, the reviewer writes the next node, and the policy the answer."""
    children = {
        "start": {"thinking": 1},
        "thinking": {"answer": 1},
        "reflection": {"thinking_from_scratch": 1},
        "thinking_from_scratch": {"answer": 1},
    }
    nodes = {
        "reflection": NodeTypeConfig(tag="reflection", prefixes=("wait",), writer="nobody"),
        "thinking_from_scratch": BARE["thinking_from_scratch"],
    }
    wait, scratch_text = "<reflection>wait</reflection>", "<thinking-from-scratch>b</thinking-from-scratch>"
    if expansion == "node":
        said = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>"]}
        said[f"{THINK}{wait}{scratch_text}<answer>"] = ["1</answer>"]
    else:
        said = {"": [f"{THINK}<answer>0</answer>"], f"{THINK}{wait}": [f"{scratch_text}<answer>0</answer>"]}
        said[f"{THINK}{wait}{scratch_text}"] = [ANSWER]
    said[f"{THINK}{wait}<thinking-from-scratch>"] = ["b</thinking-from-scratch>"]
    policy, reviewer = search_model(), search_model("bytes", 2000)
    pattern = table(children, {"thinking": {"reflection": 1}}, nodes)
    tree = search(Script(pattern, said), {"policy": policy, "reviewer": reviewer}, expansion=expansion).tree
    fixed, scratch, right = tree.nodes[3:]
    assert (fixed.text, fixed.forced, fixed.writer, fixed.finish_reason, fixed.backtrack) == (
        wait,
        len(policy.codec.encode(wait)),
        "policy",
        None,
        True,
    )
    assert fixed.token_ids.tolist() == policy.codec.encode(wait) and fixed.generated == 0
    assert (scratch.text, scratch.writer, right.correct, tree.simulations) == (scratch_text, "reviewer", True, 2)
    path = path_tokens(tree, 5, policy.codec)
    spans = {node: slice(start, stop) for node, start, stop in path.spans}
    assert not path.chosen[spans[3]].any() and not path.chosen[spans[4]].any()
    assert np.count_nonzero(path.chosen[spans[5]]) == right.generated


def test_a_repeated_fixed_text_is_the_same_node() -> None:
    """Two reflections are allowed but there is one text: the second wrong answer leads to the node of the first."""
    children = {"start": {"thinking": 1}, "thinking": {"answer": 2}, "reflection": {"answer": 1}}
    nodes = {"reflection": NodeTypeConfig(tag="reflection", prefixes=("wait",), writer="nobody")}
    world = Script(
        table(children, {"thinking": {"reflection": 2}}, nodes),
        {
            "<thinking>": ["a</thinking>"],
            f"{THINK}<answer>": ["0</answer>", "00</answer>"],
            f"{THINK}<reflection>wait</reflection><answer>": ["000</answer>"],
        },
    )
    tree = search(world, {"policy": search_model()}).tree
    [reflection] = [node for node in tree.nodes if node.type == "reflection"]
    assert (reflection.samples, tree.counts["backtracks"], tree.counts["duplicates"]) == (2, 2, 1)
    assert [len(tree.nodes), tree.stop] == [6, "exhausted"]
