"""The entry point of the command line, before the command line itself is imported."""

from __future__ import annotations

import sys

import pytest

from rlsys import __main__ as entry


def test_an_interrupt_during_the_imports_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "rlsys.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rlsys.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert (stopped.value.code, capsys.readouterr().err) == (130, "stopped by SIGINT\n")
