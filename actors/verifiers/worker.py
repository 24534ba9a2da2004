"""A process that runs one verifier below a guard, so that a verification that hangs can be killed.

`actors.verifiers.process` starts it as `python -m actors.verifiers.worker`. `actors.verifiers.wire` has the protocol.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, get_args

from pydantic import TypeAdapter

from actors.verifiers.guard import adopt_orphans, descendants, die_with, end_descendants, guard
from actors.verifiers.steps import as_verdict
from actors.verifiers.wire import MAX_REPLY_CHARS, Answer, answer, asks_environment, problem_of
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.search_values import FunctionValueConfig
from rlsys.config.tasks import TaskConfig
from rlsys.environments import build_environment
from rlsys.errors import ConfigError
from rlsys.interfaces import Reply
from rlsys.plugins import raised_text
from rlsys.rewards import ChainValue, Rewards, fault_of_reward
from rlsys.tasks import build_task
from rlsys.types import Outcome, Verdict

Verifier = Callable[..., Any]
"""Judge of a message, from all after its number to a verdict or reply, which is not checked yet."""

MAX_FILE_MIB = 16
MAX_DETAIL_CHARS = 500


def main() -> None:
    requests, answers = _take_over_pipes()
    hello = json.loads(requests.readline())
    die_with(hello["parent"], signal.SIGCONT)  # a stopped process receives SIGCONT, too
    _limit(resource.RLIMIT_CORE, 0)

    def close_pipes() -> None:
        requests.close()
        answers.close()

    guard(partial(_serve, requests, answers, hello), close_pipes, hello["memory_mib"], hello["parent"])


def _serve(requests: BinaryIO, answers: BinaryIO, hello: dict[str, Any]) -> None:
    """Judge requests until their pipe closes. Kill all processes of a verification before sending its verdict."""
    _limit(resource.RLIMIT_AS, hello["memory_mib"] << 20)
    _limit(resource.RLIMIT_FSIZE, MAX_FILE_MIB << 20)
    adopt_orphans()
    with _forks_end_here():
        try:
            verifier = _build_verifier(hello)
        except ConfigError as error:
            print(error.message, file=sys.stderr)
            sys.exit(os.EX_CONFIG)
    helpers = descendants()  # a plug-in may start processes that serve all its verifications
    _send(answers, {"ready": True})
    for line in requests:
        number, *arguments = json.loads(line)
        with _forks_end_here():
            verdict = _judge(verifier, *arguments)
        end_descendants(spared=helpers)
        _send(answers, answer(number, verdict))


@contextlib.contextmanager
def _forks_end_here() -> Iterator[None]:
    """End every process that is forked in this context when it leaves the context, by return or exception.

    A forked process has the pipes and the buffered requests, so it would serve the same requests a second time. It ends
    without flushing the pipes.
    """
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != owner:
            os._exit(1)


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol from stdin and stdout to other descriptors, so that a verifier that prints cannot break it."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _build_verifier(hello: dict[str, Any]) -> Verifier:
    """Return the judge of a message without its number."""
    if "verifier" in hello:
        module, _, factory = hello["verifier"].partition(":")
        verify = getattr(importlib.import_module(module), factory)()
        return lambda given, *others: verify(problem_of(given) if others else given, *others)
    config: TaskConfig = TypeAdapter(TaskConfig).validate_python(hello["task"])
    task = build_task(config, hello["seed"], hello["folder"])
    rewards = Rewards(RewardsConfig.model_validate(hello["rewards"]), hello["folder"])
    section, folder = hello["environment"], hello["folder"]
    environment = section and build_environment(EnvironmentConfig.model_validate(section), folder)
    value = hello["value"] and ChainValue(FunctionValueConfig.model_validate(hello["value"]), hello["folder"])

    def judge(given: dict[str, Any], *others: Any) -> Any:
        if "chain" in given:
            return value(problem_of(given["problem"]), given["chain"])
        if environment is not None and asks_environment(given):
            return environment(problem_of(given["problem"]), tuple(given["turns"]))
        if not others:
            return as_verdict(task.check_steps(**given))
        problem = problem_of(given)
        return rewards.verdict(problem, others[0], _checked(task.verify(problem, *others)))

    return judge


def _judge(verifier: Verifier, *arguments: Any) -> Answer:
    try:
        given = verifier(*arguments)
        return _checked_reply(given) if asks_environment(arguments[0]) else _checked(given)
    # A failure becomes data. SystemExit and the timeouts of some libraries derive from BaseException only.
    except BaseException as error:  # noqa: BLE001
        return _error(raised_text(error))


def _checked_reply(reply: Any) -> Answer:
    """Return the reply of an environment with plain values, or an error if it is not valid."""
    if not isinstance(reply, Reply):
        return _error(f"expected a Reply, found {type(reply).__name__}")
    text: Any = reply.text
    if not isinstance(text, str):
        return _error(f"expected a Reply with a string as text, found {type(text).__name__}")
    if len(text) > MAX_REPLY_CHARS:
        return _error(f"expected a Reply of at most {MAX_REPLY_CHARS} characters, found {len(text)}")
    fault = fault_of_reward(reply.reward)
    if fault:
        return _error(fault)
    return Reply(
        text=text.encode("utf-8", "replace").decode(),  # no lone surrogate can be tokenised
        done=bool(reply.done),
        reward=float(reply.reward),
        solved=None if reply.solved is None else bool(reply.solved),
        detail=str(reply.detail)[:MAX_DETAIL_CHARS],
    )


def _checked(verdict: Any) -> Verdict:
    """Return the verdict of a plug-in with plain values, or an error if it is not valid."""
    if not isinstance(verdict, Verdict):
        return _error(f"expected a Verdict, found {type(verdict).__name__}")
    if verdict.outcome not in get_args(Outcome):
        return _error(f"expected an outcome of {', '.join(get_args(Outcome))}, found {verdict.outcome!r}")
    detail = str(verdict.detail)[:MAX_DETAIL_CHARS]
    if verdict.outcome not in ("ok", "wrong"):  # the plug-in reports that it failed
        return Verdict(outcome=verdict.outcome, reward=0.0, answered=False, detail=detail)
    fault = fault_of_reward(verdict.reward)
    if fault:
        return _error(fault)
    reward = float(verdict.reward)
    faults = [f"part {name}: {fault}" for name, value in verdict.parts.items() if (fault := fault_of_reward(value))]
    if faults:
        return _error(faults[0])
    parts = {str(name): float(value) for name, value in verdict.parts.items()}
    return Verdict(outcome=verdict.outcome, reward=reward, answered=bool(verdict.answered), detail=detail, parts=parts)


def _error(detail: str) -> Verdict:
    return Verdict(outcome="error", reward=0.0, answered=False, detail=detail[:MAX_DETAIL_CHARS])


def _send(answers: BinaryIO, message: Any) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
