"""The lines of JSON between an actor and a verifier process.

- First line in: {"parent": pid, "memory_mib": int, "seed": int, "task": section `task` of the config, "rewards":
  section `rewards`, "folder": see `rlsys.plugins.load_plugin`, "value": section `search.value` of type function, or
  null}. "task" may be replaced by "verifier": "module:factory", where `factory()` returns a function with the
  arguments of `Task.verify`.
- First line out: {"ready": true}.
- Then lines [number, problem, completion, finished] in, where `finished` may be missing, and lines
  [number, outcome, reward, answered, detail, parts] out, in order.
- A line [number, {"question": text, "completion": text}] asks for `Task.check_steps`; `actors.verifiers.steps` says
  how its answer fits into the line out. A line [number, {"problem": problem, "chain": text}] asks for the value of a
  chain, the reward of the line out, which has no answer if there is no value.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, get_args

from rlsys.types import Message, Outcome, Problem, Verdict


def request(number: int, given: Any, *others: Any) -> list[Any]:
    """Return the message that asks for a verdict; see `actors.verifiers.pool.Item`."""
    return [number, problem_values(given) if isinstance(given, Problem) else given, *others]


def problem_of(values: dict[str, Any]) -> Problem:
    """Return the problem of a message."""
    question = values["question"]
    if not isinstance(question, str):
        question = tuple(Message(**message) for message in question)
    return Problem(**{**values, "question": question})


def answer(number: int, verdict: Verdict) -> list[Any]:
    """Return the message with a verdict."""
    return [number, verdict.outcome, verdict.reward, verdict.answered, verdict.detail, dict(verdict.parts)]


def answered(line: bytes) -> tuple[Any, Verdict] | None:
    """Return item number and verdict of a line; None if it is not a verdict.

    A verifier may write anything into the pipe; even the number may be of any type.
    """
    try:
        number, outcome, reward, has_answer, detail, parts = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    if outcome not in get_args(Outcome) or type(has_answer) is not bool or type(detail) is not str:
        return None
    if type(parts) is not dict or not all(map(_is_finite, (reward, *parts.values()))):
        return None
    return number, Verdict(outcome=outcome, reward=reward, answered=has_answer, detail=detail, parts=parts)


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
