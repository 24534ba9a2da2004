"""End the processes of a run reliably, and handle signals in every phase of a command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.engine_build import engine_environment
from learners.settings import learner_environment
from rlsys.config.schema import ActorsConfig, LearnerConfig
from rlsys.errors import AbortedRunError, InterruptedRunError
from rlsys.launch.signals import StopSignals, signals_ignored
from rlsys.processes import kill_and_wait, openmp_environment, processes_of_ray

SLEEPER = "import time; time.sleep(60)"
# argv: the folder. Starts two sleepers as if they were of the folder's Ray, and two that are not; tells their ids.
DRIVER = f"""
import subprocess, sys, time
from pathlib import Path
from rlsys.processes import kill_with_this_process
folder = sys.argv[1]
with kill_with_this_process(Path(folder)):
    extra = (["/ray/agent.py", folder + "/session"], ["/ray/agent.py", "/tmp/rl-other"], ["less", folder + "/log"])
    log = open(folder + "/agent.log", "w")  # this process does not name the folder, but has a file open in it
    hidden = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}, "/ray/"], stdout=log, start_new_session=True)
    started = [hidden]
    for more in extra:
        started.append(subprocess.Popen([sys.executable, "-c", {SLEEPER!r}, *more], start_new_session=True))
    print(*(process.pid for process in started), flush=True)
    time.sleep(60)
