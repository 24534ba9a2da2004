"""Warnings of `rlsys check` about demonstrations: their stop strings, lengths and answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence

from actors.verifiers.pool import RewardPool
from rlsys.config.environment import EnvironmentConfig, active_environment
from rlsys.config.risks import WARNING
from rlsys.config.schema import Config
from rlsys.config.tasks import GeneratedConfig
from rlsys.errors import ConfigError
from rlsys.interfaces import Task
from rlsys.launch.prepare import Prepared
from rlsys.plugins import command_folder
from rlsys.types import Chain, Problem, Verdict

COUNT = 256
"""Demonstrations that are looked at."""
ENOUGH_S = 3.0
"""Seconds after which no further demonstrations are verified."""

Shown = tuple[Problem, Chain]


def demonstrations(task: Task, seed: int) -> list[Shown]:
    """Return up to COUNT demonstrations, of a finite task evenly over its training problems."""
    size = task.size("train")
    count = COUNT if size is None else min(size, COUNT)
    indices = range(count) if size is None else [number * size // count for number in range(count)]
    shown: list[Shown] = []
    with contextlib.suppress(ConfigError):  # a stage that trains them names it
        for index in indices:
            each = task.demonstration(index, random.Random(f"{seed}/{index}"))
            shown += [each] if each else []
    return shown


def turn_with_stop(environment: EnvironmentConfig, shown: Sequence[Shown]) -> tuple[Problem, str] | None:
    """Return the problem and first turn of a demonstration, up to and with a stop string; None without one."""
    for problem, chain in shown:
        for turn in _turns(chain):
            ends = [place + len(stop) for stop in environment.stop if (place := turn.find(stop)) >= 0]
            if ends:
                return problem, turn[: min(ends)]
    return None


def first_turn(shown: Sequence[Shown]) -> tuple[Problem, str] | None:
    """Return the first turn of the first demonstration with several, and its problem; None without one."""
    several = ((problem, chain[0]) for problem, chain in shown if not isinstance(chain, str) and len(chain) > 1)
    return next(several, None)


def made_up(environment: EnvironmentConfig, prepared: Prepared) -> list[str]:
    """Return a line if no demonstration has a turn for the environment, so the trial makes one up."""
    if not environment.stop or turn_with_stop(environment, demonstrations(prepared.inputs.task, 0)):
        return []
    ends = " or ".join(map(repr, environment.stop))
    return [f"no demonstration has a turn that ends with {ends}, so no reply to a real turn was tried; made up:"]


def demonstration_lines(config: Config, prepared: Prepared) -> Iterator[str]:
    """Yield warnings about demonstrations that do not fit the settings, or whose answers are judged wrong."""
    shown = demonstrations(prepared.inputs.task, config.run.seed)
    if not shown:
        return
    environment = active_environment(config.environment, config.task)
    for stop in environment.stop if environment else ():
        if not any(stop in turn for _, chain in shown for turn in _turns(chain)):
            yield f"{WARNING}environment.stop: {stop!r} ends no turn of {len(shown)} demonstrations"
    lengths = list(_lengths(prepared, shown))
    limit = config.sampling.max_tokens
    if longer := sum(length > limit for length in lengths):
        yield (
            f"{WARNING}{longer} of {len(lengths)} demonstrations are longer than sampling.max_tokens ({limit}), the "
            f"longest has {max(lengths)} tokens with its end token"
        )
    if not isinstance(config.task, GeneratedConfig):  # some of its demonstrations are wrong on purpose: error_rate
        yield from _judged(config, environment, shown)


def _turns(chain: Chain) -> Sequence[str]:
    """Return the turns of the policy."""
    return (chain,) if isinstance(chain, str) else chain[::2]


def _lengths(prepared: Prepared, shown: Sequence[Shown]) -> Iterator[int]:
    """Yield the number of tokens that the policy writes in each demonstration, without those that cannot be used."""
    for problem, chain in shown:
        try:
            _, trained = prepared.inputs.encode_demonstration(problem.question, chain)
        except ConfigError:  # the stage that trains them names it
            continue
        yield sum(trained)


def _judged(config: Config, environment: EnvironmentConfig | None, shown: Sequence[Shown]) -> Iterator[str]:
    """Yield a warning if the verifier judges demonstrations wrong or without an answer.

    A demonstration that ends with a turn for the environment has no answer yet, and is not judged.
    """
    stops, joint = (environment.stop, environment.joint) if environment else ((), "")
    complete = [
        (problem, joint.join(_turns(chain)))
        for problem, chain in shown
        if not (stops and _turns(chain)[-1].endswith(stops))
    ]
    verdicts = asyncio.run(_verified(config, complete))
    wrong = [number for number, verdict in enumerate(verdicts) if verdict.outcome == "wrong"]
    if not wrong:
        return
    silent = sum(not verdicts[number].answered for number in wrong)
    parts = [f"{len(wrong) - silent} wrong"] if len(wrong) > silent else []
    parts += [f"{silent} without an answer"] if silent else []
    first = complete[wrong[0]][0].problem_id
    detail = f" ({verdicts[wrong[0]].detail})" if verdicts[wrong[0]].detail else ""
    yield (
        f"{WARNING}of {len(verdicts)} demonstrations, the verifier judges {' and '.join(parts)}: "
        f"{len(wrong) / len(verdicts):.0%}; the first is that of {first}{detail}"
    )


async def _verified(config: Config, items: Sequence[Shown]) -> list[Verdict]:
    """Return the verdicts of the task on the first items, on as many as a few seconds allow.

    Reward functions are not called: they may be slow or cost something, and accuracy is that of the task.
    """
    rewards = config.rewards.model_copy(update={"functions": ()})
    pool = RewardPool(config.task, config.run.seed, rewards, folder=command_folder())
    verdicts: list[Verdict] = []
    started = time.monotonic()
    try:
        while len(verdicts) < len(items) and time.monotonic() - started < ENOUGH_S:
            count = max(1, len(verdicts))  # twice as many each time, so a slow verifier ends soon
            verdicts += await pool.verify([(p, str(text)) for p, text in items[len(verdicts) :][:count]])
    finally:
        await pool.close()
    return verdicts
