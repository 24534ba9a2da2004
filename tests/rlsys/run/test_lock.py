"""One process at a time uses a run directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.run.lock import RunLock


def test_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert json.loads((tmp_path / "lock").read_text()) == lock.owner
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on {lock.owner['host']}"):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_race_for_the_lock_has_one_winner(tmp_path: Path) -> None:
    """Eight processes try at the same moment and stay until all have tried: one holds, seven name it."""
    ready, go = os.pipe()
    results, report = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(ready, 1)  # ends for all at once, when the parent closes `go`
            try:
                RunLock(tmp_path).__enter__()
                os.write(report, b"held %d;" % os.getpid())
                signal.pause()
            except ConfigError as error:
                os.write(report, b"%s;" % error.message.split(" on ")[0].split("use by ")[1].encode())
            os._exit(0)
        children.append(pid)
    os.close(go)
    answers: list[str] = []
    while len(answers) < 8:
        answers += os.read(results, 4096).decode().split(";")[:-1]
    winners = [answer.split()[1] for answer in answers if answer.startswith("held")]
    assert len(winners) == 1
    assert sorted(set(answers)) == sorted({f"held {winners[0]}", f"process {winners[0]}"})
    os.kill(int(winners[0]), signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    with RunLock(tmp_path):  # the kernel dropped the killed holder's lock
        pass


def test_a_started_program_does_not_hold_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        with RunLock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_unusable_run_dir_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^run\.dir: .*/file/run cannot be created \(Not a directory\); choose"):
        RunLock(tmp_path / "file" / "run").__enter__()
