"""When snapshots are taken and restored; the integration tests cover the state of DeepSpeed."""

from __future__ import annotations

import pytest

from learners.deepspeed.rollback import rollback_on_non_finite
from rlsys.errors import NonFiniteLossError


class Model:
    """Records the calls of its methods."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def take_snapshot(self) -> None:
        self.calls.append("take_snapshot")

    def roll_back(self) -> None:
        self.calls.append("roll_back")

    def discard_gradients(self) -> None:
        self.calls.append("discard_gradients")


@pytest.mark.parametrize(
    ("models", "updates", "expected"),
    [
        (1, 1, ["discard_gradients"]),
        (1, 2, ["take_snapshot", "discard_gradients", "roll_back"]),
        (2, 1, ["take_snapshot", "discard_gradients", "roll_back"]),
        (0, 4, []),
    ],
)
def test_snapshots_are_taken_only_for_more_than_one_update(models: int, updates: int, expected: list[str]) -> None:
    made = [Model() for _ in range(models)]
    with pytest.raises(NonFiniteLossError, match="the loss"), rollback_on_non_finite(made, updates):
        raise NonFiniteLossError("the loss")
    assert [model.calls for model in made] == [expected] * models


def test_a_step_without_error_is_not_rolled_back() -> None:
    model = Model()
    with rollback_on_non_finite([model], 2):
        pass
    assert model.calls == ["take_snapshot"]


def test_other_errors_are_not_rolled_back() -> None:
    model = Model()
    with pytest.raises(RuntimeError), rollback_on_non_finite([model], 2):
        raise RuntimeError
    assert model.calls == ["take_snapshot"]
