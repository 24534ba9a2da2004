"""The loop of the stage online over fakes: order of calls, counts, bounds and resumes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config
from fakes import searched_group

from rlsys.control.producer import is_searched
from rlsys.errors import EngineError, InterruptedRunError, RlsysError, TooManyFailuresError
from rlsys.interfaces import EngineStats
from rlsys.run.metrics import read_rows
from rlsys.types import RunState, TrajectoryGroup


def test_a_step_takes_trains_publishes_evaluates_and_releases(tmp_path: Path) -> None:
    settings = config(stages=["online"], train={"max_steps": 2}, evaluation={"interval": 1})
    run = Run(tmp_path, settings)()
    held_out = [("generate", 0, ("held_out-0",)), ("generate", 1, ("held_out-1",))]

    def publish(version: int) -> list[Any]:
        return [("send", version), ("score_probe", 2), ("update", 0, version), ("update", 1, version)]

    sampled = [call for call in run.calls if call[0] == "generate" and call[2][0].startswith("train")]
    # Two dispatches of one prompt before each step; those after the last release are cut off unseen.
    assert run.calls == [
        ("start_stage", "online", run.model, None, None),
        ("score_probe", 2), ("probe", 0), ("probe", 1),  # calibration
        *publish(0),
        *held_out,
        *sampled[:2], ("train", 1), *publish(1), *held_out,
        *sampled[2:4], ("train", 2), *publish(2), *held_out,
        ("save", 2),
    ]  # fmt: skip
    assert len(sampled) == 4
    assert run.learner.trained == [[sampled[0][2][0], sampled[1][2][0]], [sampled[2][2][0], sampled[3][2][0]]]


def test_an_interruption_while_waiting_for_groups_ends_at_once_with_the_last_step_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"]))

    async def scenario() -> None:
        running = asyncio.create_task(run.start())
        while not run.learner.trained:
            await asyncio.sleep(0)
        run.pool.hold = asyncio.Event()  # the next rollouts never come back
        while len([call for call in run.calls if call[0] == "generate" and call[2][0].startswith("train")]) < 4:
            await asyncio.sleep(0)
        run.controller.interrupt("SIGINT")
        with pytest.raises(InterruptedRunError, match="SIGINT"):
            await asyncio.wait_for(running, 5)

    asyncio.run(scenario())
    assert run.only("save") == [("save", 1)]
    # The producer had taken prompts 2 and 3: the saved state issues them again or has not issued them yet.
    state = run.saved()["step_000001"]
    assert sorted([*state.in_flight, *range(state.cursor, 4)]) == [2, 3]


def test_a_dead_actor_ends_the_wait_with_its_own_error_and_saves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"]))
    run.pool.error = EngineError("actor 1 died")
    with pytest.raises(EngineError, match="actor 1 died"):
        run()
    assert run.only("save", "train") == []


def test_too_many_failed_rollouts_end_the_run(tmp_path: Path) -> None:
    failing = tuple(f"train-{number}@{epoch}" for number in range(5) for epoch in range(3))
    with pytest.raises(TooManyFailuresError, match="scripted"):
        Run(tmp_path, config(stages=["online"]), failing)()


def test_failures_are_counted_over_a_resume(tmp_path: Path) -> None:
    first = Run(tmp_path, config(stages=["online"]), failing=("train-0@0",))
    first.interrupt_at(2)
    with pytest.raises(InterruptedRunError):
        first()
    Run(tmp_path, config(stages=["online"]), failing=("train-0@0",))()
    rows = read_rows(tmp_path / "metrics.jsonl")
    failed = [row["rollout/failed"] for row in rows if "rollout/failed" in row]
    assert failed == sorted(failed)
    assert failed[-1] == 1


class BrokenVerifier:
    """Fails the first verification of every group, from prompt `first` of the stream on."""

    def __init__(self, run: Run, first: int) -> None:
        self.run, self.first, self.seen = run, first, 0
        self.train = run.pool.generate
        run.pool.generate = self.generate

    async def generate(self, actor: int, prompts: Any, settings: Any) -> Any:
        groups = await self.train(actor, prompts, settings)
        return [self.judge(group) if group.prompt.prompt_id.startswith("train") else group for group in groups]

    def judge(self, group: TrajectoryGroup) -> TrajectoryGroup:
        self.seen += 1
        if self.seen <= self.first:
            return group
        bad = replace(group.trajectories[0], outcome="error", reward=0.0, detail="no such module")
        return replace(group, trajectories=(bad, *group.trajectories[1:]))


def test_a_verifier_that_fails_ends_the_run_before_anything_is_learned_from_it(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], train={"max_verifier_failures": 0.4}))
    BrokenVerifier(run, 0)
    message = r"2 of 4 verifications failed, more than train\.max_verifier_failures = 0\.4; mend the .*@0: no such"
    with pytest.raises(TooManyFailuresError, match=message):
        run()
    assert run.only("train") == []


def test_failed_verifications_are_counted_over_a_resume(tmp_path: Path) -> None:
    # 4 verifications a step. Good ones in two steps, then 2 of 4 fail: 2 of 12 and 4 of 16 are not more than
    # 0.25, 6 of 20 are. Counted from the resume alone, 2 of 4 would be too many.
    settings = config(stages=["online"], train={"max_verifier_failures": 0.25, "max_steps": 9})
    first = Run(tmp_path, settings)
    first.interrupt_at(2)
    with pytest.raises(InterruptedRunError):
        first()
    second = Run(tmp_path, settings)
    BrokenVerifier(second, 0)
    with pytest.raises(TooManyFailuresError, match="6 of 20 verifications"):
        second()
    assert second.only("train") == [("train", 3), ("train", 4)]
    third = Run(tmp_path / "b", settings)
    BrokenVerifier(third, 4)
    third.interrupt_at(4)
    with pytest.raises(InterruptedRunError):
        third()
    counters = third.saved()["step_000004"].counters
    assert (counters["failed_verifications"], counters["verifications"]) == (4, 16)


def test_a_group_above_the_staleness_bound_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"]))
    run.learner.on_train = lambda version: None
    update = run.pool.update_weights

    async def stuck(actor: int, *arguments: Any) -> Any:
        before = run.pool.versions[actor]
        ack = await update(actor, *arguments)
        run.pool.versions[actor] = before  # says that it serves the new version, and samples with the old one
        return ack

    run.pool.update_weights = stuck
    with pytest.raises(RlsysError, match=r"staleness 1 .* train\.max_staleness is 0"):
        run()
    assert run.only("train") == [("train", 1)]


def test_a_group_of_a_lost_attempt_is_refused(tmp_path: Path) -> None:
    """After a return to a checkpoint the same versions have other weights."""
    run = Run(tmp_path, config(stages=["online"]))
    run.learner.restarts = 1
    with pytest.raises(RlsysError, match="attempt 0 of the learner sampled, with weight version 0, .* in attempt 1"):
        run()
    assert run.only("train") == []


def test_the_state_in_a_checkpoint_counts_what_is_not_trained(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], train={"max_staleness": 1}, checkpoint={"interval": 1}))()
    for step, state in enumerate(run.saved().values(), start=1):
        # 2 groups a step are trained, in order; the prompts issued since then are in flight.
        assert state.step == step
        assert list(state.in_flight) == list(range(2 * step, state.cursor))
    info = json.loads((tmp_path / "checkpoints" / "step_000003" / "MANIFEST.json").read_text())["info"]
    assert info == {"weight_version": 3, "stage": "online", "inputs": {"model.path": "digest"}}


@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_an_interrupted_run_with_searched_prompts_goes_on_as_if_nothing_had_happened(
    max_staleness: int, fraction: float, tmp_path: Path
) -> None:
    train = {"max_staleness": max_staleness, "max_steps": 5}
    settings = config(stages=["online"], train=train, search={"fraction": fraction})
    undisturbed = Run(tmp_path / "a", settings)()
    first = Run(tmp_path / "b", settings)
    first.interrupt_at(2)
    with pytest.raises(InterruptedRunError):
        first()
    # Searched prompts wait in the state like any other: 4 of 0 to 3 + 2 max_staleness are trained.
    assert first.saved()["step_000002"].in_flight == tuple(range(4, 4 + 2 * max_staleness))
    second = Run(tmp_path / "b", settings)()
    assert first.learner.trained + second.learner.trained == undisturbed.learner.trained
    # A prompt that was searched and not trained before the interruption is searched again.
    assert first.learner.kinds + second.learner.kinds == undisturbed.learner.kinds
    # 10 prompts of 5 steps; at 0.4, those of index 2, 4, 7 and 9.
    kinds = [is_searched(index, fraction) for index in range(10)]
    assert [kind for step in undisturbed.learner.kinds for kind in step] == kinds
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in "ab"]
    for name in ("search/trees", "search/reward", "rollout/accuracy"):
        assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]]


def test_figures_of_sampled_and_searched_groups_are_apart(tmp_path: Path) -> None:
    search = {"fraction": 0.5}
    Run(tmp_path / "mixed", config(stages=["online"], train={"max_steps": 1}, search=search))()
    mixed = read_rows(tmp_path / "mixed" / "metrics.jsonl")[-1]
    assert (mixed["search/trees"], mixed["rollout/tokens"]) == (1, 4)
    Run(tmp_path / "all", config(stages=["online"], train={"max_steps": 1}, search={"fraction": 1}))()
    alone = read_rows(tmp_path / "all" / "metrics.jsonl")[-1]
    assert alone["search/trees"] == 2
    assert "rollout/reward" not in alone and alone["rollout/staleness_max"] == 0


def test_engines_are_measured_over_the_rollouts_of_a_step_alone(tmp_path: Path) -> None:
    # Every prompt is a second of work for one token: 2 a step. Evaluations, before and within, count for no step.
    run = Run(tmp_path, config(stages=["online"], evaluation={"interval": 1}))
    counted = 0

    async def usage() -> Sequence[EngineStats]:
        nonlocal counted
        prompts = sum(len(call[2]) for call in run.only("generate"))
        new, counted = prompts - counted, prompts
        done = {"busy_s": float(new), "wall_s": 8.0, "generated_tokens": new * new, "prompt_tokens": 10}
        return [EngineStats(model="policy", engine=0, cached_tokens=new, in_flight_mean=1.0, **done)]

    run.pool.engine_stats = usage
    run()
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["step"] > 0]
    names = ("rollout/tokens_per_s", "rollout/prefix_cache_hits", "rollout/idle_policy")
    assert [tuple(row[name] for name in names) for row in rows] == [(4 / 2, 2 / 10, 1 - 2 / 8)] * 3


def test_verifications_of_trees_count_too(tmp_path: Path) -> None:
    # A sampled group with 2 good ones, and a tree of 2 scored answers, 1 that could not be judged, and 2 nodes of 10
    # whose values failed.
    settings = config(stages=["online"], train={"max_verifier_failures": 0.15}, search={"fraction": 0.5})
    run = Run(tmp_path, settings)

    async def search(actor: int, prompt: Any) -> Any:
        return searched_group(prompt, verifier_errors=1.0, values=10.0, value_errors=2.0)

    run.pool.search = search
    message = r"3 of 15 verifications failed, .* in the tree of prompt train-\d@0, see the log of its actor"
    with pytest.raises(TooManyFailuresError, match=message):
        run()
    assert run.only("train") == []


def test_a_searched_group_above_the_staleness_bound_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], search={"fraction": 1.0}))
    update = run.pool.update_weights

    async def stuck(actor: int, *arguments: Any) -> Any:
        ack = await update(actor, *arguments)
        run.pool.versions[actor] = 0
        return ack

    run.pool.update_weights = stuck
    with pytest.raises(RlsysError, match=r"staleness 1 .* train\.max_staleness is 0"):
        run()


def test_prompts_that_a_smaller_buffer_cannot_issue_yet_stay_in_flight(tmp_path: Path) -> None:
    def interrupted(max_staleness: int, version: int) -> RunState:
        run = Run(tmp_path, config(stages=["online"], train={"max_staleness": max_staleness, "max_steps": 9}))
        run.interrupt_at(version)
        with pytest.raises(InterruptedRunError):
            run()
        return run.saved()[f"step_{version:06d}"]

    # 8 slots: prompts 0 to 7 are issued, 0 and 1 trained. Then 2 slots: 2 and 3 are trained, 4 to 7 wait.
    assert interrupted(max_staleness=3, version=1).in_flight == (2, 3, 4, 5, 6, 7)
    assert interrupted(max_staleness=0, version=2).in_flight == (4, 5, 6, 7)
