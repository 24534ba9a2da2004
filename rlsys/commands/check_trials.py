"""Trials of `rlsys check`: a prompt, and calls of the verifier, the rewards and the environment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from actors.verifiers.pool import RewardPool
from rlsys.commands.check_demonstrations import demonstrations, first_turn, turn_with_stop
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.risks import WARNING
from rlsys.config.schema import Config
from rlsys.config.search_values import FunctionValueConfig
from rlsys.errors import ConfigError, DataError
from rlsys.interfaces import Reply
from rlsys.launch.prepare import Prepared
from rlsys.models.chat import decode_prompt
from rlsys.models.turns import TurnEncoder, opening_ids
from rlsys.plugins import command_folder
from rlsys.tasks.calculator import call_node
from rlsys.types import Problem, Verdict

SHOWN = 200
"""Characters of a text that are shown."""


def first_prompt(prepared: Prepared) -> str:
    """Return the first held-out prompt as the model gets it, for the user to read."""
    token_ids = prepared.inputs.held_out[0].token_ids
    text = decode_prompt(prepared.policy.tokenizer, token_ids.tolist())
    return f"first held-out prompt, {len(token_ids)} tokens (its question is in it): {text!r}"


def first_rewards(config: Config, prepared: Prepared) -> str:
    """Return the rewards of a demonstration, or of the reference answer alone, from a verifier process as in a run.

    Raises:
        ConfigError: a reward function cannot be used, or failed on the completion.
    """
    problem, text = _shown(prepared)
    [verdict] = asyncio.run(_judged(config, problem, text))
    if verdict.outcome not in ("ok", "wrong"):
        raise ConfigError(f"rewards.functions: the completion {text[-SHOWN:]!r} got no reward: {verdict.detail}")
    parts = ", ".join(f"{name} {value:g}" for name, value in verdict.parts.items())
    return f"reward of the completion {text[-SHOWN:]!r} to problem {problem.problem_id}: {verdict.reward:g} ({parts})"


def first_verdicts(config: Config, prepared: Prepared) -> list[str]:
    """Return the rewards of a demonstration, or of two forms of a reference answer, from a verifier process.

    Raises:
        ConfigError: the verifier cannot be used, or failed on a completion.
    """
    problem, text = _shown(prepared)
    answer = prepared.inputs.held_out[0].answer
    texts = [text] if text != f"<answer>{answer}</answer>" else [answer, text]
    lines, best = [], 0.0
    for each in texts:
        [verdict] = asyncio.run(_judged(config, problem, each))
        if verdict.outcome not in ("ok", "wrong"):
            raise ConfigError(f"task: verify failed on the completion {each[-SHOWN:]!r}: {verdict.detail}")
        best = max(best, verdict.reward)
        detail = f" ({verdict.detail})" if verdict.detail else ""
        lines.append(
            f"reward of the completion {each[-SHOWN:]!r} to problem {problem.problem_id}: {verdict.reward:g}{detail}"
        )
    if best <= 0:
        lines.append(f"{WARNING}task: verify gives none of these a reward above 0; fine if answers have another form")
    return lines


def first_value(config: Config, value: FunctionValueConfig, prepared: Prepared) -> str:
    """Return the value of a demonstration, or of the reference answer alone, from a verifier process as in a run.

    Raises:
        ConfigError: the function cannot be used, or failed on the chain.
    """
    problem, text = _shown(prepared)
    [verdict] = asyncio.run(_valued(config, value, problem, text))
    if verdict.outcome not in ("ok", "wrong"):
        raise ConfigError(f"search.value.fn: the chain {text[-SHOWN:]!r} got no value: {verdict.detail}")
    number = f"{verdict.reward:g}" if verdict.answered else "none"
    return f"value of the chain {text[-SHOWN:]!r} for problem {problem.problem_id}: {number}"


async def _valued(config: Config, value: FunctionValueConfig, problem: Problem, text: str) -> list[Verdict]:
    pool = RewardPool(config.task, config.run.seed, config.rewards, folder=command_folder(), value=value)
    try:
        return await pool.values(problem, [text])
    finally:
        await pool.close()


def _shown(prepared: Prepared) -> tuple[Problem, str]:
    """Return a demonstration with its problem, or the reference answer of a held-out problem."""
    prompt = prepared.inputs.held_out[0]
    shown = prepared.inputs.task.demonstration(0, random.Random(0))
    problem, chain = shown or (prompt.problem, f"<answer>{prompt.answer}</answer>")
    return problem, chain if isinstance(chain, str) else "".join(chain[::2])  # without the texts of the environment


def first_reply(config: Config, environment: EnvironmentConfig, prepared: Prepared) -> list[str]:
    """Return the reply of the environment to a turn of a demonstration, from a verifier process as in a run.

    Without a demonstration that ends a turn, the turn is a sum for the calculator, else the reference answer. It is
    asked twice, also for its text before the first turn of a held-out problem. A warning says what differs.

    Raises:
        EngineError: the environment cannot be used.
        ConfigError: it failed, or episodes cannot begin with its text before the first turn.
    """
    (problem, turn), prompt = _shown_turn(environment, prepared), prepared.inputs.held_out[0]
    requests: list[tuple[Problem, tuple[str, ...]]] = [(prompt.problem, ()), (problem, (turn,))]
    first, again = asyncio.run(_replies(config, environment, requests))
    name = f"environment.fn {environment.fn!r}"
    pairs = list(zip(first, again, strict=True))
    opening, notes = _checked(pairs[0], name, "before the first turn")
    reply, more = _checked(pairs[1], name, f"on the turn {turn!r}")
    encode = TurnEncoder(prepared.policy.tokenizer, environment.role).reply
    try:
        opening_ids(opening.text, encode, environment.role, len(prompt.token_ids), config.actors.max_model_len)
    except DataError as error:
        raise ConfigError(f"{name}: every episode would fail: {error.message}") from None
    text = repr(reply.text[:SHOWN]) if reply.text else "no text"
    facts = [*(["the episode ends"] if reply.done else []), *([f"reward {reply.reward:g}"] if reply.reward else [])]
    about = f"the turn {turn!r} of problem {problem.problem_id}"
    return [f"reply of the environment to {about}: {', '.join([text, *facts])}", *notes, *more]


def _checked(answers: Sequence[Reply | Verdict], name: str, given: str) -> tuple[Reply, list[str]]:
    """Return the first of several answers to the same turns, and a warning if they are not the same.

    Raises:
        ConfigError: the environment failed.
    """
    replies = []
    for answer in answers:
        if isinstance(answer, Verdict):
            raise ConfigError(f"{name} failed {given}: {answer.detail}")
        replies.append(answer)
    told = list(dict.fromkeys(map(_told, replies)))
    if len(told) == 1:
        return replies[0], []
    warning = (
        f"{WARNING}{name}: expected the same reply whenever it is asked, found {told[0]} and then {told[1]} "
        f"{given}; it must be a function of problem and turns: draw random numbers from a seed such as "
        "problem.problem_id"
    )
    return replies[0], [warning]


def _told(reply: Reply) -> str:
    """Return what a reply decides: the text, the end and the rewards."""
    facts = [f"reward {reply.reward:g}"] if reply.reward else []
    facts += ["the end"] if reply.done else []
    facts += [f"solved {str(reply.solved).lower()}"] if reply.solved is not None else []
    return ", ".join([repr(reply.text), *facts])


def _shown_turn(environment: EnvironmentConfig, prepared: Prepared) -> tuple[Problem, str]:
    """Return a turn of a demonstration with its problem, or one that is made up for a held-out problem."""
    prompt, shown = prepared.inputs.held_out[0], demonstrations(prepared.inputs.task, 0)
    turn = turn_with_stop(environment, shown) if environment.stop else first_turn(shown)
    if turn:
        return turn
    if environment.fn == "calculator":
        return prompt.problem, call_node("2 + 3")
    return prompt.problem, f"{prompt.answer}{''.join(environment.stop[:1])}"


async def _replies(
    config: Config, environment: EnvironmentConfig, requests: Sequence[tuple[Problem, tuple[str, ...]]]
) -> tuple[list[Reply | Verdict], list[Reply | Verdict]]:
    """Return the replies of an environment that is asked twice."""
    folder = command_folder()
    pool = RewardPool(config.task, config.run.seed, config.rewards, folder=folder, environment=environment)
    try:
        return await pool.replies(requests), await pool.replies(requests)
    finally:
        await pool.close()


async def _judged(config: Config, problem: Problem, text: str) -> list[Verdict]:
    pool = RewardPool(config.task, config.run.seed, config.rewards, folder=command_folder())
    try:
        return await pool.verify([(problem, text)])
    finally:
        await pool.close()
