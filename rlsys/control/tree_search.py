"""The trees of one folder: those that are there, how the missing ones are grown, and what decides them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.engine_roles import trees_ahead
from rlsys.config.files import flat_fields, select_fields
from rlsys.config.patterns import resolve
from rlsys.config.schema import Config
from rlsys.control.budgets import FailureLimit
from rlsys.control.dispatch import TreePool, grow
from rlsys.data.inputs import Inputs
from rlsys.errors import InterruptedRunError
from rlsys.models.folder import model_digest
from rlsys.models.scratch import tokenizer_digest
from rlsys.search.stats import EngineFigures, TreeFigures, prefix_hit_rate
from rlsys.search.store import TreeStore, check_origin
from rlsys.trees import Role, Tree, TreeFailure
from rlsys.types import Prompt

# What decides a tree. Everything in `search` does unless it is named below, so that a new key counts at first.
DECIDING = (
    "run.seed",
    "run.device",
    "task",
    "actors.tensor_parallel_size",
    "actors.dtype",
    "actors.max_model_len",
    "actors.block_size",
    "actors.enforce_eager",
    "sampling",
    "rewards.timeout_s",
    "rewards.memory_mib",
    "search",
)
# The paths of models are not compared, but what they lead to is.
FREE = (
    "search.fraction",
    "search.prompts",
    "search.max_failed_trees",
    *(f"search.{writer}.{key}" for writer in ("model", "reviewer") for key in ("path", "count", "max_num_seqs")),
    *(f"search.{writer}.kv_cache_gib" for writer in ("model", "reviewer")),
)
USAGE_INTERVAL_S = 5.0
# Before so many verifications are known, a search under way is not ended for their failures: trees come in any order.
ENOUGH_VERIFICATIONS = 500


class TreeDisplay(Protocol):
    """The display of a search under way; see `rlsys.display.Display`."""

    def trees(self, total: int, done: int) -> None: ...

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def update(self, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...


class Search:
    """The trees of one run directory: those that are there, and how the missing ones are grown.

    Args:
        prompts: all that are asked for, in order.
        share: search.max_failed_trees.
        ahead: trees that one actor holds at once.
    Raises:
        TooManyFailuresError: more trees have failed than allowed, or, where none is missing, more verifications.
    """

    def __init__(self, run_dir: Path, prompts: Sequence[Prompt], *, shard_size: int, share: float, ahead: int) -> None:
        self._prompts, self._ahead = prompts, ahead
        self.trees, self.engines, self.wall_s = TreeFigures(), EngineFigures(), 0.0
        field = "search.max_failed_trees"
        self._failed_trees = FailureLimit(what="trees", field=field, share=share, total=len(prompts))
        self._failed_verdicts = FailureLimit(what="verifications", field=field, share=share)
        self._store = TreeStore(run_dir, shard_size, [prompt.prompt_id for prompt in prompts], self._count)
        self._before = len(prompts) - len(self._store.missing())
        self._stopped_by = ""
        self._failed_trees.check()
        if not self.missing():
            self._failed_verdicts.check()

    def missing(self) -> list[int]:
        """Numbers of the prompts that have no tree yet."""
        return self._store.missing()

    @property
    def grown(self) -> int:
        """Trees that this object has added."""
        return len(self._prompts) - len(self.missing()) - self._before

    def stop(self, name: str) -> None:
        """Hand no more trees to the actors, because of the signal `name`."""
        self._stopped_by = name

    async def run(self, pool: TreePool, display: TreeDisplay) -> None:
        """Grow what is missing. Every tree is kept as soon as it is finished.

        A tree's place is decided by its number alone, so that a tree never changes its actor.

        Raises:
            InterruptedRunError: `stop` was called and trees are missing.
            TooManyFailuresError: more trees or verifications failed than allowed.
        """
        missing = self.missing()
        display.trees(len(self._prompts), len(self._prompts) - len(missing))
        await pool.reset_engine_stats()
        started, grown = time.perf_counter(), asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(pool, display, grown))
                await grow(
                    pool,
                    {number: self._prompts[number] for number in missing},
                    self._ahead,
                    lambda number, tree: self._keep(number, tree, display),
                    stopped=lambda: bool(self._stopped_by),
                )
                grown.set()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self.wall_s = time.perf_counter() - started
        if self.missing():
            done = len(self._prompts) - len(self.missing())
            raise InterruptedRunError(
                f"{self._stopped_by}; {done} of {len(self._prompts)} trees are kept, the same command continues"
            )
        self._failed_verdicts.check()

    def _keep(self, number: int, tree: Tree | TreeFailure, display: TreeDisplay) -> None:
        """Store and count a finished tree."""
        self._store.add(number, tree)
        if isinstance(tree, TreeFailure):
            display.message(f"no tree of {tree.prompt_id}: {tree.reason}")
        self._count(number, tree)
        self._failed_trees.check()
        if self._failed_verdicts.total >= ENOUGH_VERIFICATIONS:
            self._failed_verdicts.check()
        solved = self.trees.solved_fraction
        display.step({"search/failed": self.trees.failed} | ({} if solved is None else {"search/solved": solved}))

    async def _watch(self, pool: TreePool, display: TreeDisplay, grown: asyncio.Event) -> None:
        """Ask for the usage now and then, and once when all is grown."""
        while not grown.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(grown.wait(), USAGE_INTERVAL_S)
            usages = await pool.engine_stats()
            self.engines.add(usages)
            wall_s, hits = max((usage.wall_s for usage in usages), default=0.0), prefix_hit_rate(usages)
            rates = {"rollout/tokens_per_s": sum(usage.generated_tokens for usage in usages) / wall_s} if wall_s else {}
            display.update(rates | ({} if hits is None else {"search/prefix_hits": hits}))

    def _count(self, number: int, tree: Tree | TreeFailure) -> None:
        self.trees.add(number, tree)
        if isinstance(tree, TreeFailure):
            self._failed_trees.count(failed=1, total=0, details=[f"{tree.prompt_id}: {tree.reason}"])
            return
        verdicts = [node.verdict for node in tree.nodes if node.verdict is not None]
        failed = [f"{tree.prompt_id}: {v.detail}" for v in verdicts if v.outcome in ("error", "timeout")]
        self._failed_verdicts.count(failed=len(failed), total=len(verdicts), details=failed)


def open_trees(config: Config, folder: Path, prompts: Sequence[Prompt], inputs: Mapping[str, str]) -> Search:
    """Check that a folder holds the trees of this very search, or none yet, and read them.

    Args:
        inputs: digests of what the config only names, by the field that names it.
    Raises:
        ConfigError, DataError: it holds those of another one, or damaged files; nothing was changed.
        TooManyFailuresError: more of the trees that are there have failed than allowed.
    """
    check_origin(folder, deciding_fields(config), inputs)
    return Search(
        folder,
        prompts,
        shard_size=config.search.shard_size,
        share=config.search.max_failed_trees,
        ahead=trees_ahead(config),
    )


def find_prompts(config: Config, inputs: Inputs) -> list[Prompt]:
    """The first search.prompts prompts of search.split, or all where there are fewer.

    Raises:
        ConfigError: one leaves too little room for a chain.
    """
    split, count = config.search.split, config.search.prompts
    size = inputs.builder.task.size(split)
    return [inputs.builder.build(split, number) for number in range(count if size is None else min(count, size))]


def writer_digests(models: Mapping[Role, Path]) -> dict[str, str]:
    """Digests of the models beside the policy, by config field."""
    found = {}
    for writer, folder in models.items():
        if writer != "policy":
            found[f"search.{writer}.path"] = model_digest(folder)
            found[f"the tokenizer of search.{writer}.path"] = tokenizer_digest(folder)
    return found


def deciding_fields(config: Config) -> dict[str, Any]:
    """Everything in a config that decides a tree, by dotted name.

    Of node types and tables only those that the patterns use, the shipped ones included; the order of a row counts.
    """
    values = config.model_dump(mode="json")
    patterns = resolve(config.search)
    types = {name: node for pattern in patterns.values() for name, node in pattern.types.items()}
    values["search"]["nodes"] = {name: node.model_dump(mode="json") for name, node in types.items()}
    values["search"]["tables"] = {
        name: {
            "children": {parent: [[*child] for child in row.items()] for parent, row in pattern.children.items()},
            "after_wrong": {parent: [[*child] for child in row.items()] for parent, row in pattern.after_wrong.items()},
        }
        for name, pattern in patterns.items()
    }
    for key in ("temperature", "top_p"):
        if values["search"][key] is not None:  # it takes the place of the other
            del values["sampling"][key]
    found = select_fields(flat_fields(values), DECIDING)
    return {name: value for name, value in found.items() if name not in FREE}
