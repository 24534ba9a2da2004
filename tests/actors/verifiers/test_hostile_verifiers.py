"""Verifiers that fork, allocate, listen, print, never return or lie: a typed outcome in time, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from actors.verifiers.guard import MAX_PROCESSES
from actors.verifiers.pool import RewardPool, _decode
from rlsys.config.schema import RewardsConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.types import Verdict

HERE = Path(__file__).parent
SETTINGS = RewardsConfig(workers=1, timeout_s=2.0, memory_mib=1024)
PATIENT = SETTINGS.model_copy(update={"timeout_s": 30.0})  # where a timeout is not what is looked for
RUN = "RLSYS_RUN_ID"  # the one variable of the run that verifiers and all that they start inherit


@pytest.fixture(autouse=True)
def own_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv(RUN, uuid.uuid4().hex)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def processes() -> list[int]:
    """Of this run, wherever they hide; zombies have no environment and are looked for among the children."""
    mark = f"{RUN}={os.environ[RUN]}".encode()
    found = [child.pid for child in psutil.Process().children(recursive=True)]
    for pid in set(psutil.pids()) - {os.getpid(), *found}:
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def judge(
    completions: Sequence[str], settings: RewardsConfig = SETTINGS, factory: str = "build"
) -> tuple[list[Verdict], float]:
    """The verdicts of a running pool, and how long they took, in seconds; nothing is left when it is closed."""

    async def run() -> tuple[list[Verdict], float]:
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier=f"scripted_verifier:{factory}")
        try:
            await pool.start()
            started = time.monotonic()
            verdicts = await pool.verify([("3", completion) for completion in completions])
            return verdicts, time.monotonic() - started
        finally:
            await pool.close()

    assert processes() == []
    found = asyncio.run(run())
    assert processes() == []
    assert list(Path(tempfile.gettempdir()).glob("rl-verifier-*")) == []
    return found


ENDLESS = ["hang", "regex", "power", "daemon_and_hang", "print_endlessly", "kill_guard", "stop_guard"]


@pytest.mark.parametrize("command", ENDLESS)
def test_what_never_returns_is_over_after_its_deadline(command: str) -> None:
    (verdict,), seconds = judge([command])
    # Who kills its own guard dies with it.
    assert verdict.outcome == ("error" if command == "kill_guard" else "timeout")
    assert (verdict.reward, verdict.answered) == (0.0, False)
    assert seconds <= SETTINGS.timeout_s + 5.0  # within 1 s on a free core; by itself it would take for ever


FAILING = {
    "allocate": "MemoryError",
    "map": "OSError",
    "stop": "_Stop: stop",
    "interrupt": "KeyboardInterrupt",
    "nan": "finite reward, found nan",
    "infinite": "finite reward, found -inf",
    "huge": "reward from -1e+06 to 1e+06, found 1e+300",
    "integer": "OverflowError",
    "true": "number as reward, found bool",
    "complex": "number as reward, found complex",
    "outcome": "outcome of ok, wrong, error, timeout, found 'fine'",
    "own_error": "mine",
    "odd": "no detail",
    "kill_group": "exit status -9",
    "daemon_and_exit": "exit status 3",
    "fork_many": f"more than {MAX_PROCESSES} processes",
    "write_anywhere garbage\\n": "wrote what is no verdict",
    f"write_anywhere {'[' * 60_000}\\n": "wrote what is no verdict",
    'write_anywhere [0, "ok", NaN, true, ""]\\n': "wrote what is no verdict",
    'write_anywhere ["ok", 1.0, true, ""]\\n': "wrote what is no verdict",
    'write_anywhere [999, "ok", 1.0, true, ""]\\n': "wrote what is no verdict",
}


def test_what_fails_is_an_error_that_says_why_and_the_next_is_judged() -> None:
    """Every second one is a plain verification in what the one before has left of the process."""
    verdicts, _ = judge([command for failing in FAILING for command in (failing, "say 3")], PATIENT)
    for (command, reason), verdict, after in zip(FAILING.items(), verdicts[::2], verdicts[1::2], strict=True):
        assert (verdict.outcome, verdict.reward, verdict.answered) == ("error", 0.0, False), command
        assert reason in verdict.detail, command
        assert (after.outcome, after.reward) == ("ok", 1.0), command


def test_what_a_verifier_starts_shares_its_memory_limit() -> None:
    """Six processes of 100 MiB: each alone is well below it."""
    (verdict,), seconds = judge(["fork_large"], SETTINGS.model_copy(update={"timeout_s": 30.0, "memory_mib": 512}))
    assert verdict.outcome == "error"
    assert "hold more than rewards.memory_mib = 512" in verdict.detail
    assert seconds < 15.0


def test_what_was_answered_before_garbage_counts_although_it_came_in_the_same_read() -> None:
    lines = [b'[3, "ok", 1.0, true, ""]', b"garbage", b'[4, "ok", 1.0, true, ""]']
    assert [(number, verdict.outcome) for number, verdict in _decode(lines)] == [(3, "ok")]
    assert _decode(lines[1:]) == []
    judged = ["say 3", "write_anywhere garbage\\n"] * 8
    for _ in range(3):
        verdicts, _ = judge(judged, PATIENT)
        assert [verdict.outcome for verdict in verdicts] == ["ok", "error"] * 8


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 0), (1,)], ids=str)
def test_more_or_other_verdicts_than_questions_are_none(numbers: tuple[int, ...]) -> None:
    lines = "".join(f'[{number}, "ok", 1.0, true, ""]\\n' for number in numbers)
    (verdict,), _ = judge([f"write_anywhere {lines}"], PATIENT)
    assert (verdict.outcome, verdict.detail) == ("error", "the verifier process wrote what is no verdict")


def test_what_a_verification_starts_ends_with_its_verdict() -> None:
    counts: list[int] = []

    async def run() -> None:
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build")
        try:
            await pool.start()
            counts.append(len(processes()))
            for _ in range(3):
                (verdict,) = await pool.verify([("3", "daemon_and_answer")])
                assert verdict.outcome == "ok"
                counts.append(len(processes()))
        finally:
            await pool.close()

    asyncio.run(run())
    assert counts == [2, 2, 2, 2], "the guard and the verifier"
    assert processes() == []


@pytest.mark.parametrize("child", ["say 4", "raise", "exit", "stop"])
def test_a_child_that_a_verification_forks_never_answers(child: str) -> None:
    """It comes out of the verifier before its parent does; the verdict is the parent's, also of what follows."""
    verdicts: list[Verdict] = []

    async def run() -> None:
        pool = RewardPool(LetterCountConfig(), 0, PATIENT, verifier="scripted_verifier:build")
        try:
            for batch in (["say 4", f"fork {child}", "say 4", "say 3"], ["say 4", "say 3"]):
                verdicts.extend(await pool.verify([("3", completion) for completion in batch]))
        finally:
            await pool.close()

    asyncio.run(run())
    assert [verdict.outcome for verdict in verdicts] == ["wrong", "ok", "wrong", "ok", "wrong", "ok"]
    assert processes() == []