"""


def test_a_killed_driver_takes_the_processes_of_its_ray_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        hidden, ours, other, pager = (psutil.Process(int(number)) for number in driver.stdout.readline().split())
        try:
            driver.kill()
            # The init process has adopted the children. It may reap them late, so a zombie counts as dead.
            assert ended_within(ours, 10.0) and ended_within(hidden, 10.0)
            assert other.is_running() and pager.is_running()
        finally:
            for process in (other, pager):
                process.kill()


def ended_within(process: psutil.Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_kill_and_wait_ends_running_processes_and_ignores_dead_ones() -> None:
    running = subprocess.Popen([sys.executable, "-c", SLEEPER])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    both = [psutil.Process(running.pid), psutil.Process(gone.pid)]
    gone.wait()
    kill_and_wait(both, 10.0)
    assert not psutil.pid_exists(running.pid) or running.wait() == -signal.SIGKILL


def raise_signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_event_loop_a_signal_ends_the_command(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(AbortedRunError) as caught, StopSignals(" before anything was trained"):
        raise_signal(number)
        time.sleep(5)
    assert caught.value.message == f"{number.name} before anything was trained"
    assert signal.getsignal(number) is before


def test_no_library_catches_a_signal_as_an_exception() -> None:
    with (
        pytest.raises(AbortedRunError, match="^SIGTERM early$"),
        StopSignals(" early"),
        contextlib.suppress(Exception),  # as a library that tries again
    ):
        raise_signal(signal.SIGTERM)
        time.sleep(5)


def test_a_signal_while_the_event_loop_starts_ends_the_command() -> None:
    ran: list[str] = []

    async def work() -> None:
        ran.append("work")

    with StopSignals(" early") as stop, pytest.raises(AbortedRunError, match="^SIGTERM early$"):
        original = asyncio.Runner.run

        def late(runner: asyncio.Runner, main: Any) -> Any:
            raise_signal(signal.SIGTERM)
            return original(runner, main)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.Runner, "run", late)
            stop.run(work())
    assert ran == []


def test_a_signal_after_the_work_changes_nothing() -> None:
    async def work(stop: StopSignals) -> str:
        stop.ask_first(lambda _name: None, " for the second time")
        return "done"

    with StopSignals() as stop:
        found = stop.run(work(stop))
        raise_signal(signal.SIGINT)
        raise_signal(signal.SIGTERM)
    assert found == "done"


async def wait_long(cleaned: list[str]) -> None:
    try:
        asyncio.get_running_loop().call_later(0.01, raise_signal, signal.SIGTERM)
        await asyncio.sleep(5)
    finally:
        cleaned.append("cleaned")


def test_a_signal_in_the_event_loop_cancels_the_task_and_lets_it_clean_up() -> None:
    cleaned: list[str] = []
    with StopSignals(" early") as stop, pytest.raises(AbortedRunError, match="^SIGTERM early$"):
        stop.run(wait_long(cleaned))
    assert cleaned == ["cleaned"]


def test_the_first_signal_requests_an_end() -> None:
    asked: list[str] = []

    async def work(stop: StopSignals) -> None:
        wanted = asyncio.Event()

        def ask(name: str) -> None:
            asked.append(name)
            wanted.set()

        stop.ask_first(ask, " again")
        raise_signal(signal.SIGINT)
        await asyncio.wait_for(wanted.wait(), 5)
        raise InterruptedRunError(asked[0])

    with StopSignals() as stop, pytest.raises(InterruptedRunError, match="SIGINT"):
        stop.run(work(stop))
    assert asked == ["SIGINT"]


def test_the_second_signal_aborts() -> None:
    asked: list[str] = []

    async def work(stop: StopSignals) -> None:
        stop.ask_first(asked.append, " for the second time")
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, raise_signal, signal.SIGINT)
        loop.call_later(0.05, raise_signal, signal.SIGINT)
        await asyncio.sleep(5)

    with StopSignals() as stop, pytest.raises(AbortedRunError, match="^SIGINT for the second time$"):
        stop.run(work(stop))
    assert asked == ["SIGINT"]


def test_a_cancellation_without_a_signal_is_not_an_abort() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with StopSignals() as stop, pytest.raises(asyncio.CancelledError):
        stop.run(work())


def test_signals_do_not_interrupt_a_cleanup() -> None:
    with StopSignals(), signals_ignored():
        raise_signal(signal.SIGINT)
        raise_signal(signal.SIGTERM)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), signals_ignored():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_processes_of_a_ray_are_listed_after_their_parents_have_died(tmp_path: Path) -> None:
    # The shell starts the agent in the background and exits, so the agent loses its parent.
    agent = f'{sys.executable} -c "import time; time.sleep(60)" /ray/agent.py {tmp_path}/session >/dev/null & echo $!'
    shell = subprocess.run(["sh", "-c", agent], stdout=subprocess.PIPE, text=True, check=True)
    orphan = psutil.Process(int(shell.stdout))
    try:
        deadline = time.monotonic() + 10
        while orphan not in processes_of_ray(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes_of_ray(str(tmp_path)) == [orphan]
        assert processes_of_ray(str(tmp_path / "other")) == []
    finally:
        orphan.kill()


def test_the_time_limit_requests_an_end_and_never_aborts_a_save() -> None:
    asked: list[str] = []

    async def work(stop: StopSignals) -> None:
        stop.ask_first(asked.append, " for the second time")
        asyncio.get_running_loop().call_later(0.2, raise_signal, signal.SIGTERM)  # the scheduler ends the job
        await asyncio.sleep(0.5)
        raise InterruptedRunError(asked[0])

    with StopSignals(time_limit_s=0.05) as stop, pytest.raises(InterruptedRunError, match=r"^run\.time_limit$"):
        stop.run(work(stop))
    assert asked == ["run.time_limit", "SIGTERM"]


def test_the_time_limit_after_a_signal_changes_nothing() -> None:
    asked: list[str] = []

    async def work(stop: StopSignals) -> None:
        stop.ask_first(asked.append, " for the second time")
        raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)

    with StopSignals(time_limit_s=0.1) as stop:
        stop.run(work(stop))
    assert asked == ["SIGTERM"]


def test_a_time_limit_that_passes_before_the_first_state_ends_the_command() -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            cleaned.append("cleaned")

    expected = r"^run\.time_limit before anything was trained$"
    with StopSignals(" before anything was trained", 0.05) as stop, pytest.raises(AbortedRunError, match=expected):
        stop.run(work())
    assert cleaned == ["cleaned"]


def test_compute_threads_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert openmp_environment(2) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    for found in (
        engine_environment(ActorsConfig(threads=3), "cpu"),
        learner_environment(LearnerConfig(threads=3), "cpu", 0),
    ):
        assert openmp_environment(3).items() <= found.items()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert openmp_environment(2)["OMP_WAIT_POLICY"] == "ACTIVE"
