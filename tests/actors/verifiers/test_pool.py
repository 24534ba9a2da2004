"""The reward pool against verifiers that hang, crash, print, allocate and die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from problems import problem_of

from actors.verifiers import process as processes
from actors.verifiers.pool import RewardPool
from actors.verifiers.steps import wrong_node
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import DatasetConfig, LetterCountConfig
from rlsys.errors import EngineError

HERE = Path(__file__).parent
SETTINGS = RewardsConfig(workers=1, timeout_s=0.5, memory_mib=1024)


@pytest.fixture(autouse=True)
def _workers_find_the_scripted_verifier(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def judge(items, settings=SETTINGS, factory="build"):
    async def run():
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier=f"scripted_verifier:{factory}")
        try:
            return await pool.verify(items)
        finally:
            await pool.close()

    return asyncio.run(run())


def children() -> set[int]:
    """Direct children of this process, zombies included."""
    return {child.pid for child in psutil.Process().children()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, timeout_s=5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def test_mixed_batch_keeps_order_and_outcomes():
    before = children()
    verdicts = judge(
        [
            (problem_of("3"), "say 3"),
            (problem_of("3"), "hang"),
            (problem_of("3"), "say 4"),
            (problem_of("3"), "raise"),
            (problem_of("3"), "nan"),
            (problem_of("3"), "text"),
            (problem_of("3"), "none"),
            (problem_of("3"), "numpy"),
            (problem_of("3"), "kill"),
            (problem_of("3"), "print"),
            (problem_of("3"), "allocate"),
            (problem_of("3"), "exit"),
            (problem_of("3"), "say 3"),
        ]
    )
    assert [verdict.outcome for verdict in verdicts] == [
        *("ok", "timeout", "wrong", "error", "error", "error", "error", "ok", "error", "ok"),
        *("error", "error", "ok"),
    ]
    assert [verdict.reward for verdict in verdicts] == [1, 0, 0, 0, 0, 0, 0, 0.5, 0, 1, 0, 0, 1]
    details = [verdict.detail for verdict in verdicts]
    assert "rewards.timeout_s = 0.5" in details[1]
    assert "IndexError" in details[3]
    assert "finite reward, found nan" in details[4]
    assert "number as reward, found str" in details[5]
    assert "Verdict, found NoneType" in details[6]
    assert "exit status -9" in details[8]
    assert "MemoryError" in details[10]
    assert "SystemExit: 3" in details[11]
    assert children() == before


def test_every_caller_gets_its_own_verdicts():
    async def run():
        pool = RewardPool(
            LetterCountConfig(),
            0,
            RewardsConfig(workers=2, timeout_s=0.5, memory_mib=1024),
            verifier="scripted_verifier:build",
        )
        calls = [[(problem_of("7"), f"say {index + 5}") for index in range(count)] for count in (1, 70, 0, 8)]
        calls.append([(problem_of("7"), "hang")])
        try:
            return await asyncio.gather(*map(pool.verify, calls))
        finally:
            await pool.close()

    results = asyncio.run(run())
    # "7" is said at index 2 only.
    assert [[verdict.reward for verdict in result] for result in results[:4]] == [
        [float(index == 2) for index in range(count)] for count in (1, 70, 0, 8)
    ]
    assert results[4][0].outcome == "timeout"


def test_deadline_is_per_item_not_per_batch():
    # 7 items of 0.1 s take 0.7 s together, more than the deadline of 0.5 s; each alone is well inside it.
    verdicts = judge([(problem_of("3"), "sleep 0.1")] * 7)
    assert [verdict.outcome for verdict in verdicts] == ["ok"] * 7


@pytest.mark.parametrize("workers", [1, 2])
def test_verdicts_are_told_as_they_come(workers):
    """The second item hangs until its deadline; the verdict on the first is told long before."""
    items = [
        (problem_of("3"), "say 3"),
        (problem_of("3"), "hang"),
        (problem_of("3"), "say 4"),
        (problem_of("3"), "say 3"),
    ]
    settings = SETTINGS.model_copy(update={"workers": workers, "timeout_s": 2.0})
    told: dict[int, tuple[float, str]] = {}

    async def run():
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier="scripted_verifier:build")
        try:
            await pool.start()
            started = time.monotonic()
            tell = lambda new: told.update({n: (time.monotonic() - started, v.outcome) for n, v in new})  # noqa: E731
            return await pool.verify(items, tell)
        finally:
            await pool.close()

    verdicts = asyncio.run(run())
    assert [told[number][1] for number in range(4)] == [verdict.outcome for verdict in verdicts]
    assert [verdict.outcome for verdict in verdicts] == ["ok", "timeout", "wrong", "ok"]
    # The deadline of the second item runs from the first verdict. Half of it allows for delays of this process.
    assert told[1][0] - told[0][0] > settings.timeout_s / 2


def test_a_failed_caller_leaves_no_answers_for_the_next():
    def tell(verdicts):
        raise KeyError(verdicts[0][0])

    async def run():
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build")
        try:
            with pytest.raises(KeyError):
                await pool.verify([(problem_of("3"), "say 3"), (problem_of("3"), "sleep 0.3")], tell)
            return await pool.verify([(problem_of("3"), "say 4")])
        finally:
            await pool.close()

    assert [verdict.outcome for verdict in asyncio.run(run())] == ["wrong"]


def test_answer_that_arrived_while_this_process_was_held_up_counts():
    async def run():
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build")
        try:
            await pool.start()
            call = asyncio.create_task(pool.verify([(problem_of("3"), "sleep 0.1")]))
            await asyncio.sleep(0.05)
            time.sleep(0.7)  # past the deadline of 0.5 s; the answer has been waiting since 0.1 s
            return await call
        finally:
            await pool.close()

    assert asyncio.run(run())[0].outcome == "ok"


def test_limits_on_files_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    monkeypatch.setenv("RLSYS_RUN_ID", "run-1")
    written, seen = judge([(problem_of("3"), f"write_file {tmp_path / 'large'}"), (problem_of("3"), "environment")])
    assert written.outcome == "error"
    assert "File too large" in written.detail
    assert (tmp_path / "large").stat().st_size <= 16 << 20
    assert "RLSYS_RUN_ID" in seen.detail
    assert "SECRET_TOKEN" not in seen.detail


def test_worker_that_cannot_start_is_an_engine_error():
    before = children()
    with pytest.raises(EngineError, match="no such thing as a verifier"):
        judge([(problem_of("3"), "say 3")], factory="build_that_fails")
    assert children() == before


def test_close_ends_a_verification_under_way():
    before = children()

    async def run():
        pool = RewardPool(
            LetterCountConfig(),
            0,
            RewardsConfig(timeout_s=60, memory_mib=1024),
            verifier="scripted_verifier:build",
        )
        await pool.start()
        call = asyncio.create_task(pool.verify([(problem_of("3"), "hang")]))
        await asyncio.sleep(0.1)
        await pool.close()
        with pytest.raises(EngineError, match="closed"):
            await call
        with pytest.raises(EngineError, match="closed"):
            await pool.verify([(problem_of("3"), "say 3")])

    asyncio.run(run())
    assert children() == before


def test_cancelled_caller_leaves_no_answers_for_the_next():
    async def run():
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build")
        try:
            await pool.start()
            call = asyncio.create_task(pool.verify([(problem_of("3"), "say 3"), (problem_of("3"), "sleep 0.3")]))
            await asyncio.sleep(0.1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            return await pool.verify([(problem_of("3"), "say 4")])
        finally:
            await pool.close()

    assert [verdict.outcome for verdict in asyncio.run(run())] == ["wrong"]


def test_a_timeout_also_kills_processes_that_the_verifier_started(tmp_path):
    verdicts = judge([(problem_of("3"), f"spawn_and_hang {tmp_path / 'pids'}")])
    assert verdicts[0].outcome == "timeout"
    assert wait_until_gone(map(int, (tmp_path / "pids").read_text().split()))


PARENT = """
import asyncio, sys
from actors.verifiers.pool import RewardPool
from actors.verifiers.steps import wrong_node
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.types import Problem
pool = RewardPool(LetterCountConfig(), 0, RewardsConfig(timeout_s=600), verifier="scripted_verifier:build")
asyncio.run(pool.verify([(Problem(problem_id="p", question="?", answer="3"), "spawn_and_hang " + sys.argv[1])]))
"""


@pytest.mark.parametrize("stopped", ["", "verifier", "guard"])
def test_death_of_the_parent_kills_a_hanging_worker_and_its_processes(tmp_path, stopped):
    pids = tmp_path / "pids"
    path = os.pathsep.join([str(HERE), str(HERE.parents[2])])
    environment = os.environ | {"PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(pids)], env=environment)
    deadline = time.monotonic() + 30
    while not (pids.exists() and pids.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker, sleeper = map(int, pids.read_text().split())
    guard = psutil.Process(worker).ppid()
    try:
        assert is_running(worker)
        if stopped:
            os.kill(guard if stopped == "guard" else worker, signal.SIGSTOP)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert wait_until_gone([guard, worker, sleeper])
    finally:
        parent.kill()
        for pid in (guard, worker, sleeper):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kills", [1, 2])
def test_a_worker_that_is_killed_at_its_start_is_started_a_second_time(kills, monkeypatch):
    spawn, spawned = processes.spawn, []

    async def killed():
        child = await spawn()
        spawned.append(child)
        if len(spawned) <= kills:
            child.process.kill()
        return child

    async def run():
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build")
        try:
            await pool.start()
            return await pool.verify([(problem_of("3"), "say 3")])
        finally:
            await pool.close()

    monkeypatch.setattr(processes, "spawn", killed)
    if kills == 1:
        assert [verdict.outcome for verdict in asyncio.run(run())] == ["ok"]
    else:
        with pytest.raises(EngineError, match="a reward worker did not start: exit status -9"):
            asyncio.run(run())
    assert len(spawned) == 2


def test_512_trivial_verdicts_of_the_real_task_are_cheap():
    async def run():
        pool = RewardPool(LetterCountConfig(), 0, RewardsConfig(memory_mib=1024))
        try:
            await pool.start()
            started = time.perf_counter()
            verdicts = await pool.verify([(problem_of("3"), f"<answer>{index % 4}</answer>") for index in range(512)])
            return verdicts, time.perf_counter() - started
        finally:
            await pool.close()

    verdicts, seconds = asyncio.run(run())
    assert [verdict.reward for verdict in verdicts] == [float(index % 4 == 3) for index in range(512)]
    # 0.01 to 0.03 s on a free core. The bound allows for a busy machine, but not for one process per verdict.
    assert seconds < 5.0


def test_steps_are_checked_between_verdicts():
    """The chain counts a in aab: the second count is wrong. The question of the third item has an unknown form."""
    right, wrong = "<thinking>a1a2b2</thinking>", "<thinking>a1a1b2</thinking>"

    async def run():
        pool = RewardPool(LetterCountConfig(), 0, RewardsConfig(workers=1))
        try:
            chains = [("count a in aab", right), ("count a in aab", f"{wrong}<answer>2</answer>"), ("2 + 2", right)]
            steps = await pool.check_steps(chains)
            return steps, await pool.verify([(problem_of("2"), f"{right}<answer>2</answer>")]), pool.verdicts
        finally:
            await pool.close()

    steps, [verdict], count = asyncio.run(run())
    assert [(step.outcome, step.answered, wrong_node(step)) for step in steps] == [
        ("ok", True, None),
        ("wrong", True, 0),
        ("ok", False, None),
    ]
    assert (verdict.outcome, verdict.reward, count) == ("ok", 1.0, 4)


def test_a_check_of_steps_that_hangs_fails_alone():
    async def run():
        pool = RewardPool(LetterCountConfig(), 0, SETTINGS, verifier="scripted_verifier:build_for_steps")
        try:
            return await pool.check_steps([("q", "fine"), ("q", "hang"), ("q", "fine")])
        finally:
            await pool.close()

    assert [verdict.outcome for verdict in asyncio.run(run())] == ["ok", "timeout", "ok"]


def test_worker_of_a_data_set_task_does_not_read_the_data():
    async def run():
        pool = RewardPool(DatasetConfig(path="does/not/exist.jsonl"), 0, RewardsConfig(memory_mib=256))
        try:
            problem, cut = problem_of("1/2"), "\\boxed{1/2} and"
            items = [(problem, text) for text in ("so \\boxed{0.5}", "so \\boxed{2}", "hm")]
            return await pool.verify([*items, (problem, cut, True), (problem, cut, False)])
        finally:
            await pool.close()

    verdicts = asyncio.run(run())
    assert [(verdict.outcome, verdict.answered) for verdict in verdicts] == [
        ("ok", True),
        ("wrong", True),
        ("wrong", False),
        ("ok", True),
        ("wrong", False),
    ]


def test_worker_imports_stay_light():
    code = (
        "import sys; import actors.verifiers.worker, rlsys.tasks.dataset, rlsys.tasks.letter_count.task; "
        "heavy = {'torch', 'vllm', 'ray', 'deepspeed', 'transformers', 'datasets', 'pyarrow'}; "
        "print(*heavy & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
