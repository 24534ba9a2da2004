"""Check the rules of environments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.config.environment import STOP_STRINGS, EnvironmentConfig, active_environment
from rlsys.config.patterns import Pattern, resolve
from rlsys.errors import ConfigError
from rlsys.trees import ENVIRONMENT

if TYPE_CHECKING:
    from rlsys.config.schema import Config

UNPLAYED_VALUES = {
    "steps": "the rules of steps know no turns",
    "rollouts": "its chains are drawn in one call, without replies",
}


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


def searched_turns_have_replies(config: Config) -> None:
    """Raise if a stage grows trees in which the environment could not reply."""
    if "search" in config.stages or ("online" in config.stages and config.search.online):
        try:
            check_searched_turns(config)
        except ConfigError as error:
            raise ValueError(error.message) from None


def check_searched_turns(config: Config) -> None:
    """Check that trees can hold the replies of the environment in use.

    Raises:
        ConfigError: they cannot; names the key.
    """
    environment, search = active_environment(config.environment, config.task), config.search
    patterns = resolve(search).values()
    if environment is None:
        asking = [pattern for pattern in patterns if pattern.turn_ends]
        if asking:
            raise ConfigError(
                f"search.tables.{asking[0].name}: replies of an environment follow {min(asking[0].turn_ends)}, and "
                "there is no environment: set environment.fn, or choose another table in search.patterns"
            )
        return
    if environment.role is not None:
        remedy = "set environment.role to null, or " if config.environment.role else ""
        raise ConfigError(
            f"environment {environment.fn} replies with messages of the role {environment.role}, and in a search a "
            f"reply stands in the completion as it is; {remedy}leave out the search"
        )
    for name in ("model", "reviewer"):
        if getattr(search, name) is not None:
            raise ConfigError(f"search.{name}: beside an environment the policy alone writes trees; leave it out")
    if search.value is not None and search.value.type in UNPLAYED_VALUES:
        raise ConfigError(
            f"search.value {{type: {search.value.type}}} is not for an environment: "
            f"{UNPLAYED_VALUES[search.value.type]}; leave it out, or choose another type"
        )
    if config.extract.skip:
        raise ConfigError("extract.skip is not for an environment: its replies answer the whole turns; leave it out")
    for pattern in patterns:
        _check_turn_ends(pattern, environment)


def _check_turn_ends(pattern: Pattern, environment: EnvironmentConfig) -> None:
    """Raise if the ends of turns are not the closing tags before replies."""
    closing = {f"</{node.tag}>": name for name, node in pattern.types.items()}
    for stop in environment.stop:
        name = closing.get(stop)
        if name is None or pattern.types[name].terminal:
            raise ConfigError(
                f"search.tables.{pattern.name}: expected a node type that is not terminal and ends with {stop!r}, "
                f"after which {environment.fn} answers (environment.stop); found none; add it to search.nodes, and "
                f"the rows `TYPE: {{{ENVIRONMENT}: 1}}` and `{ENVIRONMENT}: ...` to the table"
            )
        if name not in pattern.turn_ends:
            raise ConfigError(
                f"search.tables.{pattern.name}.children.{name}: {environment.fn} answers after {stop!r} "
                f"(environment.stop); expected the row {name}: {{{ENVIRONMENT}: 1}}"
            )
    for name in sorted(pattern.turn_ends - {closing[stop] for stop in environment.stop}):
        raise ConfigError(
            f"search.tables.{pattern.name}.children.{name}: {environment.fn} does not answer after "
            f"</{pattern.types[name].tag}>, which is not in environment.stop; add it there, or change the row"
        )
