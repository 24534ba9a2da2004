"""Several models in one tree: who writes which node, and in whose tokens the others see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from search_world import BARE, Grown, Script, grow, table, writer
from tree_samples import children_of

from actors.search.requests import SearchWriter
from rlsys.config.search import NodeTypeConfig, SearchConfig, StopConfig
from rlsys.search.paths import path_tokens, prompt_tokens

CHILDREN = {"start": {"thinking": 1}, "thinking": {"double_check": 1}, "double_check": {"answer": 1}}
THINK, CHECK, ANSWER = "<thinking>a</thinking>", "<double-check>b</double-check>", "<answer>1</answer>"
NODE_BY_NODE = {
    "<thinking>": ["a</thinking>"],
    f"{THINK}<double-check>": ["b</double-check>"],
    f"{THINK}{CHECK}<answer>": ["1</answer>"],
}


def search(world: Script, writers: dict[Any, SearchWriter], **fields: Any) -> Grown:
    stop = StopConfig.model_validate({"correct": (), **fields.pop("stop", {})})
    grown = grow(world, SearchConfig(**{"parallel_simulations": 1, "stop": stop, **fields}), writers=writers)
    assert not any(world.left.values())
    return grown


def contexts(grown: Grown) -> list[tuple[str, list[int]]]:
    """Who was asked, behind which tokens after his prompt."""
    lengths = {name: len(ids) for name, ids in grown.tree.prompt_token_ids.items()}
    return [(call.writer, call.token_ids[lengths[call.writer] :]) for call, _ in grown.calls]


def test_text_is_handed_over_node_by_node() -> None:
    policy, reviewer = writer(), writer("bytes", 2000)
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
            tuple(call.token_ids[: len(grown.tree.prompt_token_ids[call.writer])])
            == (reviewer if call.writer == "reviewer" else policy).prompt_ids
        )
    check = grown.tree.nodes[2]
    assert (check.writer, check.text) == ("reviewer", CHECK)
    assert check.token_ids.tolist() == other(CHECK)  # in the tokens of its writer
    # In training it is encoded once, and is nothing that the policy chose.
    path = path_tokens(grown.tree, 3, policy.codec)
    [(_, _, _), (_, start, stop), (_, _, _)] = path.spans
    assert path.token_ids[start:stop].tolist() == own(CHECK)
    assert not path.chosen[start:stop].any() and not path.logprobs[start:stop].any()
    assert path.chosen.sum() == 4  # "a" and "1" and what closes them


def test_without_a_reviewer_the_grower_writes_it_all() -> None:
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"policy": writer()})
    assert [who for who, _ in contexts(grown)] == ["policy"] * 3
    assert {node.writer for node in grown.tree.nodes} == {"policy"}


def test_another_model_grows_the_tree() -> None:
    model, policy = writer("bytes", 2000), writer()
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"model": model})
    tree = grown.tree
    assert ({node.writer for node in tree.nodes[1:]}, tree.grower) == ({"model"}, "model")
    assert (tree.tokenizers, tree.models) == ({"model": "bytes"}, {"model": "bytes model"})
    path = path_tokens(tree, 3, policy.codec)
    whole = [*policy.prompt_ids, *(token for text in (THINK, CHECK, ANSWER) for token in policy.codec.encode(text))]
    assert path.token_ids.tolist() == whole
    assert not path.chosen.any() and path.versions == ()
    assert prompt_tokens(tree, policy.codec).tolist() == list(policy.prompt_ids)


def test_a_reviewer_of_the_same_tokenizer_hands_over_tokens() -> None:
    """No text is encoded again: what the policy wrote in an unusual way stays as it is."""
    policy, reviewer = writer(max_model_len=600), writer(max_model_len=900)
    grown = search(Script(table(CHILDREN), NODE_BY_NODE), {"policy": policy, "reviewer": reviewer})
    path = [node.token_ids.tolist() for node in grown.tree.nodes[1:]]
    assert contexts(grown)[2][1][:-1] == [*path[0], *path[1]]
    chosen = path_tokens(grown.tree, 3, policy.codec)
    assert chosen.token_ids[chosen.prompt_length :].tolist() == [token for ids in path for token in ids]
    assert chosen.chosen.sum() == 4  # tokens of the reviewer are not the policy's, in whatever tokenizer


def test_a_token_across_the_edge_of_a_tag_is_no_part_of_the_text_handed_over() -> None:
    """The model's tokenizer has "><" as one token: its thought ends with it, and "<" belongs to what follows."""
    model, reviewer = writer("bpe", 900), writer("bytes", 2000)
    said = {**NODE_BY_NODE, "<thinking>": [f"a</thinking>{CHECK}"]}
    grown = search(Script(table(CHILDREN), said), {"model": model, "reviewer": reviewer})
    thought = grown.tree.nodes[1]
    assert (thought.text, thought.spill) == (THINK, "<")
    (_, first), (_, second), (_, third) = contexts(grown)
    assert reviewer.codec.decode(second) == f"{THINK}<double-check>"
    # The model itself sees its own tokens, "<" included, and of the reviewer's text only what is still missing.
    assert third[: len(thought.token_ids)] == thought.token_ids.tolist()
    assert model.codec.decode(third) == f"{THINK}{CHECK}<answer>"
    assert first == thought.token_ids.tolist()[: len(first)]


