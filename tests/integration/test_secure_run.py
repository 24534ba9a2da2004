"""A run on the real stack: who can reach it, what it tells whom, and what it leaves where."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import pickle
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from problems import problem_of
from real_runs import REPOSITORY, TINY, commands, write_config
from reliability import Row, record
from watched_runs import (
    SECRETS,
    Canary,
    Watched,
    beyond_loopback,
    files_with,
    look,
    new_secrets,
    open_to_others,
    planted,
)

from actors.verifiers.pool import RewardPool
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.run.metrics import MetricsWriter

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

# Ray looks whether it runs in a cloud, for statistics that it does not send then; there is no switch for it.
CLOUD_METADATA = "169.254.169.254"
SHORT = ("warm_start.max_steps=2", "train.max_steps=6", "checkpoint.interval=3")


def test_the_whole_tree_listens_on_loopback(watched: Watched) -> None:
    parts = ("gcs_server", "raylet", "RolloutActor", "LearnerActor", "verifiers.worker", "rlsys.cli")
    for part in parts:
        assert any(part in process.line for process in watched.seen), part
    assert any(process.listening for process in watched.seen)
    assert {process.line: found for process in watched.seen if (found := beyond_loopback(process.listening))} == {}
    assert beyond_loopback([address for address, _ in watched.finished.command.seen.listening]) == []


def test_nothing_connects_to_another_host(watched: Watched) -> None:
    assert {process.line: found for process in watched.seen if (found := beyond_loopback(process.connected))} == {}
    addresses = [ast.literal_eval(line) for line in watched.connections]
    assert addresses, "the hook was there"
    hosts = {address[0] for address in addresses if isinstance(address, tuple)}
    assert beyond_loopback(sorted(hosts - {"localhost", CLOUD_METADATA})) == []


def test_what_the_processes_of_a_run_are_told(watched: Watched) -> None:
    secrets = watched.secrets
    workers = [process for process in watched.seen if re.match("ray::(RolloutActor|LearnerActor)", process.line)]
    assert len(workers) == 4
    for process in workers:
        told = process.environment
        assert told["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"
        assert (told["GLOO_SOCKET_IFNAME"], told["VLLM_HOST_IP"], told["HF_HUB_OFFLINE"]) == ("lo", "127.0.0.1", "1")
        assert (told["VLLM_NO_USAGE_STATS"], told["RAY_USAGE_STATS_ENABLED"]) == ("1", "0")
    for process in watched.seen:
        if "verifiers.worker" in process.line:
            assert not {*secrets, "RAY_ADDRESS"} & set(process.environment)
            assert not set(secrets.values()) & set(process.environment.values())
    services = [process for process in watched.seen if process.from_ray]
    assert services
    for process in services:  # a token of this command, not the one of a cluster elsewhere
        assert secrets["RAY_AUTH_TOKEN"] not in process.environment.values()
    assert len(set(watched.own_tokens) - set(secrets.values())) == 1


def test_secrets_are_in_no_file_and_no_command_line(watched: Watched) -> None:
    words = [*watched.secrets.values(), *watched.own_tokens]
    assert [process.line for process in watched.seen if any(word in process.line for word in words)] == []
    assert watched.ray_hits == [] and watched.ray_files > 10
    hits, files = files_with(watched.finished.dir, words)
    assert hits == [] and files > 20
    assert not any(word in watched.finished.command.stdout + watched.finished.command.stderr for word in words)


def test_files_are_their_owners_alone(watched: Watched) -> None:
    assert watched.ray_open == []
    assert open_to_others(watched.finished.dir) == []


def test_planted_pickles_are_not_unpickled(watched: Watched) -> None:
    pickle.loads(pickle.dumps(Canary(watched.unpickled.with_name("control"))))
    assert watched.unpickled.with_name("control").exists()
    assert not watched.unpickled.exists()


def test_tensorboard_listens_on_loopback(tmp_path: Path) -> None:
    """As the README starts it."""
    with contextlib.closing(MetricsWriter(tmp_path / "run", -1)) as writer:
        writer.log("online", 1, 1, {"weights/version": 1.0})
    program = str(Path(sys.executable).with_name("tensorboard"))
    command = [program, "--logdir", str(tmp_path), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = psutil.Process(server.pid)
    try:
        deadline = time.monotonic() + 60
        while not _bound(own) and time.monotonic() < deadline:  # the page's own; a child of it serves the data
            time.sleep(0.2)
        assert _bound(own)
        found = [address for process in (own, *own.children(recursive=True)) for address in _bound(process)]
        assert beyond_loopback(found) == []
    finally:
        for process in (*own.children(recursive=True), own):
            process.kill()
        server.wait()


def _bound(process: psutil.Process) -> list[str]:
    return [found.laddr.ip for found in process.net_connections("inet") if not found.raddr]


def test_a_cluster_without_a_token_is_refused_in_one_line(refused: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    config = write_config(tmp_path, TINY)
    assert "expected the environment variable RAY_AUTH_MODE=token" in refused("train", config, "run.address=10.0.0.1:1")


# --- more than one run, or minutes ---


@pytest.mark.long
def test_figures_of_a_watched_run(watched: Watched) -> None:
    """Write the rows of the table from the figures that the tests above check one by one."""
    bound = [address for process in watched.seen for address in process.listening]
    bound += [address for address, _ in watched.finished.command.seen.listening]
    words = [*watched.secrets.values(), *watched.own_tokens]
    hits, files = files_with(watched.finished.dir, words)
    told = [process.line for process in watched.seen if any(word in process.line for word in words)]
    count = len(watched.seen)
    found = {
        "the network reaches for a run": (
            "every process listens on loopback only",
            f"a run of {count} processes: all their IP sockets, twice a second",
            bool(bound) and not beyond_loopback(bound),
        ),
        "secrets in the environment": (
            "in no file of the run or of Ray, no output and no command line",
            f"{len(SECRETS)} planted words and Ray's token; {files} and {watched.ray_files} files, {count} processes",
            not hits and not told and not watched.ray_hits,
        ),
        "pickles beside the weights of a model": (
            "never unpickled by learner, engine or checkpoint",
            "four planted files in the folder of the model",
            not watched.unpickled.exists(),
        ),
    }
    left = len(watched.finished.left)
    for fault, (promise, injection, good) in found.items():
        record(Row(fault=fault, promise=promise, injection=injection, runs=1, passed=int(good), processes_left=left))
        assert good, fault
    assert left == 0


# argv: address of a GCS. Ends with 0 where it answers, with 3 where it refuses.
KNOCK = """
import sys
from ray._raylet import GcsClient
try:
    nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
