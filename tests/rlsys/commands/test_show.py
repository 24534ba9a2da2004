"""`rlsys show`: trees as a person reads them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tree_samples import answer, node, tree

from rlsys.commands.show import run
from rlsys.errors import ConfigError
from rlsys.search.tree_json import tree_line
from rlsys.trees import Tree, TreeFailure


def written(folder: Path, *trees: Tree | TreeFailure) -> Path:
    (folder / "trees").mkdir(parents=True)
    (folder / "trees" / "00000.jsonl").write_text("".join(tree_line(each) + "\n" for each in trees))
    return folder


def shown(folder: Path, prompt: str = "", *, terminal: bool = False) -> list[str]:
    output = io.StringIO()
    run(folder, prompt, Console(file=output, width=120, force_terminal=terminal, color_system=None))
    return output.getvalue().splitlines()


SAMPLE = tree(
    node(0, "<thinking>2 + 2"),
    answer(1, "<answer>4", "ok"),
    answer(1, "<answer>5", "wrong", samples=2),
    node(0, "[bold]hm", defect="truncated", backtrack=True, estimate=0.25),
    prompt_id="held_out-3",
    question="How much is 2 + 2?",
)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_tree_shows_what_its_nodes_are_worth(tmp_path: Path, terminal: bool) -> None:
    lines = shown(written(tmp_path, replace(SAMPLE, prompt_id="other"), SAMPLE), "held_out-3", terminal=terminal)
    assert lines[0] == "How much is 2 + 2?"
    assert lines[1].startswith("held_out-3, reference ")
    first = next(number for number, line in enumerate(lines) if "thinking, value" in line)
    assert "* thinking, value 0.33 of 3, surprise 0.50" in lines[first]  # the wrong answer was drawn twice
    assert lines[first + 1].endswith("<thinking>2 + 2")
    assert any("* answer, value 1.00 of 1" in line and line.endswith("right, reward 1") for line in lines)
    assert any("drawn 2 times" in line and "wrong, reward 0" in line and "*" not in line for line in lines)
    assert any("estimate 0.25, surprise 0.50, 8 tokens, after a wrong answer, truncated" in line for line in lines)
    assert any(line.endswith("[bold]hm") for line in lines), "texts are no markup"
    assert lines[-1].startswith("4 nodes, 2 scored answers") and "the search ended by" in lines[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_of_a_model_do_not_reach_the_terminal(tmp_path: Path, terminal: bool) -> None:
    lines = shown(written(tmp_path, tree(node(0, "a\x1b[2Jb\x07"), prompt_id="p")), "p", terminal=terminal)
    assert any(line.endswith(r"a\x1b[2Jb\x07") for line in lines)
    assert "\x1b[2J" not in "".join(lines)


def test_without_a_prompt_the_trees_are_listed(tmp_path: Path) -> None:
    failure = TreeFailure(prompt_id="p9", question="q", answer="a", reason="the prompt is too long")
    lines = shown(written(tmp_path, SAMPLE, failure))
    assert any(line.split()[:4] == ["held_out-3", "4", "2", "1"] for line in lines)
    assert any("p9" in line and "the prompt is too long" in line for line in lines)
    assert shown(tmp_path, "p9") == ["no tree of p9: the prompt is too long"]


def test_trees_of_a_training_run_are_found(tmp_path: Path) -> None:
    written(tmp_path / "stages" / "search", SAMPLE)
    assert shown(tmp_path, "held_out-3")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run with rollouts or trees"):
        shown(tmp_path)
    with pytest.raises(ConfigError, match="it has no tree of prompt 'p7'; `rlsys show .*` lists them"):
        shown(written(tmp_path, SAMPLE), "p7")
