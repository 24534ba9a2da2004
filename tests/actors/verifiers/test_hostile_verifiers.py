"""Verifiers that fork, allocate, listen, print, hang or write false verdicts. No process or folder may be left."""

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
from problems import problem_of

from actors.verifiers.guard import MAX_PROCESSES
from actors.verifiers.pool import RewardPool, _decode
from actors.verifiers.process import _environment
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.types import Verdict

HERE = Path(__file__).parent
SETTINGS = RewardsConfig(workers=1, timeout_s=2.0, memory_mib=1024)
PATIENT = SETTINGS.model_copy(update={"timeout_s": 30.0})  # for tests that expect no timeout
RUN = "RLSYS_RUN_ID"  # verifiers and all their processes inherit this variable


@pytest.fixture(autouse=True)
def own_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv(RUN, uuid.uuid4().hex)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def processes() -> list[int]:
    """Return the ids of all processes of this test. Zombies have no environment, but are children of this process."""
    mark = f"{RUN}={os.environ[RUN]}".encode()
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    for pid in set(psutil.pids()) - {os.getpid(), *pids}:
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                pids.append(pid)
        except OSError:
            continue
    return pids


def judge(
    completions: Sequence[str], settings: RewardsConfig = SETTINGS, factory: str = "build"
) -> tuple[list[Verdict], float]:
    """Return the verdicts of a running pool and the time in seconds. Check that the closed pool leaves nothing."""

    async def run() -> tuple[list[Verdict], float]:
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier=f"scripted_verifier:{factory}")
        try:
            await pool.start()
            started = time.monotonic()
            verdicts = await pool.verify([(problem_of("3"), completion) for completion in completions])
            return verdicts, time.monotonic() - started
        finally:
            await pool.close()

    assert processes() == []
    judged = asyncio.run(run())
    assert processes() == []
    assert list(Path(tempfile.gettempdir()).glob("rl-verifier-*")) == []
    return judged


ENDLESS = ["hang", "regex", "power", "daemon_and_hang", "print_endlessly", "kill_guard", "stop_guard"]


@pytest.mark.parametrize("command", ENDLESS)
def test_an_endless_verification_ends_after_its_deadline(command: str) -> None:
    (verdict,), seconds = judge([command], SETTINGS.model_copy(update={"timeout_s": 1.0}))
    # A verifier that kills its guard dies with it.
    assert verdict.outcome == ("error" if command == "kill_guard" else "timeout")
    assert (verdict.reward, verdict.answered) == (0.0, False)
    assert seconds <= 1.0 + 5.0  # within 1 s on a free core


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
    "write_anywhere garbage\\n": "wrote something other than a verdict",
    f"write_anywhere {'[' * 60_000}\\n": "wrote something other than a verdict",
    'write_anywhere [0, "ok", NaN, true, "", {}]\\n': "wrote something other than a verdict",
    'write_anywhere [0, "ok", 1.0, true, "", {"task": "1"}]\\n': "wrote something other than a verdict",
    'write_anywhere ["ok", 1.0, true, "", {}]\\n': "wrote something other than a verdict",
    'write_anywhere [999, "ok", 1.0, true, "", {}]\\n': "wrote something other than a verdict",
}


def test_a_failure_has_a_reason_and_the_next_item_is_judged() -> None:
    """A plain verification follows each failing one, in the same process if it survived."""
    verdicts, _ = judge([command for failing in FAILING for command in (failing, "say 3")], PATIENT)
    for (command, reason), verdict, after in zip(FAILING.items(), verdicts[::2], verdicts[1::2], strict=True):
        assert (verdict.outcome, verdict.reward, verdict.answered) == ("error", 0.0, False), command
        assert reason in verdict.detail, command
        assert (after.outcome, after.reward) == ("ok", 1.0), command


def test_processes_of_a_verifier_share_its_memory_limit() -> None:
    """Each of six processes has 100 MiB, well below the limit of 512 MiB."""
    (verdict,), seconds = judge(["fork_large"], SETTINGS.model_copy(update={"timeout_s": 30.0, "memory_mib": 512}))
    assert verdict.outcome == "error"
    assert "hold more than rewards.memory_mib = 512" in verdict.detail
    assert seconds < 15.0


def test_verdicts_before_garbage_in_the_same_read_count() -> None:
    lines = [b'[3, "ok", 1.0, true, "", {}]', b"garbage", b'[4, "ok", 1.0, true, "", {}]']
    assert [(number, verdict.outcome) for number, verdict in _decode(lines)] == [(3, "ok")]
    assert _decode(lines[1:]) == []
    verdicts, _ = judge(["say 3", "write_anywhere garbage\\n"] * 4, PATIENT)
    assert [verdict.outcome for verdict in verdicts] == ["ok", "error"] * 4


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 0), (1,)], ids=str)
def test_too_many_or_misnumbered_verdicts_are_an_error(numbers: tuple[int, ...]) -> None:
    lines = "".join(f'[{number}, "ok", 1.0, true, "", {{}}]\\n' for number in numbers)
    (verdict,), _ = judge([f"write_anywhere {lines}"], PATIENT)
    assert (verdict.outcome, verdict.detail) == ("error", "the verifier process wrote something other than a verdict")


