"""Errors that become those of all ranks, on one rank; two are in tests/integration/test_learner_undo.py."""

from __future__ import annotations

import pytest

from learners.deepspeed.collective_errors import MESSAGE_BYTES, fail_on_all_ranks, first_problem
from rlsys.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize(("said", "heard"), [("", ""), ("disk füll", "disk füll"), ("x" * 5000, "x" * MESSAGE_BYTES)])
def test_a_problem_is_told_as_it_was_said(said: str, heard: str) -> None:
    assert first_problem(said, "cpu") == heard


def test_a_letter_that_is_cut_in_two_is_left_out() -> None:
    assert first_problem("x" * (MESSAGE_BYTES - 1) + "ü", "cpu") == "x" * (MESSAGE_BYTES - 1)


def test_where_nothing_is_wrong_nothing_is_raised() -> None:
    with fail_on_all_ranks(CheckpointError, "cpu"):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "learner rank 0: OSError: [Errno 28] No space left on device"),
        (ConfigError("model.path: no such folder"), "learner rank 0: model.path: no such folder"),
    ],
)
def test_any_error_becomes_one_of_the_given_kind(error: Exception, message: str) -> None:
    with pytest.raises(CheckpointError) as found, fail_on_all_ranks(CheckpointError, "cpu"):
        raise error
    assert (found.value.message, found.value.__cause__) == (message, error)


def test_an_interrupt_is_no_failure_of_the_work() -> None:
    with pytest.raises(KeyboardInterrupt), fail_on_all_ranks(CheckpointError, "cpu"):
        raise KeyboardInterrupt
