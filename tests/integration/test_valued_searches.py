"""`rlsys search` with values of nodes: what a tree holds, and the same bytes after a kill on other actors."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from real_runs import TINY, FinishedRun, commands, write_config
from real_searches import count_finished, search_config, tree_files, wait_until

from rlsys.config.tasks import LetterCountConfig
from rlsys.search.tree_json import read_trees
from rlsys.tasks import build_task
from rlsys.trees import Tree

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
PROMPTS = 16
JUDGE = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_gib": 0.1, "template": "{question}{chain}"}
VALUES: dict[str, dict[str, Any]] = {
    "steps": {"value": {"type": "steps"}, "expansion": "chain", "selection": {"type": "surprise"}},
    "rollouts": {"value": {"type": "rollouts", "count": 2}},
    "model": {"value": {"type": "model", "right": "1", "wrong": "0", "prune_below": 0.2, **JUDGE}},
}


def trees_of(run_dir: Path) -> list[Tree]:
    trees = [tree for path in sorted((run_dir / "trees").glob("*.jsonl")) for tree in read_trees(path)]
    assert len(trees) == PROMPTS and all(isinstance(tree, Tree) for tree in trees)
    return [tree for tree in trees if isinstance(tree, Tree)]


def valued_config(kind: str, policy: Path) -> dict[str, Any]:
    fields = search_config(policy, PROMPTS)
    fields["search"] |= VALUES[kind]
    if kind == "model":
        fields["search"]["value"]["path"] = str(policy)
        fields["actors"]["count"] = 1  # the judge has the other core
    return fields


@pytest.mark.long
@pytest.mark.parametrize("kind", VALUES)
def test_a_killed_search_goes_on_to_the_same_bytes(kind: str, finished_run: FinishedRun, tmp_path: Path) -> None:
    fields = valued_config(kind, finished_run.dir / "stages" / "warm_start")
    (tmp_path / "killed").mkdir()
    whole, killed = write_config(tmp_path, fields), write_config(tmp_path / "killed", fields)
    with commands() as start:
        start("search", whole, "actors.count=1", "actors.max_num_seqs=64").finish()
        first = start("search", killed)
        wait_until(first, lambda: count_finished(tmp_path / "killed" / "run") >= 2)
        first.signal(signal.SIGKILL, group=False)
        first.fail(-signal.SIGKILL)
        first.assert_gone(within_s=15)
        assert count_finished(tmp_path / "killed" / "run") < PROMPTS
        start("search", killed).finish()
    assert tree_files(tmp_path / "run") == tree_files(tmp_path / "killed" / "run")
    check(kind, trees_of(tmp_path / "run"))


def check(kind: str, trees: list[Tree]) -> None:
    """Check that the estimates of real nodes are what their source says of them."""
    estimates = [(tree, n, node) for tree in trees for n, node in enumerate(tree.nodes) if node.estimate is not None]
    assert len(estimates) > PROMPTS and all(0 <= node.estimate <= 1 for _, _, node in estimates if node.estimate)
    assert sum(tree.failed_values for tree in trees) == 0
    if kind == "steps":
        task = build_task(LetterCountConfig(**TINY["task"]), 3)
        wrong = [(tree, n) for tree, n, node in estimates if node.defect == "wrong_step"]
        assert wrong
        for tree, number in wrong:
            judgement = task.check_steps(tree.question, tree.completion(number))
            assert judgement is not None and judgement.wrong_node == len(tree.path(number)) - 1
    elif kind == "rollouts":
        assert {node.estimate for _, _, node in estimates} == {0.0, 0.5, 1.0}
        assert all(tree.calls > tree.simulations for tree in trees)
    else:
        assert len({node.estimate for _, _, node in estimates}) > PROMPTS
        assert all((node.defect == "pruned") == (node.estimate < 0.2) for _, _, node in estimates if node.estimate)
