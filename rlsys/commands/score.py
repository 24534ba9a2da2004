"""`rlsys score`: score the correct chains of a search with the policy and a teacher, see `rlsys.search.scores`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from rlsys.config.schema import Config
from rlsys.data.inputs import prepare_model
from rlsys.errors import ConfigError
from rlsys.launch.access import child_environment
from rlsys.models.folder import ModelFolder, given_model
from rlsys.search.export import Source
from rlsys.search.extract import Chain, correct_chains
from rlsys.search.scores import ChainScores, node_means, write_scores
from rlsys.search.tree_index import shards
from rlsys.search.tree_json import read_trees
from rlsys.trees import Tree
from rlsys.types import Float32Array


def run(source: Source, teacher_name: str, output: Path) -> str:
    """Score all correct chains in this process, with one engine after the other, and write the scores.

    Args:
        source: the trees and their config. `model.path` is the policy; section `actors` sizes the engines.
        teacher_name: model folder or hub id of the teacher.
        output: the file to write.

    Returns:
        The closing line for the user.

    Raises:
        ConfigError: the teacher cannot be used, or has another tokenizer.
        DataError: a tree file is damaged.
    """
    config = source.config
    teacher, policy = given_model(teacher_name, "the teacher"), prepare_model(config, source.trees.parent)
    if teacher.tokenizer_digest != policy.tokenizer_digest:
        raise ConfigError(
            f"the teacher {teacher.path}: expected the tokenizer of the policy {policy.path}, found another one; "
            "choose a teacher of the same family"
        )
    chains = [
        (tree.prompt_id, correct_chains(tree, source.codec))
        for path in shards(source.trees)
        for tree in read_trees(path)
        if isinstance(tree, Tree)
    ]
    all_chains = [chain for _, of_tree in chains for chain in of_tree]
    if not all_chains:
        raise ConfigError(f"{source.trees}: expected trees with a correct chain, found none")
    os.environ.update(child_environment(local=True))  # before vllm is imported
    scored = zip(*(_means(model, config, all_chains) for model in (policy, teacher)), strict=True)
    scores = [ChainScores(own, other) for own, other in scored]
    left = iter(scores)
    write_scores(
        output, [(prompt_id, {chain.number: next(left) for chain in of_tree}) for prompt_id, of_tree in chains]
    )
    divergence = float(np.mean([each.divergence for each in scores]))
    return f"{len(scores)} chains scored, mean divergence {divergence:.4f}\nwritten to {output}"


def _means(model: ModelFolder, config: Config, chains: list[Chain]) -> list[list[float]]:
    """Return the mean log-probability of each node of each chain under a model."""
    from actors.engine import Engine

    engine = Engine(model.path, config.actors, config.run.device, model.end_token_ids)
    try:
        logprobs: list[Float32Array] = engine.prompt_logprobs([chain.token_ids for chain in chains])
    finally:
        engine.close()
    return [node_means(chain, own) for chain, own in zip(chains, logprobs, strict=True)]