print(len(nodes))
"""


def knock(address: str, token: str | None) -> subprocess.CompletedProcess[str]:
    """Ask Ray for its nodes, as any process of this machine could."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-c", KNOCK, address], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.long
def test_a_run_that_fails_tells_no_secret_and_answers_nobody(tmp_path: Path) -> None:
    """All actors hang in their second call; before the run ends by it, others knock at its Ray."""
    secrets = new_secrets()
    config = write_config(tmp_path, TINY)
    hung = tmp_path / "faults"
    faults = {"RLSYS_FAULTS": "generate@hit=2:hang", "RLSYS_FAULTS_LOG": str(hung)}
    with commands() as begin:
        command = begin(
            *("train", config, *SHORT, "actors.hang_timeout_s=40", "actors.max_restarts=0"),
            environment={**planted(secrets), **faults},
        )
        while not hung.exists():
            assert command.running, f"{command.stdout}\n{command.stderr}"
            time.sleep(0.1)
        seen = look(command)
        (address,) = {
            word.partition("=")[2]
            for process in seen
            for word in process.line.split()
            if word.startswith("--gcs-address=") and "raylet" in process.line
        }
        tokens = {process.environment.get("RAY_AUTH_TOKEN") for process in seen if process.from_ray}
        (token,) = tokens - {None, secrets["RAY_AUTH_TOKEN"]}  # a verifier has none, whatever its title
        assert token
        answers = [knock(address, guess) for guess in (token, None, "a guess", secrets["RAY_AUTH_TOKEN"])]
        errors = command.fail(1)
    assert [answer.returncode for answer in answers] == [0, 3, 3, 3], [answer.stdout for answer in answers]
    assert "Traceback" not in errors and "error: " in errors
    words = [*secrets.values(), token]
    assert not any(word in errors + command.stdout for word in words)
    assert files_with(tmp_path / "run", words)[0] == []
    command.assert_gone(within_s=10)


HOSTILE = {
    "forks": ("daemon_and_hang", "timeout"),
    "starts 100 processes": ("fork_many", "error or timeout"),  # on a busy machine the deadline may come first
    "allocates 10 GB": ("allocate", "error"),
    "maps 10 GB": ("map", "error"),
    "never returns, in Python": ("hang", "timeout"),
    "never returns, in C": ("power", "timeout"),
    "searches a regular expression for ever": ("regex", "timeout"),
    "prints endlessly": ("print_endlessly", "timeout"),
    "writes a large file": ("write_file large", "error"),
    "raises what is no Exception": ("stop", "error"),
    "kills its process group": ("kill_group", "error"),
    "returns infinity": ("infinite", "error"),
}
TIMEOUT_S, TIMES = 2.0, 5


@pytest.mark.long
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_verifier_costs_its_verdict(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests" / "actors" / "verifiers"))
    monkeypatch.setenv("RLSYS_RUN_ID", uuid.uuid4().hex)
    said, outcome = HOSTILE[what]
    took: list[float] = []

    async def judge() -> list[str]:
        settings = RewardsConfig(timeout_s=TIMEOUT_S, memory_mib=1024)
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier="scripted_verifier:build")
        found = []
        try:
            for _ in range(TIMES):
                await pool.verify([(problem_of("3"), "say 3")])  # starts what the last one has cost
                started = time.monotonic()
                found.append((await pool.verify([(problem_of("3"), said)]))[0].outcome)
                took.append(time.monotonic() - started)
        finally:
            await pool.close()
        return found

    outcomes = asyncio.run(judge())
    left = _of_this_run()
    good = [found in outcome and seconds <= TIMEOUT_S + 5 for found, seconds in zip(outcomes, took, strict=True)]
    record(
        Row(
            fault=f"a verifier that {what}",
            promise=f"the outcome {outcome}, soon after the deadline of {TIMEOUT_S:g} s at the latest",
            injection=f"`{said}` of tests/actors/verifiers/scripted_verifier.py",
            runs=TIMES,
            passed=sum(good),
            detection_s=max(took),
            processes_left=left,
        )
    )
    assert all(good), (outcomes, took)
    assert left == 0


def _of_this_run() -> int:
    """Processes that verifiers of this test have left, wherever they hide."""
    mark = f"RLSYS_RUN_ID={os.environ['RLSYS_RUN_ID']}".encode()
    count = len(psutil.Process().children(recursive=True))
    for pid in set(psutil.pids()) - {os.getpid()}:
        try:
            count += mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
    return count
