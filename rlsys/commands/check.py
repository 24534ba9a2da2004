"""`rlsys check`: validate a config, its model and its data, and print what a run would use."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from actors.verifiers.pool import RewardPool
from rlsys.config.engine_roles import describes_a_search, section_of
from rlsys.config.environment import EnvironmentConfig, active_environment
from rlsys.config.files import dump_config
from rlsys.config.schema import Config
from rlsys.config.search_values import FunctionValueConfig
from rlsys.control.tree_search import demonstration_notes
from rlsys.display import print_table, standard_output
from rlsys.errors import ConfigError
from rlsys.interfaces import Reply
from rlsys.launch.prepare import Prepared, check_settings, prepare
from rlsys.launch.resources import ResourcePlan
from rlsys.models.chat import decode_prompt
from rlsys.plugins import command_folder
from rlsys.run.provenance import check_extraction, check_inputs
from rlsys.run.resume import checkpoint_store, find_start
from rlsys.types import Problem, Verdict

DEMONSTRATIONS = 16
"""Number of demonstrations that are searched for one of several turns."""


def run(config: Config) -> None:
    """Print the resolved config, the resource plans, the notes on the data, and where training would start.

    Raises:
        ConfigError: the input is not usable, this machine is too small, or run.dir holds a run that this config cannot
            continue.
    """
    check_settings(config, "check")
    run_dir = Path(config.run.dir).absolute()
    start = find_start(config, run_dir, checkpoint_store(config))
    prepared = prepare(config, "check")
    if start.checkpoint and prepared.policy.path.is_dir():  # `train` builds a model that is missing
        check_inputs(start.checkpoint, prepared.fingerprint())
        check_extraction(config, start.state, start.checkpoint, len(prepared.tree_prompts))
    print(dump_config(config))
    for title, plan in zip(("resource plan", "resource plan of rlsys search"), prepared.plans, strict=False):
        _show_plan(title, plan)
    searches = describes_a_search(config)
    tags = demonstration_notes(config, prepared.inputs.task) if searches else []
    for note in (*prepared.notes, *tags):
        print(note)
    print(first_prompt(prepared))
    if config.objective.custom.fn or ":" in config.objective.policy.estimator:
        from learners.plugins import check_plugins  # it loads torch

        check_plugins(config.objective)
    if config.rewards.functions:
        print(first_rewards(config, prepared))
    if isinstance(config.search.value, FunctionValueConfig):
        print(first_value(config, config.search.value, prepared))
    if environment := active_environment(config.environment, config.task):
        print(first_reply(config, environment, prepared))
    print(start.describe())
    for plan in prepared.plans:
        plan.check()


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
        raise ConfigError(f"rewards.functions: the completion {text[-200:]!r} got no reward: {verdict.detail}")
    parts = ", ".join(f"{name} {value:g}" for name, value in verdict.parts.items())
    return f"reward of the completion {text[-200:]!r} to problem {problem.problem_id}: {verdict.reward:g} ({parts})"


def first_value(config: Config, value: FunctionValueConfig, prepared: Prepared) -> str:
    """Return the value of a demonstration, or of the reference answer alone, from a verifier process as in a run.

    Raises:
        ConfigError: the function cannot be used, or failed on the chain.
    """
    problem, text = _shown(prepared)
    [verdict] = asyncio.run(_valued(config, value, problem, text))
    if verdict.outcome not in ("ok", "wrong"):
        raise ConfigError(f"search.value.fn: the chain {text[-200:]!r} got no value: {verdict.detail}")
    number = f"{verdict.reward:g}" if verdict.answered else "none"
    return f"value of the chain {text[-200:]!r} for problem {problem.problem_id}: {number}"


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


def first_reply(config: Config, environment: EnvironmentConfig, prepared: Prepared) -> str:
    """Return the reply of the environment to a turn of a demonstration, from a verifier process as in a run.

    Without a demonstration of several turns, the turn is empty up to its stop string.

    Raises:
        EngineError: the environment cannot be used.
        ConfigError: it failed on the turn.
    """
    task, problem, turn = prepared.inputs.task, prepared.inputs.held_out[0].problem, "".join(environment.stop[:1])
    for index in range(DEMONSTRATIONS if task.size("train") is None else 0):
        shown = task.demonstration(index, random.Random(index))
        if shown and not isinstance(shown[1], str) and len(shown[1]) > 1:
            problem, turn = shown[0], shown[1][0]
            break
    opening, reply = asyncio.run(_replies(config, environment, problem, turn))
    for answer, given in ((opening, "no turn"), (reply, f"the turn {turn!r}")):
        if isinstance(answer, Verdict):
            raise ConfigError(f"environment.fn {environment.fn!r} failed on {given}: {answer.detail}")
    assert isinstance(reply, Reply)  # noqa: S101 - see above
    return f"reply of the environment to the turn {turn!r} of problem {problem.problem_id}: {reply.text[:200]!r}"


async def _replies(
    config: Config, environment: EnvironmentConfig, problem: Problem, turn: str
) -> list[Reply | Verdict]:
    folder = command_folder()
    pool = RewardPool(config.task, config.run.seed, config.rewards, folder=folder, environment=environment)
    try:
        return await pool.replies([(problem, ()), (problem, (turn,))])
    finally:
        await pool.close()


async def _judged(config: Config, problem: Problem, text: str) -> list[Verdict]:
    pool = RewardPool(config.task, config.run.seed, config.rewards, folder=command_folder())
    try:
        return await pool.verify([(problem, text)])
    finally:
        await pool.close()


def _show_plan(title: str, plan: ResourcePlan) -> None:
    auxiliary = [f"{engines.actors.count} of {section_of(engines.role)}" for engines in plan.auxiliary]
    learner = [f"{plan.ranks} learner ranks"] if plan.ranks else []
    processes = ", ".join([f"{plan.config.actors.count} actors", *auxiliary, *learner])
    rows = [(need.phase, need.resource, f"{need.amount:.4g}", f"{need.available:.4g}") for need in plan.needs]
    if plan.config.run.device == "cuda":
        rows.append(("all", "GPUs", str(plan.gpus), "the cluster's"))
    print_table(standard_output(), ("phase", "needs", "amount", "this machine"), rows, title=f"{title}: {processes}")
