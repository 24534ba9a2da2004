"""Settings that are accepted with a warning."""

from __future__ import annotations

import pytest
from minimal_config import minimal_with

from rlsys.config.risks import WARNINGS, warnings

GSPO = "objective.policy.surrogate=gspo"
PAPER = ["objective.policy.clip_low=3e-4", "objective.policy.clip_high=4e-4"]

# What each warning is about, as overrides of the minimal config, and the beginning of its text.
WARNED: dict[str, list[tuple[list[str], str]]] = {
    "sequence_ratios_are_clipped": [
        ([GSPO], "warning: objective.policy.surrogate gspo with clip_low 0.2 and clip_high 0.28: "),
        (
            [GSPO, "objective.policy.clip_low=3e-4"],
            "warning: objective.policy.surrogate gspo with clip_low 0.0003 and clip_high 0.28: ",
        ),
    ],
    "shared_rows_hold_one_sample": [
        (["learner.sequence_parallel=2"], "warning: learner.sequence_parallel 2: every sample has a row of its own, "),
    ],
    "rows_fit_micro_batch": [
        (
            ["learner.micro_batch_tokens=255"],
            "warning: learner.micro_batch_tokens 255 is below actors.max_model_len 256: ",
        ),
        (["learner.micro_batch_tokens=255", "stages=[warm_start]"], "warning: learner.micro_batch_tokens 255 "),
    ],
}


@pytest.mark.parametrize(
    ("overrides", "text"), [pytest.param(*case, id=rule) for rule, cases in WARNED.items() for case in cases]
)
def test_a_risk_is_one_line_and_accepted(overrides: list[str], text: str) -> None:
    (line,) = warnings(minimal_with(overrides))
    assert line.startswith(text) and "\n" not in line


@pytest.mark.parametrize(
    "overrides",
    [[], [GSPO, *PAPER], [GSPO, "stages=[warm_start]"], ["learner.micro_batch_tokens=256"]],
    ids=" ".join,
)
def test_other_settings_have_no_warning(overrides: list[str]) -> None:
    assert warnings(minimal_with(overrides)) == []


def test_the_tokens_of_a_pass_are_those_of_all_ranks_that_share_rows() -> None:
    lines = warnings(minimal_with(["learner={sequence_parallel: 2, micro_batch_tokens: 128}"]))
    assert len(lines) == 1 and "a row of its own" in lines[0]
    lines = warnings(minimal_with(["learner={sequence_parallel: 2, micro_batch_tokens: 127}"]))
    assert lines[1].startswith(
        "warning: learner.micro_batch_tokens 127 is below actors.max_model_len 256 / learner.sequence_parallel 2: a "
        "longer row is a pass of its own and needs the memory of up to 128 tokens"
    )


def test_every_warning_has_a_case() -> None:
    assert list(WARNED) == [check.__name__ for check in WARNINGS]
