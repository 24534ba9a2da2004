"""When the updates of a training step are copied and taken back; what DeepSpeed holds is in the integration tests."""

from __future__ import annotations

import pytest

from learners.deepspeed.rollback import rollback_on_non_finite
from rlsys.errors import NonFiniteLossError


class Model:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def take_snapshot(self) -> None:
        self.asked.append("keep")

    def roll_back(self) -> None:
        self.asked.append("put back")

    def discard_gradients(self) -> None:
        self.asked.append("discard")


@pytest.mark.parametrize(
    ("models", "updates", "expected"),
    [
        (1, 1, ["discard"]),
        (1, 2, ["keep", "discard", "put back"]),
        (2, 1, ["keep", "discard", "put back"]),
        (0, 4, []),
    ],
)
def test_copies_are_kept_where_an_update_may_follow_another(models: int, updates: int, expected: list[str]) -> None:
    made = [Model() for _ in range(models)]
    with pytest.raises(NonFiniteLossError, match="the loss"), rollback_on_non_finite(made, updates):
        raise NonFiniteLossError("the loss")
    assert [model.asked for model in made] == [expected] * models


def test_a_step_that_ends_well_is_left_alone() -> None:
    model = Model()
    with rollback_on_non_finite([model], 2):
        pass
    assert model.asked == ["keep"]


def test_other_errors_end_the_learner_and_are_not_undone() -> None:
    model = Model()
    with pytest.raises(RuntimeError), rollback_on_non_finite([model], 2):
        raise RuntimeError
    assert model.asked == ["keep"]
