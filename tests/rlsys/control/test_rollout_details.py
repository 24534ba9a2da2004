"""Distributions and examples of a training step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fakes import group, prompt, searched_group, trajectory
from tree_samples import answer, node, tree

from rlsys.control.rollout_details import examples, histograms, tree_example
from rlsys.directory import SearchDirectory
from rlsys.run.metrics import HISTOGRAMS, TEXTS
from rlsys.search.outline import code_block
from rlsys.search.tree_json import tree_line
from rlsys.types import TrajectoryGroup


def decode(token_ids: np.ndarray) -> str:
    return f"<{len(token_ids)} tokens>"


def test_distributions_by_hand() -> None:
    silent = TrajectoryGroup(prompt=prompt("c"), trajectories=(trajectory(0, 0.0, "error"),))
    groups = [group(prompt("a"), 0, (1.0, 0.0)), group(prompt("b"), 0, (1.0, 1.0)), silent, searched_group(prompt("d"))]
    shown = histograms(groups)
    assert set(shown) == set(HISTOGRAMS)
    assert shown["rollout/rewards"].tolist() == [1, 0, 1, 1]
    assert shown["rollout/group_rewards"].tolist() == [0.5, 1]  # nothing was judged in the third group
    assert len(shown["rollout/completion_lengths"]) == 5


def test_examples_show_a_group_with_a_signal_and_a_solved_tree() -> None:
    groups = [
        group(prompt("same"), 0, (1.0, 1.0)),
        group(prompt("mixed"), 0, (0.0, 1.0)),
        searched_group(prompt("unsolved"), 0, (0.0,)),
        searched_group(prompt("solved"), 0, (1.0, 0.0)),
    ]
    texts = examples(groups, decode)
    assert set(texts) == set(TEXTS)
    samples = texts["rollout/samples"]
    assert "**prompt** mixed" in samples and "same" not in samples
    assert samples.index("reward 1") < samples.index("reward 0")
    assert "    <3 tokens>" in samples  # a code block, in which tags stay visible
    assert "**tree** solved" in texts["search/tree"]
    assert "\n    * " in texts["search/tree"] and "\n      - " in texts["search/tree"]


def test_examples_without_groups() -> None:
    assert examples([], decode) == {}
    assert all(numbers.size == 0 for numbers in histograms([]).values())


def test_the_first_solved_tree_of_a_search(tmp_path: Path) -> None:
    directory = SearchDirectory(tmp_path)
    assert tree_example(directory) == {}
    directory.trees.mkdir()
    wrong = tree(node(0, "<thinking>1 + 1"), answer(1, "<answer>3", "wrong"), prompt_id="p0")
    right = tree(
        node(0, "<thinking>2 + 2"), answer(1, "<answer>4", "ok"), answer(1, "<answer>5", "wrong"), prompt_id="p1"
    )
    (directory.trees / "00000.jsonl").write_text(f"{tree_line(wrong)}\n{tree_line(right)}\n")
    text = tree_example(directory)["search/tree"]
    assert "**tree** p1" in text
    lines = [line.strip() for line in text.splitlines()]
    assert lines.index("<thinking>2 + 2") < lines.index("<answer>4") < lines.index("<answer>5")
    assert sum(line.startswith("* ") for line in lines) == 2  # the thought and the right answer


def test_long_chains_break_between_tags() -> None:
    nodes = ["<thinking>" + letter * 40 + "</thinking>" for letter in "abc"]
    lines = code_block("".join(nodes)).splitlines()
    assert [line.strip() for line in lines] == nodes
    assert code_block("<a>1</a><b>2</b>").strip() == "<a>1</a><b>2</b>"
