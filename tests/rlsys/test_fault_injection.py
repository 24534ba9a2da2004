"""Fault points: their grammar, their conditions, and no effect if RLSYS_FAULTS is not set."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlsys import fault_injection as faults
from rlsys.errors import ConfigError


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_process", {"role": "driver", "number": "0", "attempt": "0"})


def given(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_faults", faults.parse(text))


def test_a_point_without_a_fault_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given("", monkeypatch)
    assert faults.fault("publish.bucket", version=3) is None
    given("publish.omit:lm_head.weight", monkeypatch)
    assert faults.fault("publish.bucket", version=3) is None
    assert faults.fault("publish.omit") == "lm_head.weight"


def test_a_fault_acts_if_all_its_keys_match(monkeypatch: pytest.MonkeyPatch) -> None:
    given("publish.bucket@role=actor,number=1,version=3:mine; other:x", monkeypatch)
    assert faults.fault("publish.bucket", version=3) is None
    faults.identify("actor", "1", 0)
    assert faults.fault("publish.bucket", version=3) == "mine"
    assert faults.fault("publish.bucket", version=4) is None
    assert faults.fault("publish.bucket") is None


def test_keys_distinguish_a_replacement_from_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    given("generate@attempt=0:mine", monkeypatch)
    faults.identify("actor", "0", 1)
    assert faults.fault("generate") is None


def test_hits_are_counted_if_the_other_keys_match(monkeypatch: pytest.MonkeyPatch) -> None:
    given("step@stage=online,hit=2:mine", monkeypatch)
    answers = [faults.fault("step", stage=stage) for stage in ("online", "sft", "online", "online")]
    assert answers == [None, None, "mine", None]


@pytest.mark.parametrize(
    "text", ["publish", "publish:", ":kill9", "a@b:c", "a@=1:c", "a@b=:c", "a@hit=0:c", "a@hit=x:c", "a@b=1,:c"]
)
def test_a_malformed_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="RLSYS_FAULTS: expected point@key=value,hit=number:action, found"):
        faults.parse(text)


def test_actions_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    given("a:raise;b:full", monkeypatch)
    with pytest.raises(RuntimeError, match="fault point a"):
        faults.fault("a")
    with pytest.raises(OSError, match="No space left on device") as caught:
        faults.fault("b")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.heavy
@pytest.mark.parametrize(("action", "signal_sent"), [("kill9", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_actions_that_end_or_stop_the_process(action: str, signal_sent: signal.Signals) -> None:
    code = "from rlsys.fault_injection import fault; fault('here'); print('went on')"
    environment = {**os.environ, "RLSYS_FAULTS": f"here:{action}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        if action == "kill9":
            assert process.wait(60) == -signal_sent
        else:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal_sent
            process.kill()
        assert process.stdout is not None and process.stdout.read() == b""


DRIVER = """
import subprocess, sys
import rlsys.fault_injection
subprocess.run([sys.executable, "-c", sys.argv[1]])
print("the driver went on", flush=True)
"""
ACTOR = """
from rlsys.fault_injection import fault, identify
identify("actor", 1, 0)
fault("here", version=3)
print("the actor went on", flush=True)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("point", ["here@role=actor,version=3", "here@role=learner"])
def test_an_actor_kills_the_driver_at_its_fault_point(point: str, tmp_path: Path) -> None:
    log = tmp_path / "faults.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "RLSYS_DRIVER_PID"}
    environment |= {"RLSYS_FAULTS": f"{point}:kill_driver", "RLSYS_FAULTS_LOG": str(log)}
    begun = time.monotonic()
    command = [sys.executable, "-c", DRIVER, ACTOR]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        output = driver.communicate(timeout=60)[0]  # returns when both processes have ended
    if "learner" in point:
        assert driver.returncode == 0 and output == "the actor went on\nthe driver went on\n" and not log.exists()
        return
    assert driver.returncode == -signal.SIGKILL and output == "the actor went on\n"
    (found,) = map(json.loads, log.read_text().splitlines())
    assert begun < found.pop("time") < time.monotonic() and found.pop("pid") not in (driver.pid, os.getpid())
    process = {"role": "actor", "number": "1", "attempt": "0"}
    assert found == {"point": "here", "action": "kill_driver", **process, "where": {"version": "3"}}


def test_a_fault_is_logged_before_it_acts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "faults.jsonl"
    monkeypatch.setenv("RLSYS_FAULTS_LOG", str(log))
    given("step@version=2:full;step@version=4:mine", monkeypatch)
    for version in range(5):
        try:
            faults.fault("step", version=version)
        except OSError:
            assert version == 2
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["action"], entry["where"]) for entry in entries] == [
        ("full", {"version": "2"}),
        ("mine", {"version": "4"}),
    ]


@pytest.mark.heavy
def test_without_faults_no_variable_is_set_for_other_processes() -> None:
    code = "import os, rlsys.fault_injection; print(os.environ.get('RLSYS_DRIVER_PID'), os.getpid())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLSYS_")}
    for text, expected in (("", "None"), ("here:stop", None)):
        found = subprocess.run(
            [sys.executable, "-c", code], env={**environment, "RLSYS_FAULTS": text}, capture_output=True, text=True
        ).stdout.split()
        assert found[0] == (expected or found[1])
