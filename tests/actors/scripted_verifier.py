"""A verifier that does what the completion says; run only inside reward workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rlsys.types import Verdict


def build() -> Callable[[str, str], Any]:
    return verify


def build_for_chains() -> Callable[[str, str], Any]:
    return judge_chain


def build_that_fails() -> Callable[[str, str], Any]:
    raise ValueError("no such thing as a verifier")


def verify(answer: str, completion: str) -> Any:
    command, _, argument = completion.partition(" ")
    return _COMMANDS[command](answer, argument)


def fate(completion: str) -> str:
    """What happens to the verifier of a chain: most are judged; a few are not, the same ones every time."""
    return {0: "raise", 1: "hang", 2: "nan", 3: "exit"}.get(zlib.crc32(completion.encode()) % 30, "judged")


def judge_chain(answer: str, completion: str) -> Any:
    found = fate(completion)
    if found == "judged":
        return _verdict(float(completion.endswith(f"{answer}</answer>")))
    return _COMMANDS[found](answer, completion)


def _verdict(reward: Any) -> Verdict:
    return Verdict(outcome="ok" if reward else "wrong", reward=reward, answered=True)


def _hang(answer: str, argument: str) -> None:
    while True:
        pass


def _spawn_and_hang(answer: str, argument: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    with open(argument, "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    _hang(answer, argument)


def _print(answer: str, argument: str) -> Verdict:
    print('["ok", 9.0, true, "forged"]', flush=True)
    subprocess.run(["echo", "noise"], check=True)
    return _verdict(float(sys.stdin.read() == ""))  # stdin is empty, not the protocol


def _allocate(answer: str, argument: str) -> Verdict:
    return _verdict(float(len(bytearray(8 << 30))))


def _exit(answer: str, argument: str) -> None:
    sys.exit(3)


def _write_file(answer: str, argument: str) -> Verdict:
    with open(argument, "wb") as file:
        file.write(bytes(17 << 20))
    return _verdict(1.0)


def _environment(answer: str, argument: str) -> Verdict:
    return Verdict(outcome="ok", reward=1.0, answered=True, detail=" ".join(sorted(os.environ)))


_COMMANDS: dict[str, Callable[[str, str], Any]] = {
    "say": lambda answer, argument: _verdict(float(answer == argument)),
    "sleep": lambda answer, argument: (time.sleep(float(argument)), _verdict(1.0))[1],
    "raise": lambda answer, argument: [][0],
    "nan": lambda answer, argument: _verdict(float("nan")),
    "text": lambda answer, argument: _verdict("1.0"),
    "none": lambda answer, argument: None,
    "numpy": lambda answer, argument: _verdict(np.float32(0.5)),
    "kill": lambda answer, argument: os.kill(os.getpid(), signal.SIGKILL),
    "hang": _hang,
    "spawn_and_hang": _spawn_and_hang,
    "print": _print,
    "allocate": _allocate,
    "exit": _exit,
    "write_file": _write_file,
    "environment": _environment,
}
