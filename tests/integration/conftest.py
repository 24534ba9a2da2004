"""Fixtures that start the real command line, or hand it arguments in this process."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_runs import WHOLE, Command, FinishedRun, commands, wait_for_row, write_config
from watched_runs import AUDIT, PICKLES, Canary, Watched, files_with, look, new_secrets, planted

from rlsys import cli
from rlsys.config.files import load_config
from rlsys.data.inputs import prepare_model


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start commands that end with the test at the latest."""
    with commands() as begin:
        yield begin


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """An undisturbed run of all stages, with planted secrets and pickles, watched while it runs."""
    folder = tmp_path_factory.mktemp("finished")
    config, run_dir, unpickled, log = write_config(folder, WHOLE), folder / "run", folder / "unpickled", folder / "log"
    model = prepare_model(load_config(config), run_dir)  # the run finds its model built
    pickles = [model.path / name for name in PICKLES]
    for path in pickles:
        path.write_bytes(pickle.dumps(Canary(unpickled)))
    for path in (run_dir, *run_dir.rglob("*")):  # as if the run had made the file
        path.chmod(0o700 if path.is_dir() else 0o600)
    log.touch()
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(AUDIT.format(log=str(log)))
    python_path = os.pathsep.join(filter(None, (str(folder / "path"), os.environ.get("PYTHONPATH"))))
    secrets, umask = new_secrets(), os.umask(0o022)
    with commands() as begin:
        command = begin("train", config, environment={**planted(secrets), "PYTHONPATH": python_path})
        os.umask(umask)
        wait_for_row(command, run_dir, "online", 1)
        seen = look(command)
        (ray,) = command.seen.ray_folders
        tokens = [token for process in seen if (token := process.environment.get("RAY_AUTH_TOKEN"))]
        hits, files = files_with(Path(ray), [*secrets.values(), *tokens])
        # Ray makes its files readable for everybody, so the test checks who can reach them.
        open_ray = [ray] if Path(ray).stat().st_mode & 0o077 else []
        command.finish()
        assert [path for path in pickles if not path.exists()] == []  # the model was not made again
        deadline = time.monotonic() + 5.0
        while (left := command.left_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        finished = FinishedRun(config, run_dir, command, left)
        connections = log.read_text().splitlines()
        yield Watched(finished, secrets, seen, tokens, hits, files, open_ray, connections, unpickled)


@pytest.fixture(scope="session")
def finished_run(watched: Watched) -> FinishedRun:
    return watched.finished


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """Set the verbosity of transformers as rlsys does. Another test can have imported transformers before."""
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
    """Run a command in this process, and return the one line of its refusal."""

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
