"""A process that runs one verifier, so that a hanging or greedy verification can be killed.

JSON lines. First line in: {"parent": pid, "memory_mib": int, "seed": int, "task": the config section} or, in
place of "task", {"verifier": "module:factory"}, where `factory()` returns a function of (answer, completion).
Then one [answer, completion] a line in, one verdict a line out, in order; {"ready": true} comes first.
Started by actors.rewards as `python -m actors.reward_worker`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from rlsys.config import TaskConfig
from rlsys.tasks import build_task
from rlsys.types import Verdict

Verifier = Callable[[str, str], Verdict]

MAX_FILE_MIB = 16
MAX_DETAIL_CHARS = 500
_PR_SET_PDEATHSIG = 1


def main() -> None:
    requests, answers = _take_over_pipes()
    hello = json.loads(requests.readline())
    _die_with_parent(hello["parent"])
    _limit_resources(hello["memory_mib"])
    verifier = _build_verifier(hello)
    _send(answers, {"ready": True})
    for line in requests:
        answer, completion = json.loads(line)
        verdict = _judge(verifier, answer, completion)
        detail = verdict.detail[:MAX_DETAIL_CHARS]
        _send(answers, [verdict.outcome, float(verdict.reward), verdict.answered, detail])


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol away from stdin and stdout, so that a verifier that prints cannot break it."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends, then check that it has not ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(1)


def _limit_resources(memory_mib: int) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, memory_mib << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_MIB << 20),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _build_verifier(hello: dict[str, Any]) -> Verifier:
    if "verifier" in hello:
        module, _, factory = hello["verifier"].partition(":")
        return getattr(importlib.import_module(module), factory)()
    config: TaskConfig = TypeAdapter(TaskConfig).validate_python(hello["task"])
    return build_task(config, hello["seed"]).verify


def _judge(verifier: Verifier, answer: str, completion: str) -> Verdict:
    try:
        verdict: Any = verifier(answer, completion)  # a plug-in may return what it likes
    # A failure becomes data. BaseException, as math-verify's TimeoutException and sys.exit are no Exception.
    except BaseException as error:  # noqa: BLE001
        return _error(f"{type(error).__name__}: {error}")
    if not isinstance(verdict, Verdict):
        return _error(f"expected a Verdict, found {type(verdict).__name__}")
    reward: Any = verdict.reward
    if isinstance(reward, bool) or not isinstance(reward, Real):  # Real: numpy's numbers too
        return _error(f"expected a number as reward, found {type(reward).__name__}")
    if not math.isfinite(reward):
        return _error(f"expected a finite reward, found {reward}")
    return verdict


def _error(detail: str) -> Verdict:
    return Verdict(outcome="error", reward=0.0, answered=False, detail=detail)


def _send(answers: BinaryIO, message: Any) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
