"""The stage search between other stages, over a fake search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import KINDS, Run, config
from staged_files import files

from rlsys.control.stop_request import StopRequest
from rlsys.errors import ConfigError, DataError, InterruptedRunError
from rlsys.run.metrics import read_rows


class FakeSearch:
    """Records its calls. done: whether its work is already done."""

    def __init__(self, run: Run, done: bool = False) -> None:
        self.run_, self.done = run, done
        self.signal = ""

    def is_complete(self, policy: Path) -> bool:
        self.run_.calls.append(("is_complete", policy))
        return self.done

    async def run(self, policy: Path, stop: StopRequest) -> Mapping[str, float]:
        self.run_.calls.append(("grow", policy))
        if self.signal:
            self.run_.controller.interrupt(self.signal)
            stop.check()
        return {"search/trees": 3.0}


def searching(run_dir: Path, settings: Any, done: bool = False) -> tuple[Run, FakeSearch]:
    run = Run(run_dir, settings)
    run.search = FakeSearch(run, done)
    return run, run.search


def test_the_search_publishes_the_policy_and_changes_no_weights(tmp_path: Path) -> None:
    settings = config(stages=["warm_start", "search", "sft"], **files(tmp_path))
    run, _ = searching(tmp_path, settings)
    run()
    policy = tmp_path / "checkpoints" / "step_000002" / "policy"
    assert run.only(*KINDS, "is_complete", "grow")[3:11] == [
        ("save", 2),
        ("is_complete", policy),
        ("start_stage", "search", policy, None, None),
        ("send", 2),
        ("grow", policy),
        ("start_stage", "sft", policy, None, None),
        ("train", 3),
        ("train", 4),
    ]
    assert [(row["stage"], row["step"], row["weights/version"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        ("warm_start", 1, 1), ("warm_start", 2, 2), ("search", 0, 2), ("sft", 1, 3), ("sft", 2, 4),
    ]  # fmt: skip
    assert {state.stage for state in run.saved().values()} == {0, 2}


def test_a_search_comes_first_without_a_checkpoint(tmp_path: Path) -> None:
    settings = config(stages=["search", "sft"], **files(tmp_path))
    run, _ = searching(tmp_path, settings)
    run()
    assert run.only("start_stage", "send", "grow")[:3] == [
        ("start_stage", "search", run.model, None, None),
        ("send", 0),
        ("grow", run.model),
    ]
    assert run.rows()[0] == ("search", 0)


def test_a_finished_search_is_skipped_and_a_resume_in_a_later_stage_ignores_it(tmp_path: Path) -> None:
    settings = config(stages=["warm_start", "search", "sft", "online"], sft=files(tmp_path)["sft"])
    first, search = searching(tmp_path, settings)
    search.signal = "SIGTERM"
    with pytest.raises(InterruptedRunError, match="^SIGTERM$"):
        first()
    assert first.only("save") == [("save", 2)]
    second, _ = searching(tmp_path, settings, done=True)
    second.interrupt_at(3)  # in the first step of sft
    with pytest.raises(InterruptedRunError):
        second()
    assert [call[1] for call in second.only("start_stage")] == ["sft"]
    third, _ = searching(tmp_path, settings)
    third()
    assert third.only("is_complete", "grow") == []
    assert third.rows().count(("search", 0)) == 1


def test_an_interruption_before_the_first_tree_begins_none(tmp_path: Path) -> None:
    run, _ = searching(tmp_path, config(stages=["search", "sft"], sft=files(tmp_path)["sft"]))
    update = run.pool.update_weights

    async def publish(actor: int, *arguments: Any) -> Any:
        run.controller.interrupt("SIGINT")
        return await update(actor, *arguments)

    run.pool.update_weights = publish
    with pytest.raises(InterruptedRunError, match="SIGINT"):
        run()
    assert run.only("grow") == []


def test_the_reference_after_a_search_is_the_policy_before_it(tmp_path: Path) -> None:
    imitated = {"sft": {"weight": 0.1}, "preference": {"source": "file"}}
    sections = files(tmp_path) | {"objective": {"kl": {"weight": 0.1}, **imitated}, "train": {"max_steps": 1}}
    run, _ = searching(tmp_path, config(stages=["warm_start", "search", "online"], **sections))
    run()
    assert run.only("start_stage")[-1][4] == tmp_path / "stages" / "warm_start"
    assert not (tmp_path / "stages" / "search").exists()  # the stage exports no policy


def extract(run_dir: Path, chosen: int) -> None:
    """Write the files of the stage search; the chosen side of every pair ends with the given token."""
    folder = run_dir / "stages" / "search" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {"chosen_ids": [[1, chosen]], "rejected_ids": [[1, 3]], "prompt_length": [1], "common_prefix": [1]}
    pq.write_table(pa.table(pairs), folder / "preferences.parquet")


def test_a_resume_trains_on_what_the_search_extracted_before(tmp_path: Path) -> None:
    settings = config(stages=["search", "preference"], objective={"preference": {"weight": 1.0}})
    extract(tmp_path, 2)
    first, _ = searching(tmp_path, settings)
    first.interrupt_at(3)
    with pytest.raises(InterruptedRunError):
        first()
    second, _ = searching(tmp_path, settings)
    second.interrupt_at(5)
    with pytest.raises(InterruptedRunError):
        second()
    assert second.only("train") == [("train", 4), ("train", 5)]
    extract(tmp_path, 4)
    third, _ = searching(tmp_path, settings)
    with pytest.raises(ConfigError, match=r"preferences\.parquet: the rows differ from those that .*step_000005 was"):
        third()
    assert third.only("start_stage", "train") == []


def test_a_missing_file_of_the_search_is_named(tmp_path: Path) -> None:
    run, _ = searching(tmp_path, config(stages=["search", "sft"]))
    with pytest.raises(DataError, match=r"^stage search: .*stages/search/data/supervised\.parquet: no such file"):
        run()
    assert run.only("train") == []
