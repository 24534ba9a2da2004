"""The lines of JSON between an actor and a verifier process.

- First line in: {"parent": pid, "memory_mib": int, "seed": int, "task": section `task` of the config, "rewards":
  section `rewards`, "folder": see `rlsys.plugins.load_plugin`, "value": section `search.value` of type function, or
  null, "environment": section of the environment in use, or null}. "task" may be replaced by "verifier":
  "module:factory", where `factory()` returns a function with the arguments of `Task.verify`.
- First line out: {"ready": true}.
- Then lines [number, problem, completion, finished] in, where `finished` may be missing, and lines
  [number, outcome, reward, answered, detail, parts] out, in order.
- A line [number, {"question": text, "completion": text}] asks for `Task.check_steps`; `actors.verifiers.steps` says
  how its answer fits into the line out. A line [number, {"problem": problem, "chain": text}] asks for the value of a
  chain, the reward of the line out, which has no answer if there is no value.
- A line [number, {"problem": problem, "turns": texts}] asks the environment. The line out is
  [number, "reply", reward, done, detail, text, solved].
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from rlsys.interfaces import Reply
from rlsys.types import Message, Outcome, Problem, Verdict

Answer = Verdict | Reply
OUTCOMES = get_args(Outcome)
REPLY = "reply"
MAX_REPLY_CHARS = 100_000


def request(number: int, given: Any, *others: Any) -> list[Any]:
    """Return the message that asks for a verdict; see `actors.verifiers.pool.Item`."""
    return [number, problem_values(given) if isinstance(given, Problem) else given, *others]


def turns_request(problem: Problem, turns: Sequence[str]) -> dict[str, Any]:
    """Return the values of a request to the environment."""
    return {"problem": problem_values(problem), "turns": list(turns)}


def asks_environment(values: Any) -> bool:
    """Return whether the values of a request are those of `turns_request`."""
    return isinstance(values, dict) and "turns" in values


def problem_of(values: dict[str, Any]) -> Problem:
    """Return the problem of a message."""
    question = values["question"]
    if not isinstance(question, str):
        question = tuple(Message(**message) for message in question)
    return Problem(**{**values, "question": question})


def answer(number: int, verdict: Answer) -> list[Any]:
    """Return the message with a verdict or a reply."""
    if isinstance(verdict, Reply):
        return [number, REPLY, verdict.reward, verdict.done, verdict.detail, verdict.text, verdict.solved]
    return [number, verdict.outcome, verdict.reward, verdict.answered, verdict.detail, dict(verdict.parts)]


def answered(line: bytes) -> tuple[Any, Answer] | None:
    """Return item number and verdict or reply of a line; None if it is neither.

    A verifier may write anything into the pipe; even the number may be of any type.
    """
    try:
        number, outcome, reward, flag, detail, *rest = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    if not _is_finite(reward) or type(flag) is not bool or type(detail) is not str:
        return None
    match rest:
        case [str() as text, bool() | None as solved] if outcome == REPLY:
            return number, Reply(text=text, done=flag, reward=reward, solved=solved, detail=detail)
        case [dict() as parts] if outcome in OUTCOMES and all(map(_is_finite, parts.values())):
            return number, Verdict(outcome=outcome, reward=reward, answered=flag, detail=detail, parts=parts)
    return None


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def problem_values(problem: Problem) -> dict[str, Any]:
    """Return the JSON form of a problem."""
    question = problem.question
    return {
        "problem_id": problem.problem_id,
        "question": question if isinstance(question, str) else [asdict(message) for message in question],
        "answer": problem.answer,
        "metadata": dict(problem.metadata),
    }
