"""The ledger records the outcome of every prompt, and the outcomes add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_runs import Run, config

from rlsys.errors import CheckpointError
from rlsys.run.ledger import Ledger, read_ledger


def test_every_step_has_a_line_and_every_prompt_an_outcome(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, -1)
    ledger.resume(0, ())
    ledger.note("trained", [0, 2])
    ledger.note("filtered", [1])
    ledger.close_step(1, cursor=5, in_flight=(3, 4))
    ledger.note("trained", [3, 4])
    ledger.note("skipped", [5, 6])
    ledger.close_step(2, cursor=7, in_flight=())
    assert read_ledger(ledger.path) == [
        {"version": 1, "trained": [0, 2], "filtered": [1], "skipped": []},
        {"version": 2, "trained": [3, 4], "filtered": [], "skipped": [5, 6]},
    ]


@pytest.mark.parametrize(("cursor", "in_flight"), [(4, (2,)), (3, (2, 3)), (2, (2,))])
def test_a_step_that_does_not_add_up_is_an_error(cursor: int, in_flight: tuple[int, ...], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, -1)
    ledger.note("trained", [0, 1])
    with pytest.raises(CheckpointError, match=f"version 1 does not add up: {cursor} prompts issued, 2 trained"):
        ledger.close_step(1, cursor, in_flight)


@pytest.mark.parametrize(
    ("cursor", "in_flight", "message"),
    [
        (4, (3,), r"lack \[2\]"),  # lost
        (3, (1, 2), r"contain twice \[1\]"),
        (3, (2, 3), r"contain, although not issued, \[3\]"),
    ],
)
def test_a_resume_checks_prompt_by_prompt(
    cursor: int, in_flight: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    before = Ledger(tmp_path, -1)
    before.note("trained", [0, 1])
    before.close_step(1, 3, (2,))
    before.close()
    resumed = Ledger(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        resumed.resume(cursor, in_flight)
    Ledger(tmp_path, 1).resume(3, (2,))


def test_lines_after_the_checkpoint_and_a_cut_one_are_left_out(tmp_path: Path) -> None:
    before = Ledger(tmp_path, -1)
    for version in (1, 2):
        before.note("trained", [version - 1])
        before.close_step(version, version, ())
    before.close()
    with before.path.open("a") as stream:
        stream.write('{"version": 3, "trai')
    resumed = Ledger(tmp_path, 1)
    assert [line["version"] for line in read_ledger(resumed.path)] == [1]
    resumed.resume(1, ())
    resumed.note("trained", [1])
    resumed.close_step(2, 2, ())
    assert [line["trained"] for line in read_ledger(resumed.path)] == [[0], [1]]


def test_a_run_without_a_ledger_begins_one_with_its_earlier_prompts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 5)
    ledger.resume(4, (2,))
    ledger.note("trained", [2])
    ledger.close_step(6, 4, ())
    ledger.close()
    assert read_ledger(ledger.path)[0] == {
        "version": 5,
        "before": [0, 1, 3],
        "trained": [],
        "filtered": [],
        "skipped": [],
    }
    Ledger(tmp_path, 6).resume(4, ())


def test_a_ledger_that_ended_before_its_first_line_is_begun_again(tmp_path: Path) -> None:
    for cut in ("", '{"version": 5, "before": [0, 1'):
        Ledger(tmp_path, 5).close()  # killed while it loads the weights
        (tmp_path / "ledger.jsonl").write_text(cut)
    ledger = Ledger(tmp_path, 5)
    ledger.resume(4, (2,))
    ledger.close()
    assert [line["before"] for line in read_ledger(ledger.path)] == [[0, 1, 3]]


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense", json.dumps({"version": 1, "trained": 1})])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"ledger.jsonl:1: expected version, trained, filtered, skipped"):
        Ledger(tmp_path, 1)


def test_a_run_whose_prompt_vanishes_ends_before_it_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, config(stages=["online"], checkpoint={"interval": 1}))

    def lose(version: int) -> None:
        if version == 2:
            run.context.prompts.cursor += 1

    run.learner.on_train = lose
    with pytest.raises(CheckpointError, match="version 2 does not add up"):
        run()
    assert list(run.saved()) == ["step_000001"]