def test_a_chain_is_cut_where_the_reviewers_node_begins() -> None:
    """The grower writes a check and an answer of its own, which are dropped; the reviewer's check takes their place."""
    policy, reviewer = writer(), writer("bytes", 2000)
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
    assert [who for who, _ in contexts(grown)] == ["policy", "reviewer", "policy"]
    assert (grown.tree.simulations, grown.tree.nodes[0].visits, grown.tree.stop) == (1, 1, "exhausted")
    # What was dropped has cost its tokens all the same.
    assert grown.tree.tokens == sum(len(drawn.token_ids) for _, drawn in grown.calls)
    assert grown.calls[0][1].token_ids.tolist()[: len(nodes[0].token_ids)] == nodes[0].token_ids.tolist()


def test_a_draw_that_is_handed_over_at_once_is_one_draw() -> None:
    """The thought may have two children. Both chains drawn there begin with a check, both of which the reviewer writes:
    two different ones."""
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
    grown = search(world, {"policy": writer(), "reviewer": writer("bytes", 2000)}, expansion="chain")
    assert [grown.tree.nodes[n].writer for n in children_of(grown.tree, 1)] == ["reviewer"] * 2
    assert (grown.tree.simulations, len(grown.tree.answers())) == (2, 2)


def test_the_chain_ends_where_the_reviewer_has_no_room() -> None:
    """His context ends behind the opening tag. The thought stays, its check is missing, and it is counted."""
    reviewer = writer("bytes", len(writer("bytes").prompt_ids) + len(f"{THINK}<double-check>"))
    world = Script(table(CHILDREN), {"": [f"{THINK}{CHECK}{ANSWER}"]})
    tree = search(world, {"policy": writer(), "reviewer": reviewer}, expansion="chain").tree
    assert ([node.text for node in tree.nodes[1:]], tree.stop) == ([THINK], "exhausted")
    assert (dict(tree.counts), tree.simulations, tree.calls) == ({"no_room": 1}, 1, 1)


def test_nothing_is_handed_over_once_the_tokens_are_spent() -> None:
    world = Script(table(CHILDREN), {"": [f"{THINK}{CHECK}{ANSWER}"]})
    tree = search(world, {"policy": writer(), "reviewer": writer()}, expansion="chain", stop={"tokens": 1}).tree
    assert (tree.stop, tree.calls, [node.type for node in tree.nodes]) == ("tokens", 1, ["start", "thinking"])


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_backtracking_with_a_fixed_text_and_a_reviewer(expansion: str) -> None:
    """A wrong answer; nobody writes the "wait" below the thought, the reviewer what follows, the policy the answer."""
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
    wait, anew = "<reflection>wait</reflection>", "<thinking-from-scratch>b</thinking-from-scratch>"
    if expansion == "node":
        said = {"<thinking>": ["a</thinking>"], f"{THINK}<answer>": ["0</answer>"]}
        said[f"{THINK}{wait}{anew}<answer>"] = ["1</answer>"]
    else:
        said = {"": [f"{THINK}<answer>0</answer>"], f"{THINK}{wait}": [f"{anew}<answer>0</answer>"]}
        said[f"{THINK}{wait}{anew}"] = [ANSWER]
    said[f"{THINK}{wait}<thinking-from-scratch>"] = ["b</thinking-from-scratch>"]
    policy, reviewer = writer(), writer("bytes", 2000)
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
    assert (scratch.text, scratch.writer, right.correct, tree.simulations) == (anew, "reviewer", True, 2)
    path = path_tokens(tree, 5, policy.codec)
    spans = {node: slice(start, stop) for node, start, stop in path.spans}
    assert not path.chosen[spans[3]].any() and not path.chosen[spans[4]].any()
    assert np.count_nonzero(path.chosen[spans[5]]) == right.generated


def test_a_fixed_text_once_more_is_the_same_node() -> None:
    """Two reflections are allowed and there is one text: the second wrong answer leads to the node of the first."""
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
    tree = search(world, {"policy": writer()}).tree
    [reflection] = [node for node in tree.nodes if node.type == "reflection"]
    assert (reflection.samples, tree.counts["backtracks"], tree.counts["duplicates"]) == (2, 2, 1)
    assert [len(tree.nodes), tree.stop] == [6, "exhausted"]
