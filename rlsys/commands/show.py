"""`rlsys show`: the rollouts and the trees of a run as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.tree import Tree as Drawing

from rlsys.commands.show_rollouts import PICKS, early_end, find_rows, has_rollouts, show_rollouts, show_wrong
from rlsys.directory import SearchDirectory
from rlsys.display import print_lines, print_table, printable
from rlsys.earlier_runs import check_run_folder
from rlsys.errors import ConfigError
from rlsys.search.outline import STOPS, heading, question_text, right_nodes
from rlsys.search.tree_index import searches_of, tree_files
from rlsys.search.tree_json import read_trees
from rlsys.trees import Tree, TreeFailure

LISTED = 50


def run(run_dir: Path, prompt_id: str, console: Console, *, step: int | None = None, pick: str | None = None) -> None:
    """Print the tree of a prompt, or else some rollouts of a step and a list of the trees.

    Args:
        prompt_id: without trees, or with a step or pick, its rollouts are printed.
        step: the online step; None for the last one.
        pick: the choice of rollouts, one of PICKS; None for the first ones.
    Raises:
        ConfigError: the run has neither, or none of this prompt or step.
        DataError, DamagedFileError: a file is damaged.
    """
    if pick is not None and pick not in PICKS:
        raise ConfigError(f"--pick: expected one of {', '.join(PICKS)}, found {pick!r}")
    check_run_folder(run_dir)
    grown, asked_rollouts = _tree_files(run_dir), step is not None or pick is not None
    if asked_rollouts or (has_rollouts(run_dir) and not (prompt_id and grown)):
        if pick == "wrong":
            show_wrong(run_dir, step, prompt_id, console)
        else:
            show_rollouts(find_rows(run_dir, step, prompt_id), pick, console)
        if asked_rollouts or prompt_id or not grown:
            return
        print_lines(console, [""])
    trees = all_trees(run_dir)
    if not prompt_id:
        show_list(list(islice(trees, LISTED + 1)), console)
        return
    tree = next((tree for tree in trees if tree.prompt_id == prompt_id), None)
    if tree is None:
        raise ConfigError(f"{run_dir}: it has no tree of prompt {prompt_id!r}; `rlsys show {run_dir}` lists them")
    if isinstance(tree, TreeFailure):
        print_lines(console, [f"no tree of {prompt_id}: {tree.reason}"])
    else:
        show_tree(tree, console)


def _tree_files(run_dir: Path) -> list[Path]:
    """Return the files with the trees of a search, or of the stage search of a training run."""
    return [path for search in searches_of(run_dir) for path in tree_files(search)]


def all_trees(run_dir: Path) -> Iterator[Tree | TreeFailure]:
    """Yield the trees of a search, or of the stage search of a training run."""
    files = _tree_files(run_dir)
    if not files:
        expected = f"expected a run with rollouts or trees, found neither in it nor in {SearchDirectory(run_dir).trees}"
        raise ConfigError(f"{run_dir}: {expected}{early_end(run_dir)}")
    for path in files:
        yield from read_trees(path)


def show_list(trees: list[Tree | TreeFailure], console: Console) -> None:
    """Print one line for each tree."""
    rows = []
    for tree in trees[:LISTED]:
        if isinstance(tree, TreeFailure):
            rows.append((tree.prompt_id, "failed", "", "", tree.reason))
            continue
        answers, right = len(tree.answers()), sum(node.correct for node in tree.nodes)
        rows.append((tree.prompt_id, f"{len(tree.nodes) - 1}", f"{answers}", f"{right}", STOPS[tree.stop]))
    more = f", the first {LISTED}" if len(trees) > LISTED else ""
    print_table(console, ("prompt", "nodes", "answers", "right", "ended by"), rows, title=f"trees{more}")


def show_tree(tree: Tree, console: Console) -> None:
    """Print the question and all nodes of a tree.

    A star marks the nodes on the way to a right answer.
    """
    right = right_nodes(tree)
    drawing = Drawing(Text(printable(f"{tree.prompt_id}, reference {tree.answer}"), style="bold"), guide_style="dim")
    drawings = {0: drawing}
    for number, node in enumerate(tree.nodes[1:], start=1):
        label = Text(("* " if number in right else "") + heading(node), style="bold" if number in right else "")
        label.append("\n" + printable(node.text.strip()), style="not bold")
        drawings[number] = drawings[node.parent].add(label)
    question = question_text(tree.question)
    end = (
        f"{len(tree.nodes) - 1} nodes, {len(tree.answers())} scored answers, {tree.simulations} simulations, "
        f"{tree.calls} calls, {tree.tokens:,} tokens; the search ended by {STOPS[tree.stop]}"
    )
    if console.is_terminal:
        console.print(Text(printable(question)), drawing, Text(end), sep="\n")
        return
    with console.capture() as captured:
        console.print(drawing)
    print_lines(console, [question, *captured.get().splitlines(), end])
