"""Check the rules of environments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.config.environment import STOP_STRINGS, EnvironmentConfig, active_environment

if TYPE_CHECKING:
    from rlsys.config.schema import Config

SEARCHED = "an environment answers turns of sampled completions alone, and trees have none"


def environment_is_named(config: Config) -> None:
    """Raise if settings of an environment have no effect, because there is none."""
    if config.environment != EnvironmentConfig() and active_environment(config.environment, config.task) is None:
        raise ValueError("the section environment has no effect: set environment.fn, or leave the section out")


def turns_can_end(config: Config) -> None:
    """Raise if a turn could end only with the completion, or with a string after which there is no message."""
    if config.environment.role and config.environment.stop:
        raise ValueError(
            f"environment.stop has no effect with environment.role {config.environment.role}: every turn ends with the "
            "end token; leave one of them out"
        )
    environment = active_environment(config.environment, config.task)
    known = STOP_STRINGS.get(str(environment.fn), ()) if environment and environment.role is None else ()
    if environment and not set(known) <= set(environment.stop):
        raise ValueError(
            f"environment.stop: {environment.fn} answers after {', '.join(known)} alone, found "
            f"{', '.join(environment.stop)}; leave environment.stop out"
        )
    if environment and environment.role is None and not environment.stop:
        raise ValueError(
            f"environment.stop: expected the strings after which {environment.fn} answers, found none; name them, or "
            "set environment.role to user or tool"
        )


def environment_is_not_searched(config: Config) -> None:
    """Raise if a stage grows trees although the task has an environment."""
    searches = "search" in config.stages or ("online" in config.stages and config.search.online)
    if searches and active_environment(config.environment, config.task):
        raise ValueError(
            f"{SEARCHED}: leave out the stage search, search.fraction and search.unsolved, or the environment"
        )
