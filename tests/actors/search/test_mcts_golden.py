"""Whole trees for scripted proposals, as JSON in the folder `golden`.

`proposals` are those of `search_world.Script`. No program writes `expected`. If a tree has to change,
`PYTHONPATH=.:tests/helpers python tests/actors/search/test_mcts_golden.py NAME` prints the tree of a case. Check it
against the derivations below, change these, and edit `expected` by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from search_world import Script, grow, table
from tree_samples import children_of

from rlsys.config.search import NodeTypeConfig, SearchConfig
from rlsys.trees import ThoughtNode, Tree

FOLDER = Path(__file__).parent / "golden"
NAMES = ("node_by_node", "chain_duplicates", "backtracking")


def play(case: dict[str, Any]) -> tuple[Tree, Script]:
    wait = NodeTypeConfig(tag="reflection", prefixes=("wait",), writer="nobody")
    script = Script(table(case["children"], case["after_wrong"], {"reflection": wait}), case["proposals"])
    return grow(script, SearchConfig.model_validate(case["config"])).tree, script


def plain(tree: Tree) -> dict[str, Any]:
    shown = ("stop", "simulations", "calls", "tokens")
    return {
        **{name: getattr(tree, name) for name in shown},
        "counts": dict(tree.counts),
        "nodes": [_plain_node(node) for node in tree.nodes],
    }


def _plain_node(node: ThoughtNode) -> dict[str, Any]:
    names = ("parent", "type", "text", "forced", "defect", "backtrack", "samples", "visits", "total", "scored")
    return {name: getattr(node, name) for name in names}


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    case = load(name)
    tree, script = play(case)
    assert plain(tree) == case["expected"]
    assert not any(script.left.values())  # every proposal was asked for


def test_every_golden_file_is_played() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)


def test_node_by_node_is_what_the_formula_says() -> None:
    """Derive the thought that each simulation enters.

    1, 2: a and b in random order, since neither has a visit. Then Q of a is 1 and of b 0; c is 2:
    3: ln 2 = 0.6931, both N 1, the same bonus: a by its Q.
    4: ln 3 = 1.0986.  a, N 2: 1 + 2 sqrt(0.5493) = 2.4823;  b, N 1: 2 sqrt(1.0986) = 2.0963.  a.
    5: ln 4 = 1.3863.  a, N 3: 1 + 2 sqrt(0.4621) = 2.3596;  b, N 1: 2 sqrt(1.3863) = 2.3548.  a, its last answer.
    6: a has no unjudged answer left, so b, although its Q is 0.
    """
    tree, _ = play(load("node_by_node"))
    texts = {n: tree.nodes[n].text for n in children_of(tree, 0)}
    order = [texts[tree.nodes[n].parent] for n in tree.answers()]
    a, b = "<thinking>a</thinking>", "<thinking>b</thinking>"
    assert sorted(order[:2]) == [a, b]
    assert order[2:] == [a, a, a, b]
    by_text = {node.text: node for node in tree.nodes}
    assert (by_text[a].visits, by_text[a].total) == (4, 4.0)
    assert (by_text[b].visits, by_text[b].total) == (2, 0.0)
    assert (tree.nodes[0].visits, tree.nodes[0].total) == (6, 4.0)


def test_chain_with_duplicates_by_hand() -> None:
    """Derive the tree. There is never a choice between children, so the generator is not used.

    1, 2: the prompt allows two draws. Both chains begin with a: one node, 2 samples; answers 1 and 0.
    Now a may have (1 + 1) * 2 = 4 children, and has 2. 3: answer 1 once more: the same node, 2 samples, backed up
    a second time, judged once. 4: b and its answer 1; a is exhausted. 5: b may have 2 children and has 1: its answer 0.
    Then the tree is exhausted. Visits of a: 5, rewards 1 + 0 + 1 + 1 + 0 = 3; of b: 2 and 1.
    """
    tree, _ = play(load("chain_duplicates"))
    assert [(node.text, node.samples, node.visits, node.total) for node in tree.nodes[1:]] == [
        ("<thinking>a</thinking>", 2, 5, 3.0),
        ("<answer>1</answer>", 2, 2, 2.0),
        ("<answer>0</answer>", 1, 1, 0.0),
        ("<thinking>b</thinking>", 1, 2, 1.0),
        ("<answer>1</answer>", 1, 1, 1.0),
        ("<answer>0</answer>", 1, 1, 0.0),
    ]
    assert (tree.stop, tree.simulations, tree.calls, dict(tree.counts)) == ("exhausted", 5, 5, {"duplicates": 2})


def test_backtracking_by_hand() -> None:
    """Derive the tree.

    Simulation 1 ends at the wrong answer below thought a, so 2 begins with a reflection there. The answer below the
    following thought b is wrong, too, and the nearest thought is now b: 3 begins with a reflection below b. Its answer
    is right.
    """
    tree, _ = play(load("backtracking"))
    reflections = [node for node in tree.nodes if node.backtrack]
    assert [(node.type, tree.nodes[node.parent].text) for node in reflections] == [
        ("reflection", "<thinking>a</thinking>"),
        ("reflection", "<thinking>b</thinking>"),
    ]
    assert [tree.nodes[n].verdict.reward for n in tree.answers()] == [0.0, 0.0, 1.0]
    assert (tree.simulations, tree.nodes[0].visits, tree.nodes[0].total) == (3, 3, 1.0)
    # Models write 7 nodes; 2 have fixed texts.
    assert (tree.calls, len(tree.nodes), dict(tree.counts)) == (7, 10, {"backtracks": 2})


if __name__ == "__main__":
    print(json.dumps(plain(play(load(sys.argv[1]))[0]), indent=2))
