"""The searched part of `rlsys evaluate`: compares a tree of every held-out prompt with independent samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from rlsys.config.engine_roles import trees_ahead
from rlsys.config.schema import Config
from rlsys.control.budgets import verifier_limit
from rlsys.control.dispatch import TreePool, grow
from rlsys.control.evaluation import sample_groups
from rlsys.display import print_lines, print_table
from rlsys.errors import TooManyFailuresError
from rlsys.interfaces import RolloutPool
from rlsys.search.compare import (
    Attempts,
    Comparison,
    answer_counts,
    compare_answers,
    compare_tokens,
    sample_attempts,
    token_budgets,
    tree_attempts,
)
from rlsys.search.stats import StepCheck, TreeFigures
from rlsys.stats import Estimate
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Prompt, SamplingSettings, Trajectory

SIMULATIONS_PER_ANSWER = 4
"""Minimum number of simulations for each answer. Some simulations end without an answer."""


class SearchPool(RolloutPool, TreePool, Protocol):
    """Actors that sample and grow trees."""


def with_search(config: Config) -> Config:
    """Return the config of actors that search with the policy until a tree has evaluation.search_answers answers."""
    answers, stop = config.evaluation.search_answers, config.search.stop
    simulations = max(stop.simulations, SIMULATIONS_PER_ANSWER * answers)
    limits = {"answers": answers, "correct": (), "sure": None, "simulations": simulations, "tokens": None}
    stop = stop.model_copy(update=limits)
    return config.model_copy(update={"search": config.search.model_copy(update={"stop": stop, "model": None})})


def sampling_of(config: Config) -> SamplingSettings:
    """Return the settings of independent samples from the distribution that the search draws its nodes from."""
    return SamplingSettings(
        samples=config.evaluation.search_answers,
        temperature=config.search.temperature or config.sampling.temperature,
        top_p=config.search.top_p or config.sampling.top_p,
        max_tokens=config.sampling.max_tokens,
        seed=config.run.seed,
    )


async def search_and_sample(
    pool: SearchPool, prompts: Sequence[Prompt], config: Config, check_steps: StepCheck | None = None
) -> dict[str, Any]:
    """Return the comparison of search and samples as JSON-able values.

    Args:
        check_steps: judges the steps of right chains; None judges none.

    Raises:
        TooManyFailuresError: no tree could be grown, a sample failed, or too many verifications failed.
    """
    limit, counts = config.train.max_verifier_failures, answer_counts(config.evaluation.search_answers)
    trees = await grow_trees(pool, prompts, config)
    failures = [tree for tree in trees if isinstance(tree, TreeFailure)]
    if len(failures) == len(trees):
        raise TooManyFailuresError(f"none of {len(trees)} trees could be grown; the first: {failures[0].reason}")
    searches = [tree_attempts(tree) for tree in trees]
    budgets = token_budgets([tree_attempts(tree) for tree in trees if isinstance(tree, Tree)])
    drawn = await sample_until(pool, prompts, sampling_of(config), partial(_solved_or_spent, budgets[-1]), limit)
    samples = [sample_attempts(trajectories) for trajectories in drawn]
    return {
        "answers": counts[-1],
        "failed_trees": len(failures),
        "first_failure": failures[0].reason if failures else None,
        "tokens_per_problem": {
            "search": float(np.mean([attempts.total for attempts in searches])),
            "samples": float(np.mean([attempts.tokens[counts[-1] - 1] for attempts in samples])),
        },
        "at_equal_answers": _by_number(compare_answers(searches, samples, counts)),
        "at_equal_tokens": _by_number(compare_tokens(searches, samples, budgets)),
        "first_right_chains": _steps(trees, check_steps),
    }


def _steps(trees: Sequence[Tree | TreeFailure], check_steps: StepCheck | None) -> dict[str, int]:
    """Return how many first right chains the task could check, and how many of them have every step right."""
    figures = TreeFigures(check_steps=check_steps)
    for number, tree in enumerate(trees):
        figures.add(number, tree)
    return {"checked": figures.checked, "every_step_right": figures.sound}


def _solved_or_spent(budget: int, attempts: Attempts) -> bool:
    return attempts.total >= budget or bool(attempts.right.any())


async def grow_trees(pool: SearchPool, prompts: Sequence[Prompt], config: Config) -> list[Tree | TreeFailure]:
    """Return a tree or failure of every prompt, in order.

    Raises:
        TooManyFailuresError: more than train.max_verifier_failures of the verifications failed.
    """
    finished: dict[int, Tree | TreeFailure] = {}
    await grow(pool, dict(enumerate(prompts)), trees_ahead(config), finished.__setitem__)
    trees = [finished[number] for number in range(len(prompts))]
    verdicts = [node.verdict for tree in trees if isinstance(tree, Tree) for node in tree.nodes if node.verdict]
    failed = [verdict for verdict in verdicts if verdict.outcome in ("error", "timeout")]
    verifier_limit(config.train.max_verifier_failures).add(
        failed=len(failed), total=len(verdicts), details=[verdict.detail for verdict in failed]
    )
    return trees


async def sample_until(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    enough: Callable[[Attempts], bool],
    max_verifier_failures: float,
) -> list[list[Trajectory]]:
    """Draw independent samples of every prompt, `settings.samples` at a time, until `enough` of them are drawn.

    Returns:
        The samples of every prompt, in order.
    Raises:
        TooManyFailuresError: see `sample_groups`.
    """
    drawn: list[list[Trajectory]] = [[] for _ in prompts]
    unfinished, seed = list(range(len(prompts))), settings.seed
    while unfinished:
        more = replace(settings, seed=seed)
        groups = await sample_groups(pool, [prompts[number] for number in unfinished], more, max_verifier_failures)
        for number, group in zip(unfinished, groups, strict=True):
            drawn[number].extend(group.trajectories)
        unfinished = [number for number in unfinished if not enough(sample_attempts(drawn[number]))]
        seed += 2**31  # above every run.seed, so that no other run draws the same
    return drawn


def _by_number(comparisons: Mapping[int, Comparison]) -> dict[str, Any]:
    return {str(number): asdict(comparison) for number, comparison in comparisons.items()}


def show_search(results: Mapping[str, Any], problems: int, console: Console) -> None:
    """Print the results of `search_and_sample` as tables."""
    for name, unit in (("at_equal_answers", "answers"), ("at_equal_tokens", "tokens")):
        rows: list[tuple[str, ...]] = []
        for number, row in results[name].items():
            rows.append((number, "samples", *_cells(row["samples"]), "", ""))
            difference = "{} ({})".format(*_cells(row["difference"], sign="+"))
            rows.append(("", "search", *_cells(row["search"]), difference, f"{row['ended']:.3f}"))
        title = f"solved at least once in as many {unit}, {problems} problems"
        columns = (unit, "by", "share", "95 % interval", "difference to samples", "ended")
        print_table(console, columns, rows, title=title)
    tokens = results["tokens_per_problem"]
    lines = [
        "the search chose nodes by the verifier's verdicts; samples have no such help",
        "ended: share of the searches that ended unsolved, with fewer answers or tokens",
        f"generated tokens per problem: search {tokens['search']:.0f}, "
        f"{results['answers']} samples {tokens['samples']:.0f}",
    ]
    steps = results["first_right_chains"]
    if steps["checked"]:
        lines.append(f"every step is right in {steps['every_step_right']} of {steps['checked']} first right chains")
    if results["failed_trees"]:
        failed, first = results["failed_trees"], results["first_failure"]
        lines.append(f"{failed} trees failed and count as unsolved; the first: {first}")
    print_lines(console, lines)


def _cells(estimate: Mapping[str, float], sign: str = "") -> tuple[str, str]:
    value = Estimate(**estimate)
    return f"{value.mean:{sign}.3f}", f"{value.low:{sign}.3f} to {value.high:{sign}.3f}"
