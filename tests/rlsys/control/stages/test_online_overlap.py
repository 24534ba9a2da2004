"""With staleness, actors load the weights of a step while the learner makes the next one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config

from rlsys.errors import InterruptedRunError, LearnerLostError, WeightSyncError
from rlsys.run.metrics import read_rows


class SlowActors:
    """Lets actor 1 load every version before `last` only after the learner has begun the next step."""

    def __init__(self, run: Run, error: BaseException | None = None, last: int = 4) -> None:
        self.run, self.error, self.last, self.update = run, error, last, run.pool.update_weights
        run.pool.update_weights = self.load  # type: ignore[method-assign]

    async def load(self, actor: int, offer: Any, probe: Any) -> Any:
        if actor == 1 and 0 < offer.version < self.last:
            while len(self.run.learner.trained) <= offer.version:
                await asyncio.sleep(0)
            if self.error:
                raise self.error
        return await self.update(actor, offer, probe)


def overlapping(run_dir: Path, **sections: Any) -> Run:
    train = {"max_steps": 4, "max_staleness": 1}
    return Run(run_dir, config(stages=["online"], train=train, **sections))


def synchronous(folder: Path) -> list[list[str]]:
    """Return the prompts of every step of a run in which nothing overlaps."""
    return Run(folder / "synchronous", config(stages=["online"], train={"max_steps": 4}))().learner.trained


def test_the_learner_makes_the_next_step_while_an_actor_loads(tmp_path: Path) -> None:
    run = overlapping(tmp_path)
    SlowActors(run)
    run()
    order = run.only("train", "send", "score_probe", "update")
    for version in range(1, 4):
        following = order.index(("train", version + 1))
        # The learner scores the probe with the weights that it has sent.
        assert [call[0] for call in order[order.index(("send", version)) : following]].count("score_probe") == 1
        assert following < order.index(("update", 1, version))
        assert order.index(("update", 1, version)) < order.index(("send", version + 1))
    # Every version reaches every actor, and the last one before the evaluation and the end.
    assert [call for call in order if call[0] == "update" and call[1] == 1] == [("update", 1, n) for n in range(5)]
    assert run.learner.trained == synchronous(tmp_path)


def test_a_publish_beside_the_next_step_is_in_the_row_of_that_step(tmp_path: Path) -> None:
    run = overlapping(tmp_path)
    SlowActors(run)
    run()
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["step"]]
    assert ["weights/publish_s" in row for row in rows] == [False, True, True, True]
    assert all("time/publish_s" in row for row in rows)


def test_an_evaluation_waits_for_the_weights_of_its_step(tmp_path: Path) -> None:
    run = overlapping(tmp_path, evaluation={"interval": 1})()
    for version in range(1, 5):
        held_out = [n for n, call in enumerate(run.calls) if call[0] == "generate" and "held_out" in call[2][0]]
        updated = max(run.calls.index(("update", actor, version)) for actor in (0, 1))
        following = run.calls.index(("train", version + 1)) if version < 4 else len(run.calls)
        assert len([n for n in held_out if updated < n < following]) == 2


@pytest.mark.parametrize("error", [WeightSyncError("actor 1, refused"), LearnerLostError("rank 0 died")])
def test_an_error_of_a_publish_beside_a_step_ends_the_attempt(error: Exception, tmp_path: Path) -> None:
    run = overlapping(tmp_path)
    SlowActors(run, error)
    with pytest.raises(type(error), match=str(error)):
        run()
    assert run.only("send") == [("send", 0), ("send", 1)]  # no version after the one that failed


def test_a_run_that_is_interrupted_ends_with_the_publish_that_is_under_way(tmp_path: Path) -> None:
    run = overlapping(tmp_path, checkpoint={"interval": 1})
    SlowActors(run, last=2)
    run.interrupt_at(2)
    with pytest.raises(InterruptedRunError):
        run()
    assert run.calls.index(("update", 1, 1)) < run.calls.index(("send", 2))
    again = overlapping(tmp_path, checkpoint={"interval": 1})()
    assert run.learner.trained + again.learner.trained == synchronous(tmp_path)