def test_a_child_that_a_factory_forks_never_answers() -> None:
    verdicts, _ = judge(["sleep 0.4", "say 3", "say 4"], PATIENT, factory="build_with_fork")
    assert [verdict.outcome for verdict in verdicts] == ["ok", "ok", "wrong"]


def test_a_verdict_that_comes_when_its_items_have_theirs_is_nobodys() -> None:
    """Of the next batch it costs the first item, and moves none."""
    verdicts: list[Verdict] = []

    async def run() -> None:
        pool = RewardPool(LetterCountConfig(), 0, PATIENT, verifier="scripted_verifier:build")
        try:
            for batch in (["say 3"], ['write_and_answer [0, "ok", 1.0, true, ""]\\n', "say 4", "say 3"]):
                verdicts.extend(await pool.verify([("3", completion) for completion in batch]))
        finally:
            await pool.close()

    asyncio.run(run())
    assert [verdict.outcome for verdict in verdicts] == ["ok", "error", "wrong", "ok"]


def test_a_helper_of_a_plug_in_stays_from_verdict_to_verdict() -> None:
    verdicts, _ = judge(["3", "4", "3"], factory="build_with_helper")
    assert [verdict.outcome for verdict in verdicts] == ["ok", "wrong", "ok"]


def test_a_socket_that_a_verifier_opens_is_closed_with_the_pool(tmp_path: Path) -> None:
    (verdict,), _ = judge([f"listen {tmp_path / 'port'}"])
    assert verdict.outcome == "ok"
    port = int((tmp_path / "port").read_text())
    open_ports = {found.laddr.port for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
    assert port not in open_ports


def test_a_gigabyte_is_not_written(tmp_path: Path) -> None:
    (verdict,), _ = judge([f"write_file {tmp_path / 'large'}"], SETTINGS.model_copy(update={"timeout_s": 10.0}))
    assert verdict.outcome == "error"
    assert "File too large" in verdict.detail
    assert (tmp_path / "large").stat().st_size <= 16 << 20


def test_a_verifier_has_a_folder_and_a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (verdict,), _ = judge(["where"])
    folder, home = verdict.detail.split()
    assert folder == home and Path(folder).parent == tmp_path
    assert not Path("here").exists()


SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN")


def test_a_verifier_sees_no_variable_but_those_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "1")
    (verdict,), _ = judge(["environment"])
    expected = {"PATH", "LD_LIBRARY_PATH", "LANG", "RLSYS_DATA", RUN, "HOME", "TMPDIR", "PYTHONUSERBASE"}
    expected |= {"PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}  # the last is Python's own
    assert {"PATH", "HOME"} <= set(verdict.detail.split()) <= expected


def test_limits_do_not_slow_what_is_trivial(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seconds = judge(["say 3"] * 512)
    assert seconds < 5.0  # 0.03 s on a free core
