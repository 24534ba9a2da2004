"""Paired comparison of two models on the same problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from rlsys.errors import ConfigError
from rlsys.evaluation.figures import RATES, sample_counts
from rlsys.stats import bootstrap_mean, mean_difference, pass_at_k

MODES = ("greedy", "sampled")


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the differences second - first of all figures, paired by problem.

    Args:
        first: result of a model; see `result_figures`.
        second: result of another model on the same task, with the same number of samples.

    Raises:
        ConfigError: the two were measured on different problems.
    """
    if first["problems_digest"] != second["problems_digest"]:
        raise ConfigError(
            f"{second['model']['name']}: expected the problems of {first['model']['name']}, found others; a difference "
            "of two models needs the same problems"
        )
    same_tokens = first["model"]["tokenizer"] == second["model"]["tokenizer"]
    differences: dict[str, Any] = {}
    for mode in MODES:
        if mode in first and mode in second:
            before, after = first[mode]["by_problem"], second[mode]["by_problem"]
            rates = {name: _share_difference(before[name], after[name]) for name in RATES}
            rates["reward"] = _mean_difference(before, after, "reward")
            differences[mode] = rates | (
                {"completion_length": _mean_difference(before, after, "completion_length")} if same_tokens else {}
            )
    if first["samples"]:
        ks = sample_counts(first["samples"])
        differences["pass_at_k"] = {str(k): _share_difference(_pass_at(first, k), _pass_at(second, k)) for k in ks}
        before, after = first["sampled"]["by_problem"], second["sampled"]["by_problem"]
        votes = {str(k): f"majority@{k}" for k in ks if k > 1}
        differences["majority_at_k"] = {k: _share_difference(before[name], after[name]) for k, name in votes.items()}
    return {
        "task": first["task"],
        "first": first["model"]["name"],
        "second": second["model"]["name"],
        "same_tokenizer": same_tokens,
        "differences": differences,
    }


def _share_difference(first: Any, second: Any) -> dict[str, float]:
    return asdict(mean_difference(np.array(second), np.array(first)))


def _mean_difference(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> dict[str, float]:
    return asdict(bootstrap_mean(np.array(second[name])[:, None] - np.array(first[name])[:, None]))


def _pass_at(result: Mapping[str, Any], k: int) -> np.ndarray:
    """Return pass@k of every problem, from its number of right samples."""
    samples = result["samples"]
    right = np.rint(np.array(result["sampled"]["by_problem"]["accuracy"]) * samples)
    return pass_at_k(np.arange(samples) < right[:, None], k)[:, 0]
