"""Fixtures that start the real command line, or hand it arguments in this process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest
from real_runs import TINY, Command, FinishedRun, commands, write_config

from rlsys import cli


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start commands that end with the test at the latest."""
    with commands() as begin:
        yield begin


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    """The tiny config from the start to the end, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, TINY)
    with commands() as begin:
        command = begin("train", config).finish()
        deadline = time.monotonic() + 5.0
        while (left := command.left_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield FinishedRun(config, folder / "run", command, left)


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """As in a process of rlsys, which says so before it imports transformers; here a test may have done that."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def refused(
    quiet_transformers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command in this process; the one line it is refused with."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlsys", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output, errors = capfd.readouterr()
        assert stopped.value.code == 2, errors
        assert "Traceback" not in output + errors
        lines = errors.splitlines()
        assert len(lines) == 1, errors
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
