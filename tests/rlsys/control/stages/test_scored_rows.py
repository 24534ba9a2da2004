"""Rows that a teacher scores: in which stages the engines are asked, and that rows with scores are not asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import Run, config

ROWS = {"weight": 1.0, "divergence": "top_k", "on_policy_share": 0.5}


def settings(stage: str, **distill: Any) -> Any:
    objective = {"distill": {**ROWS, **distill}, "sft": {"source": "demonstrations", "rows_per_step": 2}}
    return config(stages=[stage], objective=objective, teacher={"model": {"path": "unused"}})


@pytest.mark.parametrize(("stage", "steps"), [("warm_start", 2), ("online", 3)])
def test_the_rows_of_every_step_are_scored(stage: str, steps: int, tmp_path: Path) -> None:
    run = Run(tmp_path, settings(stage))()
    assert run.only("score_rows") == [("score_rows", 2)] * steps
    for _, batch in run.learner.batches:
        assert len(batch.demonstrations) == 2
        for row in batch.demonstrations:
            assert row.teacher is not None and np.array_equal(row.teacher.ids[1:, 0], row.token_ids[1:])


def test_own_chains_alone_need_no_row(tmp_path: Path) -> None:
    run = Run(tmp_path, settings("online", on_policy_share=1.0))()
    assert not run.only("score_rows") and not any(batch.demonstrations for _, batch in run.learner.batches)


def test_the_engines_are_asked_for_chains_unless_the_whole_term_is_over_rows(tmp_path: Path) -> None:
    asked: dict[float, set[bool]] = {}
    for share in (0.0, 0.5):
        run = Run(tmp_path / str(share), settings("online", on_policy_share=share))
        generate, asked[share] = run.pool.generate, set()

        async def noted(actor: int, prompts: Any, sampling: Any, share=share, generate=generate) -> Any:
            if prompts[0].prompt_id.startswith("train"):
                asked[share].add(sampling.teacher)
            return await generate(actor, prompts, sampling)

        run.pool.generate = noted
        run()
    assert asked == {0.0: {False}, 0.5: {True}}
