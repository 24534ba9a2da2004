"""The stage `search` of a training run: the trees of `rlsys search`, then the files of `rlsys extract`.

stages/search/trees/, search.json   as in the run directory of a search, with the digest of the policy
stages/search/data/                 the data that later stages train on
stages/search/stage.json            written last: the request of the stage, and its metrics
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsys.config.compare import extraction_request
from rlsys.config.schema import Config
from rlsys.config.stages import StagePlan
from rlsys.control.dispatch import TreePool
from rlsys.control.rollout_details import tree_example
from rlsys.control.stages.start import start_stage
from rlsys.control.stop_request import StopRequest
from rlsys.control.training_run import TrainingRun
from rlsys.control.tree_search import Search, check_answers, deciding_fields, open_trees
from rlsys.directory import RunDirectory, SearchDirectory
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


class SearchLoop:
    """Loop of the stage that grows trees with the present policy and extracts their data.

    No weights change, and finished work is not repeated.
    """

    def __init__(self, run: TrainingRun, plan: StagePlan) -> None:
        self._run, self._plan = run, plan

    async def run(self) -> None:
        """Do the missing work of the stage and log its metrics."""
        run, context = self._run, self._run.context
        assert context.search is not None  # noqa: S101 - given whenever the config names the stage
        policy = run.newest_policy
        if not await asyncio.to_thread(context.search.is_complete, policy):
            await start_stage(run, self._plan)
            await run.publish_if_new()
            run.stop.check()
        metrics = await context.search.run(policy, run.stop)
        context.metrics.log("search", 0, run.state.weight_version, metrics)
        texts = await asyncio.to_thread(tree_example, RunDirectory(context.run_dir).search_stage)
        context.metrics.show(run.state.weight_version, texts=texts)


@dataclass(frozen=True, kw_only=True)
class TreeSearchStage:
    """The `rlsys.control.run_context.SearchStage` of a run, whose actors grow the trees.

    Attributes:
        folder: the folder of the stage.
        model: the initial policy, whose tokenizer all policies share.
        prompts: all prompts to grow trees for.
        inputs: digests of the data and models that decide the trees, besides config and policy.
    """

    config: Config
    folder: Path
    model: ModelFolder
    prompts: Sequence[Prompt]
    inputs: Mapping[str, str]
    pool: TreePool
    display: Display

    def is_complete(self, policy: Path) -> bool:
        """Return whether the stage is already finished, with this policy.

        Raises:
            ConfigError, DataError: the folder holds trees that another policy, model or config has grown.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        check_origin(self.folder, deciding_fields(self.config), self._inputs(policy))
        return self._recorded_metrics() is not None

    async def run(self, policy: Path, stop: StopRequest) -> Mapping[str, float]:
        """Grow the missing trees and extract their data, unless both are done. Return their metrics.

        Raises:
            InterruptedRunError: the run was asked to stop and trees are missing; finished ones are kept.
            TooManyFailuresError: more trees or verifications failed than search.max_failed_trees, or no tree has a
                scored answer.
        """
        recorded = self._recorded_metrics()
        if recorded is not None:
            return recorded
        inputs = await asyncio.to_thread(self._inputs, policy)  # reads all weights
        search = open_trees(self.config, self.folder, self.prompts, inputs)
        if search.missing():
            await self._grow(search, inputs[POLICY], stop)
        for note in check_answers(self.config, search.trees):
            self.display.message(note)
        self.display.message("extracting the data of the trees")
        directory = SearchDirectory(self.folder)
        source = extraction.source_of(self.config, directory.trees, self.model)
        report = await asyncio.to_thread(extraction.run, source, directory.data)
        metrics = _metrics(search.trees, report)
        write_json(directory.stage_record, {"asked": self._request(), "figures": metrics})
        return metrics

    async def _grow(self, search: Search, policy: str, stop: StopRequest) -> None:
        try:
            with stop.calling(search.stop):
                await search.run(_NamingPool(self.pool, policy), self.display)
        except InterruptedRunError:
            missing = len(search.missing())
            self.display.message(f"{len(self.prompts) - missing} of {len(self.prompts)} trees are kept")
            stop.check()
            raise

    def _recorded_metrics(self) -> dict[str, float] | None:
        """Return the metrics of the finished stage, or None if this request is not finished."""
        directory = SearchDirectory(self.folder)
        path = directory.stage_record
        if not path.exists():
            return None
        try:
            record = read_json(path)
            request, metrics = record["asked"], {name: float(value) for name, value in record["figures"].items()}
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}: damaged; remove it, and the data are extracted again") from None
        return metrics if directory.report.is_file() and request == self._request() else None

    def _request(self) -> dict[str, Any]:
        return extraction_request(self.config, len(self.prompts))

    def _inputs(self, policy: Path) -> dict[str, str]:
        return {**self.inputs, POLICY: weights_digest(policy)}


class _NamingPool:
    """Actors whose trees name the policy of the stage instead of the one that their engines were started with."""

    def __init__(self, pool: TreePool, policy: str) -> None:
        self._pool, self._policy = pool, policy
        self.count = pool.count
        self.engine_stats, self.reset_engine_stats = pool.engine_stats, pool.reset_engine_stats

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        tree = await self._pool.grow(actor, prompt)
        if isinstance(tree, Tree) and "policy" in tree.models:
            return replace(tree, models={**tree.models, "policy": self._policy})
        return tree


def _metrics(trees: TreeFigures, report: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics by names of rlsys.run.metrics. They depend on the trees alone."""
    rows = report["rows"]
    values = {
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
    return {f"search/{name}": float(value) for name, value in values.items()}
