"""Ten thousand trees in a real browser: the list shows the right ones, and a tree opens, both without a long wait.

The two bounds are those that the pages promise; benchmarks/view.py measures them with real trees.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from browsers import PAINTED, served
from tree_samples import answer, node, tree

from rlsys.search.tree_json import tree_line

pytestmark = [pytest.mark.heavy, pytest.mark.long]

TREES, SHARD, PAGE = 10_000, 64, 50


def wide_tree() -> str:
    """Return the line of a tree of 40 kB, whose texts have NUMBER where a tree has its number."""
    nodes = []
    for branch in range(32):
        nodes.append(node(0, f"<thinking>thought {branch} of NUMBER</thinking>"))
        nodes.append(answer(len(nodes), f"<answer>{branch} of NUMBER</answer>", "ok" if branch == 7 else "wrong"))
    return tree_line(tree(*nodes, prompt_id="train-NUMBER", question="question NUMBER")) + "\n"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run_dir = tmp_path_factory.mktemp("many")
    (run_dir / "trees").mkdir()
    line = wide_tree()
    assert 30_000 < len(line) < 50_000
    for first in range(0, TREES, SHARD):
        lines = [line.replace("NUMBER", str(number)) for number in range(first, min(first + SHARD, TREES))]
        (run_dir / "trees" / f"{first // SHARD:05d}.jsonl").write_text("".join(lines))
    with served(run_dir) as address:
        yield address
    shutil.rmtree(run_dir)  # 400 MB, of which pytest would keep three


def shown_trees(tab: Any) -> list[tuple[str, str]]:
    """Return the prompt id and the question of every row of the list."""
    rows = tab.locator("tbody tr").all()
    return [(row.locator("td").nth(0).inner_text(), row.locator("td").nth(1).inner_text()) for row in rows]


def expected(first: int) -> list[tuple[str, str]]:
    return [(f"train-{number}", f"question {number}") for number in range(first, first + PAGE)]


def test_ten_thousand_trees_are_listed_and_opened(tab: Any, address: str) -> None:
    tab.goto(f"{address}/trees")
    assert tab.evaluate(PAINTED) < 2
    assert "10,000 of 10,000 trees, 10,000 with a right answer" in tab.inner_text(".choose")
    assert shown_trees(tab) == expected(0)

    tab.get_by_role("link", name="later").click()
    tab.wait_for_url("**page=2*")
    assert tab.evaluate(PAINTED) < 2
    assert shown_trees(tab) == expected(PAGE)

    tab.get_by_role("link", name="train-73", exact=True).click()
    tab.wait_for_url("**/tree/73*")
    assert tab.evaluate(PAINTED) < 0.5
    assert tab.inner_text("h2") == "train-73" and tab.inner_text(".question") == "question 73"
    assert tab.locator(".badge.right:visible").count() == 1
    assert tab.locator(".node.onpath .text:visible").all_inner_texts() == [
        "<thinking>thought 7 of 73</thinking>",
        "<answer>7 of 73</answer>",
    ]

    tab.goto(f"{address}/tree/{TREES - 1}")
    assert tab.evaluate(PAINTED) < 0.5
    assert tab.inner_text("h2") == "train-9999"
