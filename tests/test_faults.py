"""Fault points: their grammar, where they act, and that they cost nothing when unset."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from rlsys import faults
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


def test_a_fault_acts_where_all_of_its_keys_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    given("publish.bucket@role=actor,number=1,version=3:mine; other:x", monkeypatch)
    assert faults.fault("publish.bucket", version=3) is None
    faults.identify("actor", "1", 0)
    assert faults.fault("publish.bucket", version=3) == "mine"
    assert faults.fault("publish.bucket", version=4) is None
    assert faults.fault("publish.bucket") is None


def test_a_replacement_is_told_from_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    given("generate@attempt=0:mine", monkeypatch)
    faults.identify("actor", "0", 1)
    assert faults.fault("generate") is None


def test_hits_are_counted_where_the_other_keys_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    given("step@stage=online,hit=2:mine", monkeypatch)
    answers = [faults.fault("step", stage=stage) for stage in ("online", "sft", "online", "online")]
    assert answers == [None, None, "mine", None]


@pytest.mark.parametrize(
    "text", ["publish", "publish:", ":kill9", "a@b:c", "a@=1:c", "a@b=:c", "a@hit=0:c", "a@hit=x:c", "a@b=1,:c"]
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="RLSYS_FAULTS: expected point@key=value,hit=number:action, found"):
        faults.parse(text)


def test_actions_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    given("a:raise;b:full", monkeypatch)
    with pytest.raises(RuntimeError, match="fault point a"):
        faults.fault("a")
    with pytest.raises(OSError, match="No space left on device") as caught:
        faults.fault("b")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("action", "signal_sent"), [("kill9", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_actions_that_end_or_stop_the_process(action: str, signal_sent: signal.Signals) -> None:
    code = "from rlsys.faults import fault; fault('here'); print('went on')"
    environment = {**os.environ, "RLSYS_FAULTS": f"here:{action}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        if action == "kill9":
            assert process.wait(60) == -signal_sent
        else:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal_sent
            process.kill()
        assert process.stdout is not None and process.stdout.read() == b""
