"""Dynamic sampling in the loop of the stage online: trained groups, counted tokens and resumes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config

from rlsys.data.prompts import PromptBuilder, PromptStream
from rlsys.errors import InterruptedRunError, TooManyFailuresError
from rlsys.run.metrics import read_rows
from rlsys.types import RolloutFailure, TrajectoryGroup

FIGURES = ("rollout/filtered", "rollout/filtered_tokens", "rollout/generated_tokens")


class LevelRun(Run):
    """A run in which only every third prompt of the stream has a group with different rewards."""

    def __init__(self, run_dir: Path, failing: tuple[str, ...] = (), **train: Any) -> None:
        settings = config(stages=["online"], train=train, checkpoint={"interval": 2})
        super().__init__(run_dir, settings, failing)
        self.generate, self.pool.generate = self.pool.generate, self.level
        self.learn, self.learner.train = self.learner.train, self.learning
        builder = PromptBuilder(self.task, lambda text: [1] * len(text), max_model_len=256, max_tokens=8)
        stream = PromptStream(builder, 0)
        self.index = {stream.prompt(index).prompt_id: index for index in range(100)}

    async def learning(self, *arguments: Any) -> dict[str, float]:
        """Let rollouts go on, so that groups are filtered between the metrics of a step and its checkpoint."""
        for _ in range(100):
            await asyncio.sleep(0)
        return await self.learn(*arguments)

    async def level(self, actor: int, prompts: Any, settings: Any) -> Any:
        return [self._leveled(rollout) for rollout in await self.generate(actor, prompts, settings)]

    def _leveled(self, rollout: TrajectoryGroup | RolloutFailure) -> TrajectoryGroup | RolloutFailure:
        if isinstance(rollout, RolloutFailure) or self.index.get(rollout.prompt.prompt_id, 0) % 3 == 0:
            return rollout
        return replace(rollout, trajectories=tuple(replace(each, reward=1.0) for each in rollout.trajectories))

    def interrupted_at(self, version: int) -> LevelRun:
        self.interrupt_at(version)
        with pytest.raises(InterruptedRunError):
            self()
        return self

    @property
    def trained(self) -> list[list[int]]:
        return [[self.index[name] for name in step] for step in self.learner.trained]


def figures(run_dir: Path, *names: str) -> list[tuple[float, ...]]:
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row["step"]]
    return [tuple(row[name] for name in names) for row in rows]


def test_groups_without_a_signal_are_replaced_and_every_token_has_its_row(tmp_path: Path) -> None:
    # 0, 3, 6, ... have a signal; two rounds. Step 1: 0 and 1 -> 2 -> 3. Step 2: 4 -> 6, and 5 -> 7 -> 8. Step 3: 9, and
    # 10 -> 11 -> 12. A group is 2 samples of 2 tokens: 2 groups a step, and 2, 3 and 2 that were replaced.
    run = LevelRun(tmp_path, dynamic_sampling_rounds=2)
    run()
    assert run.trained == [[0, 3], [6, 8], [9, 12]]
    assert figures(tmp_path, *FIGURES) == [(2, 8, 16), (5, 20, 20), (7, 28, 16)]
    # 8 came in the last round, and was trained as it is.
    assert figures(tmp_path, "rollout/tokens", "rollout/zero_advantage_groups") == [(8, 0), (8, 1 / 2), (8, 0)]


def test_without_rounds_groups_without_a_signal_are_trained(tmp_path: Path) -> None:
    run = LevelRun(tmp_path)
    run()
    assert run.trained == [[0, 1], [2, 3], [4, 5]]
    assert figures(tmp_path, *FIGURES) == [(0, 0, 8)] * 3


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    undisturbed = LevelRun(tmp_path / "a", dynamic_sampling_rounds=2, max_steps=5)
    undisturbed()
    first = LevelRun(tmp_path / "b", dynamic_sampling_rounds=2, max_steps=5).interrupted_at(2)
    second = LevelRun(tmp_path / "b", dynamic_sampling_rounds=2, max_steps=5)
    second()
    assert first.trained + second.trained == undisturbed.trained
    assert figures(tmp_path / "a", *FIGURES) == figures(tmp_path / "b", *FIGURES)
    # 0 to 8 were trained or filtered before the checkpoint: none is issued again.
    issued = {name for call in second.only("generate") for name in call[2] if name.startswith("train")}
    assert min(second.index[name] for name in issued) == second.state.cursor == 9


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_the_counts_survive_every_checkpoint_and_add_up(max_staleness: int, tmp_path: Path) -> None:
    train = {"dynamic_sampling_rounds": 2, "max_steps": 6, "max_staleness": max_staleness}
    first = LevelRun(tmp_path, ("train-1@1",), **train).interrupted_at(4)
    second = LevelRun(tmp_path, ("train-1@1",), **train)
    second()
    trained = [index for step in first.trained + second.trained for index in step]
    assert len(trained) == len(set(trained)) == 12
    saved = second.saved().values()
    assert [state.step for state in saved] == [2, 4, 6]
    assert any(state.counters["unlogged_tokens"] for state in saved) == (max_staleness > 0)
    for state in saved:
        counters = state.counters
        gone = counters["filtered_groups"] + counters["failed_rollouts"]
        assert state.cursor == 2 * state.step + gone + len(state.in_flight)
        assert not set(state.in_flight) & set(trained[: 2 * state.step])
        assert counters["filtered_tokens"] == 4 * counters["filtered_groups"] > 0
    generated = sum(tokens for (tokens,) in figures(tmp_path, "rollout/generated_tokens"))
    assert generated == 4 * 12 + figures(tmp_path, "rollout/filtered_tokens")[-1][0]


def test_filtered_rollouts_are_rollouts_that_did_not_fail_over_a_resume_too(tmp_path: Path) -> None:
    # Two steps of 2 groups, 5 more filtered. Then 9 fails and 10 does not: one of 4 + 5 + 2 rollouts.
    train = {"dynamic_sampling_rounds": 2, "max_failed_rollouts": 0}
    first = LevelRun(tmp_path, **train).interrupted_at(2)
    ninth = next(name for name, index in first.index.items() if index == 9)
    with pytest.raises(TooManyFailuresError, match="1 of 11 rollouts"):
        LevelRun(tmp_path, (ninth,), **train)()


def test_tokens_of_failed_rollouts_are_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], train={"max_steps": 1}, search={"fraction": 0.5}))
    search = run.pool.search

    async def once(actor: int, prompt: Any) -> Any:
        run.pool.search = search
        return RolloutFailure(prompt=prompt, reason="nothing came of it", tokens=30)

    run.pool.search = once
    run()
    # 0 is sampled; 1 is searched, fails, and is replaced by 2, which is sampled: 4 tokens each.
    assert figures(tmp_path, "rollout/failed", *FIGURES) == [(1, 0, 0, 38)]
