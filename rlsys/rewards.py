"""Functions of the user for rewards and values of chains, called as TRL calls reward functions.

They run in the verifier processes, so they have a deadline and limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Real
from typing import Any

from rlsys.config.rewards import TASK, RewardFunctionConfig, RewardsConfig
from rlsys.config.search_values import FunctionValueConfig
from rlsys.errors import ConfigError
from rlsys.plugins import load_function, raised_text
from rlsys.types import Message, Problem, Verdict

Text = str | Sequence[Mapping[str, str]]
"""A prompt or completion: text, or messages if the question of the problem is a conversation."""

_UNKNOWN = ("completion_ids", "completions_ids", "prompt_ids", "trainer_state")
"""Arguments that TRL gives and rlsys does not: a verifier process has neither the tokens nor a trainer."""
LARGEST_REWARD = 1e6
"""Above this bound a float32 cannot distinguish rewards that differ by 0.1."""
_FOUND_CHARS = 200


def format_reward(completions: Sequence[Text], *, pattern: str | None = None, **_columns: Any) -> list[float]:
    """Return 1 for a completion that has a pattern, else 0.

    Args:
        completions: the completions.
        pattern: regular expression for the whole completion. By default: any text, and then one answer between
            <answer> and </answer>.
    """
    expression = pattern or r"(?:(?!</?answer>).)*<answer>(?:(?!</?answer>).)+</answer>\s*"
    return [float(re.fullmatch(expression, text_of(each), re.DOTALL) is not None) for each in completions]


def length_reward(completions: Sequence[Text], *, start: int, end: int, **_columns: Any) -> list[float]:
    """Return 0 for a completion of up to `start` characters, and less beyond it, down to -1 at `end`."""
    lengths = [len(text_of(each)) for each in completions]
    return [-min(1.0, max(0.0, (length - start) / (end - start))) for length in lengths]


BUILT_IN = {"format": format_reward, "length": length_reward}


def text_of(completion: Text) -> str:
    """Return the text of a completion."""
    return completion if isinstance(completion, str) else "".join(str(each["content"]) for each in completion)


class Rewards:
    """The reward functions of a run and their weights.

    Args:
        config: the section `rewards`.
        folder: see `rlsys.plugins.load_plugin`.

    Raises:
        ConfigError: a function cannot be imported, or cannot be called.
    """

    def __init__(self, config: RewardsConfig, folder: str) -> None:
        self._task_weight = config.task_weight
        self._functions = [_Function(each, f"rewards.functions.{n}", folder) for n, each in enumerate(config.functions)]

    def verdict(self, problem: Problem, completion: str, verdict: Verdict) -> Verdict:
        """Return the verdict of the task with the weighted sum of all rewards. A failed one stays as it is.

        A function that gives None for a completion adds nothing to it. If the task does not judge answers (see
        `Verdict`), an answer is right if the sum is above 0.
        """
        if not self._functions or verdict.outcome not in ("ok", "wrong"):
            return verdict
        is_unjudged = verdict.outcome == "ok" and not verdict.correct
        parts = dict(verdict.parts)
        if self._task_weight and not is_unjudged:
            parts[TASK] = float(verdict.reward)
        total = self._task_weight * verdict.reward
        for function in self._functions:
            value = function(problem, completion)
            if isinstance(value, str):
                return Verdict(outcome="error", reward=0.0, answered=False, detail=value)
            if value is not None:
                parts[function.name] = value
                total += function.weight * value
        if not parts:
            detail = "no reward: every function gave None, and the task gives none"
            return Verdict(outcome="error", reward=0.0, answered=False, detail=detail)
        if fault := fault_of_reward(total):
            terms = ", ".join(f"{name} {value:g}" for name, value in parts.items())
            detail = f"weighted sum of the rewards {terms}: {fault}"
            return Verdict(outcome="error", reward=0.0, answered=False, detail=detail)
        is_right = total > 0 if is_unjudged else verdict.correct
        return replace(verdict, outcome="ok" if is_right else "wrong", reward=total, parts=parts)


class ChainValue:
    """A function of the user that gives the last node of a chain a value.

    Raises:
        ConfigError: as for `Rewards`.
    """

    def __init__(self, config: FunctionValueConfig, folder: str) -> None:
        reward = RewardFunctionConfig(fn=config.fn, arguments=config.arguments)
        self._function = _Function(reward, "search.value", folder, noun="value function")

    def __call__(self, problem: Problem, chain: str) -> Verdict:
        """Return the value as a reward; without an answer if the function gives None."""
        value = self._function(problem, chain)
        if isinstance(value, str):
            return Verdict(outcome="error", reward=0.0, answered=False, detail=value)
        return Verdict(outcome="ok", reward=value or 0.0, answered=value is not None)


class _Function:
    """A reward function with its name and weight."""

    def __init__(self, config: RewardFunctionConfig, field: str, folder: str, noun: str = "reward function") -> None:
        self._noun = noun
        self.name, self.weight = config.label, config.weight
        self._call: Any = BUILT_IN.get(config.fn) or load_function(config.fn, folder, f"{field}.fn")
        self._arguments = config.arguments
        parameters = inspect.signature(self._call).parameters
        self._takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        self._known = frozenset(parameters)
        missing = [n for n in _UNKNOWN if n in parameters and parameters[n].default is inspect.Parameter.empty]
        if missing:
            raise ConfigError(
                f"{field}.fn {config.fn!r}: it needs {missing[0]}, which does not exist here; it gets prompts, "
                "completions, reference and the columns of the data set"
            )
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        required = [each for each in parameters.values() if each.default is inspect.Parameter.empty]
        self._required = [each.name for each in required if each.kind in named]
        unknown = [] if self._takes_all else [name for name in self._arguments if name not in parameters]
        if unknown:
            raise ConfigError(f"{field}.arguments: {config.fn!r} has no argument {unknown[0]!r}")

    def __call__(self, problem: Problem, completion: str) -> float | str | None:
        """Return the reward of a completion, None if the function does not apply, or the text of its fault."""
        given = _arguments(problem, completion)
        if missing := [name for name in self._required if name not in given and name not in self._arguments]:
            return f"{self._noun} {self.name}: {_no_column(missing[0], list(given))}"
        if not self._takes_all:
            given = {name: value for name, value in given.items() if name in self._known}
        try:
            values = self._call(**{**given, **self._arguments})
            if inspect.isawaitable(values):
                values = asyncio.run(_awaited(values))
            return _one_number(values)
        except _ReturnedError as error:
            return f"{self._noun} {self.name}: {error}"
        # A failure becomes data. SystemExit and the timeouts of some libraries derive from BaseException only.
        except BaseException as error:  # noqa: BLE001
            return f"{self._noun} {self.name}: {raised_text(error)}"


class _ReturnedError(Exception):
    """A function returned something else than a list of one number or None."""


def _one_number(values: Any) -> float | None:
    """Return the only entry of what a function returned.

    Raises:
        _ReturnedError: it is something else than a list of one number or None.
    """
    expected = "expected a list of one number or None for each completion"
    is_list = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)
    if not is_list or getattr(values, "shape", None) == ():  # an array without dimensions has no length
        raise _ReturnedError(f"{expected}, found {_shown(values)}")
    if len(values) != 1:
        raise _ReturnedError(f"{expected}, found {len(values)} entries for one completion")
    [value] = values
    if value is None:
        return None
    number = math.nan
    with contextlib.suppress(ValueError, RuntimeError, OverflowError):  # an array of several numbers, a huge integer
        value = value.item() if hasattr(value, "item") else value  # of numpy or torch
        number = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(number):
        raise _ReturnedError(f"{expected}, found {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:_FOUND_CHARS]


def fault_of_reward(number: Any) -> str:
    """Return why a reward cannot be used, or ""."""
    if isinstance(number, bool) or not isinstance(number, Real):  # Real includes numpy's numbers
        return f"expected a number as reward, found {type(number).__name__}"
    reward = float(number)
    if not math.isfinite(reward):
        return f"expected a finite reward, found {reward}"
    if abs(reward) > LARGEST_REWARD:
        return f"expected a reward from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}, found {reward:g}"
    return ""


def _no_column(name: str, given: Sequence[str]) -> str:
    """Return the fault of a function that needs an argument which no column has."""
    close = difflib.get_close_matches(name, given, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return (
        f"it needs the argument {name!r}, and the data have no such column; {meant}it can take {', '.join(given)}, and "
        "what `arguments` beside its fn sets"
    )


async def _awaited(values: Any) -> Any:
    return await values


def _arguments(problem: Problem, completion: str) -> dict[str, Any]:
    """Return the arguments of a call for one completion: lists of one, as for a batch of one in TRL."""
    prompt: Text
    if isinstance(problem.question, str):
        prompt, reply = problem.question, completion
    else:
        prompt = [_message(each) for each in problem.question]
        reply = [{"role": "assistant", "content": completion}]  # type: ignore[assignment]
    columns = {name: [value] for name, value in problem.metadata.items()}
    texts = {"reference": [problem.answer], "prompts": [prompt], "completions": [reply]}
    return {"answer": [problem.answer], **columns, **texts}


def _message(message: Message) -> dict[str, str]:
    return asdict(message)
