"""The stage `search` of a training run: the trees of `rlsys search`, then the files of `rlsys extract`.

stages/search/trees/, search.json   as in the run directory of a search, with the digest of the policy
stages/search/data/                 what the stages after it train on
stages/search/stage.json            written last: what the stage was asked for, and its figures
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsys.config.compare import extraction_request
from rlsys.config.schema import Config
from rlsys.control.dispatch import TreePool
from rlsys.control.tree_search import Search, deciding_fields, open_trees
from rlsys.directory import SearchDirectory
from rlsys.display import Display
from rlsys.errors import CheckpointError, DataError, InterruptedRunError
from rlsys.files import read_json, write_json
from rlsys.models.folder import ModelFolder, weights_digest
from rlsys.search import export as extraction
from rlsys.search.stats import TreeFigures
from rlsys.search.store import check_origin
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Prompt

POLICY = "the policy that the stage search begins with"


@dataclass(frozen=True, kw_only=True)
class GrownSearch:
    """The stage `search` over actors that grow trees; see `rlsys.control.parts.SearchStage`.

    folder: of the stage. model: the initial policy, whose tokenizer all policies share. prompts: all to grow trees for.
    inputs: digests of what decides the trees beside the config and the policy.
    """

    config: Config
    folder: Path
    model: ModelFolder
    prompts: Sequence[Prompt]
    inputs: Mapping[str, str]
    pool: TreePool
    display: Display

    def is_complete(self, policy: Path) -> bool:
        """Whether all of it was done before, by this very policy.

        Raises:
            ConfigError, DataError: the folder holds trees that another policy, model or config has grown.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        check_origin(self.folder, deciding_fields(self.config), self._inputs(policy))
        return self._done() is not None

    async def run(self, policy: Path, stop: asyncio.Future[str]) -> Mapping[str, float]:
        """Grow the missing trees and extract their data, unless that is done; answers with the figures of both.

        Raises:
            InterruptedRunError: `stop` has the name of a signal and trees are missing; finished ones are kept.
            TooManyFailuresError: more trees or verifications failed than search.max_failed_trees.
        """
        done = self._done()
        if done is not None:
            return done
        inputs = await asyncio.to_thread(self._inputs, policy)  # reads all weights
        search = open_trees(self.config, self.folder, self.prompts, inputs)
        if search.missing():
            await self._grow(search, inputs[POLICY], stop)
        self.display.message("extracting the data of the trees")
        source = extraction.source_of(self.config, SearchDirectory(self.folder).trees, self.model)
        report = await asyncio.to_thread(extraction.run, source, SearchDirectory(self.folder).data)
        figures = _figures(search.trees, report)
        write_json(SearchDirectory(self.folder).stage_record, {"asked": self._asked(), "figures": figures})
        return figures

    async def _grow(self, search: Search, policy: str, stop: asyncio.Future[str]) -> None:
        def end(asked: asyncio.Future[str]) -> None:
            if not asked.cancelled():
                search.stop(asked.result())

        stop.add_done_callback(end)
        try:
            await search.run(_NamingPool(self.pool, policy), self.display)
        except InterruptedRunError:
            left = len(search.missing())
            self.display.message(f"{len(self.prompts) - left} of {len(self.prompts)} trees are kept")
            raise InterruptedRunError(stop.result()) from None
        finally:
            stop.remove_done_callback(end)

    def _done(self) -> dict[str, float] | None:
        """The figures of the finished stage; None where it is not, or was asked for something else."""
        path = SearchDirectory(self.folder).stage_record
        if not path.exists():
            return None
        try:
            found = read_json(path)
            asked, figures = found["asked"], {name: float(value) for name, value in found["figures"].items()}
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}: damaged; remove it, and the data are extracted again") from None
        whole = (SearchDirectory(self.folder).report).is_file()
        return figures if whole and asked == self._asked() else None

    def _asked(self) -> dict[str, Any]:
        return extraction_request(self.config, len(self.prompts))

    def _inputs(self, policy: Path) -> dict[str, str]:
        return {**self.inputs, POLICY: weights_digest(policy)}


class _NamingPool:
    """Actors whose trees name the policy of the stage, in place of the one that their engines were started with."""

    def __init__(self, pool: TreePool, policy: str) -> None:
        self._pool, self._policy = pool, policy
        self.count = pool.count
        self.engine_stats, self.reset_engine_stats = pool.engine_stats, pool.reset_engine_stats

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        tree = await self._pool.grow(actor, prompt)
        if isinstance(tree, Tree) and "policy" in tree.models:
            return replace(tree, models={**tree.models, "policy": self._policy})
        return tree


def _figures(trees: TreeFigures, report: Mapping[str, Any]) -> dict[str, float]:
    """Names of rlsys.run.metrics. The trees alone decide them."""
    rows = report["rows"]
    found = {
        "trees": len(trees.solved),
        "solved": trees.solved_fraction or 0.0,
        "simulations": trees.simulations,
        "calls": trees.calls,
        "tokens": trees.tokens,
        "scored": trees.scored,
        "correct": trees.correct,
        "pairs": rows["preferences"],
        "step_preferences": rows["step_preferences"],
        "demonstrations": rows["supervised"],
    }
    return {f"search/{name}": float(value) for name, value in found.items()}
