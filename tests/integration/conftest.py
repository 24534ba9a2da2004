"""Fixtures that start the real command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from real_runs import TINY, Command, FinishedRun, commands, write_config


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
