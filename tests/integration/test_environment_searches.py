"""Trees beside an environment of the user over Ray and vLLM: kills in two stages, and their chains as episodes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_game import TASK, game_section
from real_runs import SHARD, TINY, Command, digests, steady_rows, wait_for_row, write_config
from real_searches import count_finished, tree_files, wait_until

from actors.rollouts.multi_turn import with_replies
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.tasks import GuessConfig
from rlsys.environments import build_environment
from rlsys.interfaces import Environment, Task
from rlsys.run.metrics import read_rows
from rlsys.search.tree_json import read_trees
from rlsys.tasks import build_task
from rlsys.trees import ENVIRONMENT, Tree

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1200)]

STEPS, INTERVAL, STAGE_STEPS, TREE_COUNT = 4, 2, 2, 15
MAX_TURNS = 4
STEADY = {"learning_rate": 1e-3, "warmup_updates": 0}


def config(folder: Path) -> dict[str, Any]:
    return {
        **TINY,
        "stages": ["warm_start", "search", "sft", "preference", "online"],
        "task": TASK,
        "environment": game_section(folder, MAX_TURNS),
        "search": {
            "nodes": {"guess": {"tag": "guess"}},
            # Only a reply ends a chain.
            "tables": {
                "game": {"children": {"start": {"guess": 4}, "guess": {"environment": 1}, "environment": {"guess": 3}}}
            },
            "patterns": ["game"],
            "expansion": "chain",
            "backtracking": False,
            "parallel_simulations": 4,
            "stop": {"simulations": 16, "correct": []},
            "prompts": TREE_COUNT,
            "shard_size": SHARD,
            "fraction": 0.5,
            "max_failed_trees": 0.5,
        },
        "sft": {"max_steps": STAGE_STEPS, "rows_per_step": 4, "optimizer": {**STEADY}},
        "preference": {"max_steps": STAGE_STEPS, "pairs_per_step": 4, "optimizer": {**STEADY}},
        "objective": {"kl": {"weight": 0.01}, "preference": {"weight": 0.1}, "sft": {"weight": 0.1}},
        "train": {**TINY["train"], "max_steps": STEPS, "max_verifier_failures": 0.5},
        "checkpoint": {"interval": INTERVAL},
    }


def trees_of(folder: Path) -> list[Tree]:
    trees = [tree for path in sorted((folder / "trees").glob("*.jsonl")) for tree in read_trees(path)]
    return [tree for tree in trees if isinstance(tree, Tree)]


def check_chain(tree: Tree, number: int, task: Task, environment: Environment) -> None:
    """Compare a judged chain with the episode that has its turns."""
    problem = task.problem("train", int(tree.prompt_id.split("-")[1].split("@")[0]))
    turns, replies = [""], []
    for node in (tree.nodes[n] for n in tree.path(number)):
        if node.type != ENVIRONMENT:
            turns[-1] += node.text
            continue
        replies.append(environment(problem, tuple(turns)))
        assert (node.text, node.forced, node.generated) == (replies[-1].text, len(node.token_ids), 0)
        assert not replies[-1].done
        turns.append("")
    last = tree.nodes[number]
    is_cut_off = last.defect == "truncated"
    if not is_cut_off or last.text.endswith("</guess>"):
        replies.append(environment(problem, tuple(turns)))
    assert is_cut_off or replies[-1].done or (last.finish_reason, len(turns)) == ("turns", MAX_TURNS)
    assert last.verdict == with_replies(task.verify(problem, "".join(turns), not is_cut_off), replies)


def test_killed_runs_with_searched_turns_end_with_the_same_bytes(start: Callable[..., Command], tmp_path: Path) -> None:
    values = config(tmp_path)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    start("train", write_config(whole.parent, values)).finish()
    stage = whole / "stages" / "search"
    trees = trees_of(stage)
    assert len(trees) == TREE_COUNT
    task, environment = (
        build_task(GuessConfig(**TASK), 3),
        build_environment(EnvironmentConfig(**game_section(tmp_path, MAX_TURNS)), ""),
    )
    for tree in trees:
        for node in tree.nodes:
            assert node.type != ENVIRONMENT or tree.nodes[node.parent].type == "guess"
        cut_off = [number for number, node in enumerate(tree.nodes) if node.defect == "truncated"]
        for number in [*tree.answers(), *cut_off]:
            check_chain(tree, number, task, environment)
    assert any(node.finish_reason == "turns" for tree in trees for node in tree.nodes)
    assert sum(len(tree.answers()) for tree in trees) > TREE_COUNT
    assert sum(tree.counts.get("environment_error", 0) for tree in trees) > 0
    rows = [json.loads(line) for line in (stage / "data" / "preferences.jsonl").read_text().splitlines()]
    assert rows and all(row["chosen_mask"] is None or False in row["chosen_mask"] for row in rows)
    online = [row for row in read_rows(whole / "metrics.jsonl") if row["stage"] == "online" and row["step"]]
    assert len(online) == STEPS and all(row["search/replies"] > 0 for row in online)
    assert all(row["rollout/turns"] > 1 for row in online), "the other prompts are plain episodes"

    command = start("train", write_config(killed.parent, values))
    wait_until(command, lambda: count_finished(killed / "stages" / "search") >= SHARD)
    command.signal(signal.SIGKILL, group=False)
    command.fail(-signal.SIGKILL)
    command.assert_gone(within_s=15)
    command = start("train", str(killed.parent / "config.yaml"))
    wait_for_row(command, killed, "online", INTERVAL + 1)
    command.signal(signal.SIGKILL, group=False)
    command.fail(-signal.SIGKILL)
    command.assert_gone(within_s=15)
    start("train", str(killed.parent / "config.yaml")).finish().assert_gone(within_s=5)
    assert tree_files(killed / "stages" / "search") == tree_files(stage)
    assert steady_rows(killed) == steady_rows(whole)
    assert digests(killed) == digests(whole)
