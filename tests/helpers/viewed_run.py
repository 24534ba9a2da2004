"""A run directory with metrics, rollouts and trees for the pages, all of whose texts attack them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from fakes import group, prompt, trajectory
from tree_samples import golden

from rlsys.interfaces import TokenValues
from rlsys.run.rollout_files import RolloutLog, record
from rlsys.run.rollouts import choose_places
from rlsys.search.tree_json import tree_line
from rlsys.trees import ThoughtNode, Tree, TreeFailure
from rlsys.types import TrajectoryGroup

ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'`{{7*7}}"


def write_metrics(folder: Path, steps: int = 3) -> None:
    """Write rows of the stage online; the last line is cut."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "stage": "online",
            "step": step,
            "weights/version": step,
            "rollout/reward": 0.1 * step,
            f"bad/{ATTACK}": 1.0,
            "rollout/idle_policy": 0.25,
            "rollout/staleness_max": 1.0,
            "time/rollout_s": 2.0,
            "time/learn_s": 1.0,
            "time/step_s": 4.0,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "onl')


def step_record(log: RolloutLog, groups: Sequence[TrajectoryGroup], step: int, version: int) -> bytes:
    """Return the record of a step whose advantages rise from -2 to 2 over a trajectory, and gaps from -0.5 to 0.5."""
    values = []
    for group_number, number in choose_places(groups, 2):
        trajectory = groups[group_number].trajectories[number]
        trained = np.where(trajectory.loss_mask, 1.0, np.nan).astype(np.float32)
        size = len(trained)
        gaps = np.linspace(-0.5, 0.5, size, dtype=np.float32) * trained
        values.append(TokenValues(advantages=np.linspace(-2, 2, size, dtype=np.float32) * trained, gaps=gaps))
    return record(log.rows(groups, "online", step, version), values)


def write_rollouts(folder: Path, versions: range = range(1, 4), text: str = ATTACK) -> None:
    """Write rollouts of two prompts whose question, answer and reason are a text."""
    log = RolloutLog(folder, -1, 2, lambda ids: "".join(map(chr, ids)))
    ids = np.array(list(map(ord, text)), np.int32)
    attacked = replace(
        trajectory(length=len(ids)),
        token_ids=np.concatenate([np.array([1, 2, 3], np.int32), ids]),
        behavior_logprobs=np.full(3 + len(ids), -0.5, np.float32),
        detail=text,
        parts={text: 1.0},
    )
    for version in versions:
        groups = [
            replace(group(replace(prompt(f"{text}{n}"), answer=text)), trajectories=(attacked, trajectory(reward=0.0)))
            for n in range(2)
        ]
        log.write(version, step_record(log, groups, version, version))
    log.close()


def attacked_tree(prompt_id: str = "p") -> Tree:
    """Return the golden tree with an attack in every text."""
    grown = golden()
    nodes = tuple(_attacked(node) if number else node for number, node in enumerate(grown.nodes))
    return replace(grown, prompt_id=prompt_id, question=ATTACK, answer=ATTACK, nodes=nodes)


def _attacked(node: ThoughtNode) -> ThoughtNode:
    verdict = node.verdict and replace(node.verdict, detail=ATTACK)
    return replace(node, text=node.text + ATTACK, verdict=verdict)


def write_trees(folder: Path, count: int = 3) -> None:
    """Write trees with attacks, and a failure."""
    (folder / "trees").mkdir(parents=True)
    trees: list[Tree | TreeFailure] = [attacked_tree(f"{ATTACK}{number}") for number in range(count)]
    trees.append(TreeFailure(prompt_id="failed", question=ATTACK, answer="", reason=ATTACK))
    (folder / "trees" / "00000.jsonl").write_text("".join(tree_line(each) + "\n" for each in trees))


def write_run(folder: Path) -> Path:
    """Write all of them."""
    write_metrics(folder)
    write_rollouts(folder)
    write_trees(folder)
    return folder
