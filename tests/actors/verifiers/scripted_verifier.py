"""A verifier that runs the command in the completion. It runs only inside verifier processes."""

from __future__ import annotations

import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rlsys.types import Problem, Verdict

HEAD_START_S = 0.2  # time for a forked child to act before its parent goes on


def build() -> Callable[[Problem, str], Any]:
    return verify


def build_for_chains() -> Callable[[Problem, str], Any]:
    return judge_chain


def build_for_steps() -> Callable[[dict[str, str]], Any]:
    """Return a check of steps that hangs on the chain "hang"."""

    def check(given: dict[str, str]) -> Verdict:
        time.sleep(60 if given["completion"] == "hang" else 0)
        return _verdict(1.0)

    return check


def build_with_helper() -> Callable[[Problem, str], Any]:
    """Return a verifier that starts a helper process once and uses it for every verification."""
    helper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(problem: Problem, completion: str) -> Verdict:
        assert helper.stdin is not None and helper.stdout is not None
        print(completion, file=helper.stdin, flush=True)
        return _verdict(float(helper.stdout.readline() == f"{problem.answer}\n"))

    return ask


def build_with_fork() -> Callable[[Problem, str], Any]:
    """Fork in the factory; the child returns first."""
    if os.fork():
        time.sleep(HEAD_START_S)
    return verify


def build_that_fails() -> Callable[[Problem, str], Any]:
    raise ValueError("no such thing as a verifier")


def verify(problem: Problem, completion: str, finished: bool = True) -> Any:
    command, _, argument = completion.partition(" ")
    return _COMMANDS[command](problem.answer, argument)


def chain_command(completion: str) -> str:
    """Return the command for a chain. Most chains are judged; the same few fail every time."""
    return {0: "raise", 1: "hang", 2: "nan", 3: "exit"}.get(zlib.crc32(completion.encode()) % 30, "judged")


def judge_chain(problem: Problem, completion: str, finished: bool = True) -> Any:
    command = chain_command(completion)
    if command == "judged":
        return _verdict(float(completion.endswith(f"{problem.answer}</answer>")))
    return _COMMANDS[command](problem.answer, completion)


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
    return _verdict(float(len(bytearray(10 << 30))))


def _exit(answer: str, argument: str) -> None:
    sys.exit(3)


def _write_file(answer: str, argument: str) -> Verdict:
    with open(argument, "wb") as file:
        file.write(bytes(17 << 20))
    return _verdict(1.0)


def _map(answer: str, argument: str) -> Verdict:
    with mmap.mmap(-1, 10 << 30) as memory:
        return _verdict(float(len(memory)))


