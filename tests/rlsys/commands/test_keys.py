"""`rlsys keys` with several sections, and with names of none."""

from __future__ import annotations

import pytest

from rlsys.commands.keys import run
from rlsys.errors import ConfigError


def test_several_sections_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    run(["run.seed", "rewards.workers", "run.seed"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == ["run.seed", "rewards.workers"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer", "did you mean preference.optimizer or sft.optimizer or train.optimizer or warm_start.optimizer"),
        ("group_size", "did you mean train.group_size"),
        ("trian", "did you mean train"),
        ("zzz", "the sections are run, stages, model, task, "),
    ],
)
def test_a_name_of_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: no such section or key; .*{message}"):
        run(["run", name])
