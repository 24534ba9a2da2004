"""Errors shared by all ranks, on one rank; tests/integration/test_learner_undo.py has two ranks."""

from __future__ import annotations

import pytest

from learners.deepspeed.collective_errors import MESSAGE_BYTES, fail_on_all_ranks, first_problem
from rlsys.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize(("own", "shared"), [("", ""), ("disk füll", "disk füll"), ("x" * 5000, "x" * MESSAGE_BYTES)])
def test_a_problem_is_shared_up_to_its_length_limit(own: str, shared: str) -> None:
    assert first_problem(own, "cpu") == shared


def test_a_character_that_is_cut_in_two_is_left_out() -> None:
    assert first_problem("x" * (MESSAGE_BYTES - 1) + "ü", "cpu") == "x" * (MESSAGE_BYTES - 1)


def test_without_an_error_nothing_is_raised() -> None:
    with fail_on_all_ranks(CheckpointError, "cpu"):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "learner rank 0: OSError: [Errno 28] No space left on device"),
        (ConfigError("model.path: no such folder"), "learner rank 0: model.path: no such folder"),
    ],
)
def test_any_error_becomes_an_error_of_the_given_class(error: Exception, message: str) -> None:
    with pytest.raises(CheckpointError) as raised, fail_on_all_ranks(CheckpointError, "cpu"):
        raise error
    assert (raised.value.message, raised.value.__cause__) == (message, error)


def test_an_interrupt_is_not_converted() -> None:
    with pytest.raises(KeyboardInterrupt), fail_on_all_ranks(CheckpointError, "cpu"):
        raise KeyboardInterrupt
