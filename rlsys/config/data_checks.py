"""Check the rules of the steps that change data: masks of chains, and which nodes of them are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.config.environment import active_environment
from rlsys.config.patterns import resolve

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def masked_chains_are_rows(config: Config) -> None:
    """Raise if chains are to be masked and no stage has supervised rows."""
    sft = config.objective.sft
    online = "online" in config.stages and sft.used and sft.source != "chosen"
    if sft.mask_share and not online and not {"warm_start", "sft"} & set(config.stages):
        raise ValueError(
            "objective.sft.mask_share has no effect: the sides of pairs are never masked; add the stage warm_start or "
            "sft, use objective.sft.source trees, demonstrations or file in the stage online, or leave mask_share out"
        )


def extracted_nodes_exist(config: Config) -> None:
    """Raise if the extraction names a node type that no tree has."""
    known = sorted({name for pattern in resolve(config.search).values() for name in pattern.types})
    for field in ("supervised_nodes", "skip"):
        for name in getattr(config.extract, field):
            if name not in known:
                raise ValueError(
                    f"extract.{field}: unknown node type {name!r}; search.patterns have {', '.join(known)}"
                )


def divergence_has_scores(config: Config) -> None:
    """Raise if chains are to be selected by scores where nothing scores them."""
    online = "online" in config.stages and config.search.online
    if config.extract.supervised == "divergence" and (online or "search" in config.stages):
        raise ValueError(
            "extract.supervised divergence is for `rlsys extract` after `rlsys score`, and no stage scores its chains: "
            "choose another rule, or extract first and set sft.path"
        )


def answers_are_judged(config: Config) -> None:
    """Raise if nothing judges the completions of a data set without reference answers."""
    is_judged = config.rewards.functions or active_environment(config.environment, config.task)
    if config.task.type == "dataset" and config.task.answer_column is None and not is_judged:
        raise ValueError(
            "task.answer_column null: nothing judges the completions; name functions in rewards.functions "
            "(docs/rewards.md), an environment, or the column with the reference answer"
        )
