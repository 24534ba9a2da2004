"""One rank of a learner without Ray: runs the jobs of a JSON file one after another.

Usage: learner_child.py RANK RANKS JOBS. A job says how the policy is partitioned, where it starts, which
training steps it makes and where the result is saved.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from learners.rank_settings import RankSettings, learner_environment
from rlsys.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from rlsys.types import Demonstration, Prompt, Trajectory, TrajectoryGroup, VersionSpan

PROMPT = 10
STEPS = 4


def rows(rng: np.random.Generator, count: int) -> list[Demonstration]:
    lengths = rng.integers(20, 60, count)
    return [
        Demonstration(token_ids=rng.integers(3, 60, n).astype(np.int32), loss_mask=np.arange(n) >= PROMPT)
        for n in lengths
    ]


def groups(rng: np.random.Generator, count: int, size: int) -> list[TrajectoryGroup]:
    return [_group(rng, size) for _ in range(count)]


def _group(rng: np.random.Generator, size: int) -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(
            token_ids=row.token_ids,
            loss_mask=row.loss_mask,
            behavior_logprobs=np.where(row.loss_mask, -4.0, 0.0).astype(np.float32),
            versions=(VersionSpan(start=PROMPT, version=0),),
            finish_reason="stop",
            reward=float(number % 2),
            outcome="ok",
            answered=True,
        )
        for number, row in enumerate(rows(rng, size))
    )
    prompt = Prompt(prompt_id="p", token_ids=trajectories[0].token_ids[:PROMPT], answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=trajectories)


def train(policy: Any, first: int, last: int) -> dict[str, float]:
    """Steps first..last-1: even ones supervised, odd ones online with two updates. Data follow from the step."""
    figures: dict[str, float] = {}
    for step in range(first, last):
        rng = np.random.default_rng(step)
        if step % 2 == 0:
            figures |= policy.train_supervised(rows(rng, 13), step + 1)
        else:
            figures |= policy.train_online(groups(rng, 5, 4), 2, step + 1)
    return figures


def main(rank: int, ranks: int, jobs_file: Path) -> None:
    jobs = json.loads(jobs_file.read_text())
    os.environ.update(learner_environment(LearnerConfig(ranks=ranks), "cpu", rank))
    from learners.deepspeed_engine import PolicyEngine

    settings = RankSettings(
        rank=rank,
        ranks=ranks,
        device="cpu",
        store=str(jobs_file.with_suffix(".store")),
        seed=0,
        pad_token_id=0,
        temperature=1.0,
        max_tokens=60,
        learner=LearnerConfig(ranks=ranks),
        objective=ObjectiveConfig(kl_coef=0.01),
    )
    policy = PolicyEngine(settings)
    for job in jobs:
        # Small micro-batches: several of them, unequal in size, and one rank gets a padding one.
        learner = LearnerConfig(ranks=ranks, micro_batch_tokens=256, **job["learner"])
        policy.settings = replace(settings, learner=learner)
        resume = Path(job["resume"]) if job.get("resume") else None
        start = resume / "policy" if resume else Path(job["model"])
        optimizer = OptimizerConfig(learning_rate=1e-3, warmup_updates=2, schedule="linear")
        policy.start_stage(start, optimizer, 100, resume, Path(job["model"]))
        figures = train(policy, job["first"], job["last"])
        folder = Path(job["save"])
        (folder / "policy").mkdir(parents=True, exist_ok=True)
        (folder / "learner").mkdir(exist_ok=True)
        policy.save(folder)
        if rank == 0:
            (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
