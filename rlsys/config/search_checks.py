"""Check the rules of the search, most of them for search within online training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def search_samples_like_training(config: Config) -> None:
    """Raise if the policy writes trees under another distribution than the learner assumes."""
    if not config.search.online or config.search.model is not None:
        return
    for name in ("temperature", "top_p"):
        searched, sampled = getattr(config.search, name), getattr(config.sampling, name)
        if searched not in (None, sampled):
            raise ValueError(
                f"search.{name} {searched} differs from sampling.{name} {sampled}, at which the learner trains "
                f"what the policy writes in stage online: leave search.{name} out or make them equal"
            )


def searched_groups_train_by_token(config: Config) -> None:
    """Raise if the policy loss averages over sequences although groups come from trees.

    The rows of a searched group share prefixes, and each row trains only the tokens that earlier rows do not train. So
    a row is not a whole sequence.
    """
    policy = config.objective.policy
    if not (config.search.online and policy.used):
        return
    for name, value, expected in (
        ("policy.aggregation", policy.aggregation, "token_mean"),
        ("policy.surrogate", policy.surrogate if policy.surrogate == "gspo" else "clip", "clip"),
        ("kl.in_reward", config.objective.kl.in_reward, False),
    ):
        if value != expected:
            raise ValueError(
                f"search in stage online (search.fraction, search.unsolved) needs objective.{name} {expected}, found "
                f"{value}"
            )


def unsolved_prompts_are_told(config: Config) -> None:
    """Raise if unsolved prompts would never be found."""
    if config.search.unsolved and "online" in config.stages and not config.train.dynamic_sampling_rounds:
        raise ValueError("search.unsolved has no effect: it needs train.dynamic_sampling_rounds of at least 1, found 0")


def estimates_have_a_source(config: Config) -> None:
    """Raise if values of steps are to be estimates that nothing makes."""
    made = config.search.value is not None and config.search.value.type != "agreement"
    if config.extract.step_value == "estimate" and not made:
        raise ValueError(
            "extract.step_value estimate needs search.value of type steps, rollouts or model; set one, or "
            "extract.step_value to mean"
        )


def backtracking_has_its_keys(config: Config) -> None:
    """Raise if a key of backtracking is set for a search without it."""
    search = config.search
    for name in ("backtrack_to", "max_backtracks") if not search.backtracking else ():
        given = getattr(search, name)
        if given != type(search).model_fields[name].default:
            raise ValueError(
                f"search.{name} {given} has no effect: set search.backtracking to true, or leave {name} out"
            )


def tree_advantages_have_trees(config: Config) -> None:
    """Raise if advantages of trees are not to be divided, and no stage trains on trees."""
    if not config.objective.policy.tree_std and "online" in config.stages and not config.search.online:
        raise ValueError(
            "objective.policy.tree_std has no effect on sampled groups: raise search.fraction, or leave tree_std out"
        )
