"""The main loop over fakes: order of calls, checkpoints, resume, interruptions and failures."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_runs import KINDS, Run, config
from fakes import searched_group

from rlsys.control.controller import Controller
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


def test_a_row_for_every_step_and_one_for_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path, config())()
    steps = [("warm_start", 1), ("warm_start", 2), ("online", 0), ("online", 1), ("online", 2), ("online", 3)]
    assert run.rows() == steps
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["weights/version"] for row in rows] == [1, 2, 2, 3, 4, 5]
    evaluated = [(row["stage"], row["step"]) for row in rows if "held_out/greedy_accuracy" in row]
    assert evaluated == [("online", 0), ("online", 3)]
    assert all(row["rollout/staleness_max"] == 0 for row in rows if "rollout/reward" in row)


def test_the_warm_start_is_published_once_before_the_online_stage(tmp_path: Path) -> None:
    run = Run(tmp_path, config(train={"max_steps": 1}))()
    first = tmp_path / "checkpoints" / "step_000002"
    assert run.only(*KINDS) == [
        ("start_stage", "warm_start", run.model, None, None),
        ("train", 1),
        ("train", 2),
        ("save", 2),
        ("start_stage", "online", first / "policy", None, None),
        ("send", 2),
        ("train", 3),
        ("send", 3),
        ("save", 3),
    ]
    assert {call[2] for call in run.only("update")} == {2, 3}


def test_a_warm_start_alone_is_published_and_evaluated_at_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["warm_start"]))()
    assert run.only("train", "send") == [("train", 1), ("train", 2), ("send", 2)]
    assert "held_out/greedy_accuracy" in read_rows(tmp_path / "metrics.jsonl")[-1]


def test_a_stage_hands_over_its_policy_with_tokenizer_and_the_kl_anchor_is_that(tmp_path: Path) -> None:
    run = Run(tmp_path, config(objective={"kl": {"weight": 0.1}}, train={"max_steps": 1}))()
    handed = tmp_path / "stages" / "warm_start"
    assert (handed / "model.safetensors").read_text() == "2"
    assert (handed / "tokenizer.json").read_text() == "{}"
    assert run.only("start_stage")[1][4] == handed
    assert (tmp_path / "stages" / "online" / "model.safetensors").read_text() == "3"
    alone = Run(tmp_path / "alone", config(stages=["online"], objective={"kl": {"weight": 0.1}}))()
    assert alone.only("start_stage")[0][4] == alone.model


def test_checkpoints_at_the_interval_and_at_the_ends_of_stages(tmp_path: Path) -> None:
    run = Run(tmp_path, config(warm_start={"max_steps": 3}, train={"max_steps": 5}, checkpoint={"interval": 2}))()
    # The interval counts the steps of the stage: 2 and the end of the warm start; 2, 4 and the end of online.
    assert run.only("save") == [("save", version) for version in (2, 3, 5, 7, 8)]
    saved = run.saved()
    assert {name: (state.stage, state.step) for name, state in saved.items()} == {
        "step_000002": (0, 2),
        "step_000003": (0, 3),
        "step_000005": (1, 2),
        "step_000007": (1, 4),
        "step_000008": (1, 5),
    }


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    version: int, max_staleness: int, tmp_path: Path
) -> None:
    settings = config(train={"max_staleness": max_staleness}, evaluation={"interval": 1})
    undisturbed = Run(tmp_path / "a", settings)()
    first = Run(tmp_path / "b", settings)
    first.interrupt_at(version)
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        first()
    assert first.only("save")[-1] == ("save", version)
    second = Run(tmp_path / "b", settings)()
    assert second.rows() == undisturbed.rows()
    assert first.learner.trained + second.learner.trained == undisturbed.learner.trained
    last = "step_000005"
    assert replace(second.saved()[last], in_flight=()) == replace(undisturbed.saved()[last], in_flight=())
    trained = [row.get("rollout/accuracy") for row in read_rows(tmp_path / "b" / "metrics.jsonl")]
    assert trained == [row.get("rollout/accuracy") for row in read_rows(tmp_path / "a" / "metrics.jsonl")]


def test_an_interruption_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    run.interrupt_at(5)
    run()  # reaches its end
    assert run.rows()[-1] == ("online", 3)
    assert (tmp_path / "stages" / "online" / "model.safetensors").read_text() == "5"


def test_an_interruption_in_the_last_step_of_a_stage_comes_after_its_hand_over(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    run.interrupt_at(2)
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        run()
    assert run.only("train", "start_stage")[-1] == ("train", 2)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["warm_start"]


def test_the_hand_over_of_a_smaller_max_steps_is_gone_while_the_stage_goes_on(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    longer = Run(tmp_path, config(train={"max_steps": 5}))
    longer.interrupt_at(6)
    with pytest.raises(InterruptedRunError):
        longer()
    assert not (tmp_path / "stages" / "online").exists()


def test_a_run_that_was_killed_before_its_last_hand_over_only_hands_over(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    (tmp_path / "stages" / "online").rename(tmp_path / "elsewhere")
    again = Run(tmp_path, config())()
    assert again.calls == []
    assert (tmp_path / "stages" / "online" / "model.safetensors").read_text() == "5"


def test_a_resume_within_a_stage_hands_the_checkpoint_to_the_learner(tmp_path: Path) -> None:
    first = Run(tmp_path, config())
    first.interrupt_at(4)
    with pytest.raises(InterruptedRunError):
        first()
    checkpoint = tmp_path / "checkpoints" / "step_000004"
    second = Run(tmp_path, config())()
    assert second.only("start_stage") == [("start_stage", "online", checkpoint / "policy", checkpoint, None)]
    assert second.only("send") == [("send", 4), ("send", 5)]


def test_a_run_whose_warm_start_is_complete_starts_online_from_its_policy(tmp_path: Path) -> None:
    Run(tmp_path, config(stages=["warm_start", "online"], train={"max_steps": 1}))()
    for path in (tmp_path / "checkpoints" / "step_000003").rglob("*"):  # killed before the online checkpoint
        if path.is_file():
            path.unlink()
    for folder in ("policy", "learner", ""):
        (tmp_path / "checkpoints" / "step_000003" / folder).rmdir()
    # and, at the latest moment, before the hand-over
    (tmp_path / "stages" / "warm_start" / "model.safetensors").unlink()
    second = Run(tmp_path, config(train={"max_steps": 1}, objective={"kl": {"weight": 0.1}}))()
    policy, handed = tmp_path / "checkpoints" / "step_000002" / "policy", tmp_path / "stages" / "warm_start"
    assert second.only("start_stage") == [("start_stage", "online", policy, None, handed)]
    assert (handed / "model.safetensors").read_text() == "2"


def test_a_raised_max_steps_continues_the_last_stage(tmp_path: Path) -> None:
    Run(tmp_path, config())()
    again = Run(tmp_path, config())()
    assert again.calls == []  # nothing is left to do
    longer = Run(tmp_path, config(train={"max_steps": 5}))()
    assert longer.only("train") == [("train", 6), ("train", 7)]
    assert longer.rows()[-3:] == [("online", 3), ("online", 4), ("online", 5)]


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


def test_an_interruption_before_the_first_step_saves_nothing_and_still_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, config())
    original = run.learner.start_stage

    async def start(*arguments: Any) -> None:
        run.controller.interrupt("SIGINT")
        run.controller.interrupt("SIGTERM")  # the first reason counts
        await original(*arguments)

    run.learner.start_stage = start
    with pytest.raises(InterruptedRunError, match="SIGINT"):
        run()
    assert run.only("save", "train") == []


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
    """From prompt `first` of the stream on, the first verification of every group fails."""

    def __init__(self, run: Run, first: int) -> None:
        self.run, self.first, self.seen = run, first, 0
        self.train = run.pool.generate
        run.pool.generate = self.generate

    async def generate(self, actor: int, prompts: Any, settings: Any) -> Any:
        groups = await self.train(actor, prompts, settings)
        return [self.judge(found) if found.prompt.prompt_id.startswith("train") else found for found in groups]

    def judge(self, found: TrajectoryGroup) -> TrajectoryGroup:
        self.seen += 1
        if self.seen <= self.first:
            return found
        bad = replace(found.trajectories[0], outcome="error", reward=0.0, detail="no such module")
        return replace(found, trajectories=(bad, *found.trajectories[1:]))


def test_a_verifier_that_fails_ends_the_run_before_anything_is_learned_from_it(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], train={"max_verifier_failures": 0.4}))
    BrokenVerifier(run, 0)
    message = r"2 of 4 verifications failed, more than train\.max_verifier_failures = 0\.4; .* no such module"
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


def test_no_data_of_a_step_that_is_never_trained_are_asked_for(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["warm_start"]))
    asked: list[int] = []
    batch = run.data.batch
    run.data.batch = lambda stage, step: asked.append(step) or batch(stage, step)
    run()
    assert asked == [0, 1]


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
    """After a return to a checkpoint versions come again, with other weights."""
    run = Run(tmp_path, config(stages=["online"]))
    run.learner.restarts = 1
    with pytest.raises(RlsysError, match="attempt 0 of the learner sampled, with weight version 0, .* in attempt 1"):
        run()
    assert run.only("train") == []


def test_a_learner_that_fails_ends_the_run_and_no_checkpoint_is_left_half_written(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], checkpoint={"interval": 1}))

    async def fail(folder: Path) -> None:
        (folder / "policy").mkdir()
        raise EngineError("learner rank 1 died")

    run.learner.save = fail
    with pytest.raises(EngineError, match="rank 1"):
        run()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_state_in_a_checkpoint_counts_what_is_not_trained(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], train={"max_staleness": 1}, checkpoint={"interval": 1}))()
    for step, state in enumerate(run.saved().values(), start=1):
        # 2 groups a step are trained, in order: what was issued since is in flight.
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
    # What was searched before the interruption and not trained is searched again, and never sampled.
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
    # A sampled group with 2 good ones, and a tree of 2 scored answers and 3 that could not be judged.
    settings = config(stages=["online"], train={"max_verifier_failures": 0.4}, search={"fraction": 0.5})
    run = Run(tmp_path, settings)

    async def search(actor: int, found: Any) -> Any:
        return searched_group(found, verifier_errors=3.0)

    run.pool.search = search
    message = r"3 of 7 verifications failed, .* in the tree of prompt train-\d@0, see the log of its actor"
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


def test_what_a_smaller_buffer_could_not_issue_yet_is_not_forgotten(tmp_path: Path) -> None:
    def interrupted(max_staleness: int, version: int) -> RunState:
        run = Run(tmp_path, config(stages=["online"], train={"max_staleness": max_staleness, "max_steps": 9}))
        run.interrupt_at(version)
        with pytest.raises(InterruptedRunError):
            run()
        return run.saved()[f"step_{version:06d}"]

    # 8 slots: prompts 0 to 7 are issued, 0 and 1 trained. Then 2 slots: 2 and 3 are trained, 4 to 7 wait.
    assert interrupted(max_staleness=3, version=1).in_flight == (2, 3, 4, 5, 6, 7)
    assert interrupted(max_staleness=0, version=2).in_flight == (4, 5, 6, 7)


def test_run_stays_short() -> None:
    for method in (Controller.run, Controller._train, Controller._offline, Controller._online):
        assert len(inspect.getsource(method).splitlines()) <= 60