def test_processes_of_a_verification_end_with_its_verdict() -> None:
    counts: list[int] = []

    async def run() -> None:
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build")
        try:
            await pool.start()
            counts.append(len(processes()))
            for _ in range(3):
                (verdict,) = await pool.verify([(problem_of("3"), "daemon_and_answer")])
                assert verdict.outcome == "ok"
                counts.append(len(processes()))
        finally:
            await pool.close()

    asyncio.run(run())
    assert counts == [2, 2, 2, 2], "the guard and the verifier"
    assert processes() == []


@pytest.mark.parametrize("child", ["say 4", "raise", "exit", "stop"])
def test_a_forked_child_of_a_verification_never_answers(child: str) -> None:
    """The child leaves the verifier before its parent. All verdicts are the parent's."""
    verdicts: list[Verdict] = []

    async def run() -> None:
        pool = RewardPool(LetterCountConfig(), 0, PATIENT, verifier="scripted_verifier:build")
        try:
            for batch in (["say 4", f"fork {child}", "say 4", "say 3"], ["say 4", "say 3"]):
                verdicts.extend(await pool.verify([(problem_of("3"), completion) for completion in batch]))
        finally:
            await pool.close()

    asyncio.run(run())
    assert [verdict.outcome for verdict in verdicts] == ["wrong", "ok", "wrong", "ok", "wrong", "ok"]
    assert processes() == []


def test_a_forked_child_of_a_factory_never_answers() -> None:
    verdicts, _ = judge(["sleep 0.4", "say 3", "say 4"], PATIENT, factory="build_with_fork")
    assert [verdict.outcome for verdict in verdicts] == ["ok", "ok", "wrong"]


def test_a_verdict_without_an_item_is_an_error_of_the_next_item() -> None:
    """It costs the first item of the next batch, and shifts no other verdict."""
    verdicts: list[Verdict] = []

    async def run() -> None:
        pool = RewardPool(LetterCountConfig(), 0, PATIENT, verifier="scripted_verifier:build")
        try:
            for batch in (["say 3"], ['write_and_answer [0, "ok", 1.0, true, "", {}]\\n', "say 4", "say 3"]):
                verdicts.extend(await pool.verify([(problem_of("3"), completion) for completion in batch]))
        finally:
            await pool.close()

    asyncio.run(run())
    assert [verdict.outcome for verdict in verdicts] == ["ok", "error", "wrong", "ok"]


def test_a_helper_process_of_a_plug_in_survives_verdicts() -> None:
    verdicts, _ = judge(["3", "4", "3"], factory="build_with_helper")
    assert [verdict.outcome for verdict in verdicts] == ["ok", "wrong", "ok"]


def test_a_socket_that_a_verifier_opens_is_closed_with_the_pool(tmp_path: Path) -> None:
    (verdict,), _ = judge([f"listen {tmp_path / 'port'}"])
    assert verdict.outcome == "ok"
    port = int((tmp_path / "port").read_text())
    connections = psutil.net_connections("tcp")
    open_ports = {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    assert port not in open_ports


def test_a_gigabyte_is_not_written(tmp_path: Path) -> None:
    (verdict,), _ = judge([f"write_file {tmp_path / 'large'}"], SETTINGS.model_copy(update={"timeout_s": 10.0}))
    assert verdict.outcome == "error"
    assert "File too large" in verdict.detail
    assert (tmp_path / "large").stat().st_size <= 16 << 20


def test_a_verifier_has_its_own_folder_as_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (verdict,), _ = judge(["where"])
    folder, home = verdict.detail.split()
    assert folder == home and Path(folder).parent == tmp_path
    assert not Path("here").exists()


SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN")


def test_a_verifier_sees_only_the_variables_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "1")
    (verdict,), _ = judge(["environment"])
    expected = {"PATH", "LD_LIBRARY_PATH", "LANG", "RLSYS_DATA", RUN, "HOME", "TMPDIR", "PYTHONUSERBASE"}
    expected |= {"PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}  # Python itself sets LC_CTYPE
    assert {"PATH", "HOME"} <= set(verdict.detail.split()) <= expected


def test_a_verifier_process_finds_our_packages_from_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    (root,) = _environment("unused")["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "actors" / "verifiers" / "worker.py").is_file()


def test_limits_do_not_slow_trivial_verifications(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seconds = judge(["say 3"] * 512)
    assert seconds < 5.0  # 0.03 s on a free core