def _daemon() -> None:
    """Start a daemon: forked twice, in its own session, with all pipes of this process open."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)


def _daemon_and_hang(answer: str, argument: str) -> None:
    _daemon()
    _hang(answer, argument)


def _daemon_and_answer(answer: str, argument: str) -> Verdict:
    _daemon()
    return _verdict(1.0)


def _daemon_and_exit(answer: str, argument: str) -> None:
    _daemon()
    os._exit(3)


def _orphans_of(number: int, of_mib: int) -> None:
    for _ in range(number):
        if os.fork() == 0:
            os.setsid()
            memory = b"x" * (of_mib << 20)  # the kernel does not allocate pages of zeros
            time.sleep(600)
            os._exit(len(memory) % 2)


def _fork_many(answer: str, argument: str) -> None:
    _orphans_of(100, 0)
    _hang(answer, argument)


def _fork_large(answer: str, argument: str) -> None:
    _orphans_of(6, 100)
    _hang(answer, argument)


def _kill_group(answer: str, argument: str) -> None:
    os.killpg(0, signal.SIGKILL)


def _kill_guard(answer: str, argument: str) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def _stop_guard(answer: str, argument: str) -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(600)


def _listen(answer: str, argument: str) -> Verdict:
    server = socket.create_server(("127.0.0.1", 0))
    _KEPT.append(server)
    with open(argument, "w") as file:
        file.write(f"{server.getsockname()[1]}\n")
    return _verdict(1.0)


def _print_endlessly(answer: str, argument: str) -> None:
    while True:
        print("x" * 65536, flush=True)


def _fork(answer: str, argument: str) -> Any:
    """Fork. The child runs the command in the argument; the parent returns a verdict."""
    if os.fork() == 0:
        command, _, rest = argument.partition(" ")
        return _COMMANDS[command](answer, rest)
    time.sleep(HEAD_START_S)
    return _verdict(1.0)


def _write(text: str) -> None:
    """Write a text into all open descriptors, among them the pipe of the verdicts."""
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, text.encode().decode("unicode_escape").encode())
        except OSError:
            continue


def _write_anywhere(answer: str, argument: str) -> None:
    _write(argument)
    time.sleep(600)


def _write_and_answer(answer: str, argument: str) -> Verdict:
    _write(argument)
    return _verdict(1.0)


def _where(answer: str, argument: str) -> Verdict:
    with open("here", "w") as file:
        file.write("left behind")
    return Verdict(outcome="ok", reward=1.0, answered=True, detail=f"{os.getcwd()} {os.environ['HOME']}")


class _Stop(BaseException):
    """An exception that does not derive from Exception, like the timeouts of some libraries."""


def _raise(error: BaseException) -> None:
    raise error


class _Odd:
    def __str__(self) -> str:
        raise ValueError("no detail")


_KEPT: list[Any] = []


def _environment(answer: str, argument: str) -> Verdict:
    return Verdict(outcome="ok", reward=1.0, answered=True, detail=" ".join(sorted(os.environ)))


_COMMANDS: dict[str, Callable[[str, str], Any]] = {
    "say": lambda answer, argument: _verdict(float(answer == argument)),
    "sleep": lambda answer, argument: (time.sleep(float(argument)), _verdict(1.0))[1],
    "raise": lambda answer, argument: [][0],
    "stop": lambda answer, argument: _raise(_Stop("stop")),
    "interrupt": lambda answer, argument: _raise(KeyboardInterrupt()),
    "nan": lambda answer, argument: _verdict(float("nan")),
    "infinite": lambda answer, argument: _verdict(float("-inf")),
    "huge": lambda answer, argument: _verdict(1e300),
    "integer": lambda answer, argument: _verdict(10**400),
    "true": lambda answer, argument: _verdict(True),
    "complex": lambda answer, argument: _verdict(1j),
    "outcome": lambda answer, argument: Verdict(outcome="fine", reward=1.0, answered=True),  # type: ignore[arg-type]
    "own_error": lambda answer, argument: Verdict(outcome="error", reward=1.0, answered=True, detail="mine"),
    "odd": lambda answer, argument: Verdict(outcome="ok", reward=1.0, answered=True, detail=_Odd()),  # type: ignore[arg-type]
    "text": lambda answer, argument: _verdict("1.0"),
    "none": lambda answer, argument: None,
    "numpy": lambda answer, argument: _verdict(np.float32(0.5)),
    "kill": lambda answer, argument: os.kill(os.getpid(), signal.SIGKILL),
    "hang": _hang,
    "regex": lambda answer, argument: re.match(r"(a+)+$", "a" * 64 + "b"),
    "power": lambda answer, argument: 9**9**9**9,
    "map": _map,
    "daemon_and_hang": _daemon_and_hang,
    "daemon_and_answer": _daemon_and_answer,
    "daemon_and_exit": _daemon_and_exit,
    "fork_many": _fork_many,
    "fork_large": _fork_large,
    "kill_group": _kill_group,
    "kill_guard": _kill_guard,
    "stop_guard": _stop_guard,
    "listen": _listen,
    "print_endlessly": _print_endlessly,
    "fork": _fork,
    "write_anywhere": _write_anywhere,
    "write_and_answer": _write_and_answer,
    "where": _where,
    "spawn_and_hang": _spawn_and_hang,
    "print": _print,
    "allocate": _allocate,
    "exit": _exit,
    "write_file": _write_file,
    "environment": _environment,
}
