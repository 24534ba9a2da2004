"""Overrides that are written as options."""

from __future__ import annotations

import pytest

from rlsys import cli


@pytest.mark.parametrize("arguments", [["--train.max_steps", "3"], ["--train.max_steps=3"]])
def test_an_override_that_is_written_as_an_option_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rlsys", "check", "c.yaml", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    expected = "no such option --train.max_steps; overrides are written KEY=VALUE: train.max_steps=3"
    assert (left.value.code, capsys.readouterr().err) == (2, f"error: {expected}\n")
