"""The trees of one folder: read the finished trees, and grow the missing ones."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.engine_roles import section_of, trees_ahead
from rlsys.config.environment import active_environment
from rlsys.config.files import flat_fields, select_fields
from rlsys.config.patterns import resolve
from rlsys.config.schema import Config
from rlsys.config.search_values import ModelValueConfig
from rlsys.control.budgets import FailureLimit
from rlsys.control.dispatch import TreePool, grow
from rlsys.data.inputs import Inputs
from rlsys.errors import InterruptedRunError, TooManyFailuresError
from rlsys.interfaces import Task
from rlsys.models.folder import ModelFolder
from rlsys.search.stats import EngineFigures, StepCheck, TreeFigures, prefix_hit_rate
from rlsys.search.store import TreeStore, check_origin
from rlsys.tasks import build_task
from rlsys.trees import TEXT, Role, Tree, TreeFailure
from rlsys.types import Prompt

# Fields that decide the content of a tree. Every key of `search` is among them unless FREE names it.
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
# Fields of `search` that do not change the content of a tree. Paths of models are compared by digest.
FREE = (
    "search.fraction",
    "search.unsolved",
    "search.prompts",
    "search.max_failed_trees",
    *(f"search.{name}.{key}" for name in ("model", "reviewer", "value") for key in ("path", "max_num_seqs")),
    *(f"search.{name}.kv_cache_gib" for name in ("model", "reviewer", "value")),
    *(f"search.{name}.count" for name in ("model", "reviewer")),
)
STATS_INTERVAL_S = 5.0
DEMONSTRATIONS = 256
"""Demonstrations that are read for the tags of the node types."""
ENOUGH_VERIFICATIONS = 500
"""Minimum number of verifications before their failures can end a search. Trees finish in any order, so the failures
may come first."""


class TreeDisplay(Protocol):
    """Display of a search under way; see `rlsys.display.Display`."""

    def trees(self, total: int, done: int) -> None: ...

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def update(self, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...


class Search:
    """The trees of one run directory. It reads the finished trees and grows the missing ones.

    Args:
        prompts: all prompts of the search, in order.
        share: search.max_failed_trees.
        ahead: trees that one actor holds at once.
        check_steps: judges the steps of chains, for the figures; None to judge none.
    Raises:
        TooManyFailuresError: more of the finished trees failed than allowed, or all trees are finished and more
            verifications failed than allowed.
    """

    def __init__(
        self,
        run_dir: Path,
        prompts: Sequence[Prompt],
        *,
        shard_size: int,
        share: float,
        ahead: int,
        check_steps: StepCheck | None = None,
    ) -> None:
        self._prompts, self._ahead = prompts, ahead
        self.trees, self.engines, self.wall_s = TreeFigures(check_steps=check_steps), EngineFigures(), 0.0
        field = "search.max_failed_trees"
        self._failed_trees = FailureLimit(noun="trees", field=field, share=share, total=len(prompts))
        self._failed_verdicts = FailureLimit(noun="verifications", field=field, share=share)
        self._store = TreeStore(run_dir, shard_size, [prompt.prompt_id for prompt in prompts], self._count)
        self._before = len(prompts) - len(self._store.missing())
        self._stopped_by = ""
        self._failed_trees.check()
        if not self.missing():
            self._failed_verdicts.check()

    def missing(self) -> list[int]:
        """Return the numbers of the prompts without a tree."""
        return self._store.missing()

    @property
    def grown(self) -> int:
        """Trees that this object has grown."""
        return len(self._prompts) - len(self.missing()) - self._before

    def stop(self, name: str) -> None:
        """Do not begin further trees, because of the signal `name`."""
        self._stopped_by = name

    async def run(self, pool: TreePool, display: TreeDisplay) -> None:
        """Grow the missing trees and store each one as soon as it is finished.

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
        """Add up and show the engine stats at intervals, and once after the last tree."""
        while not grown.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(grown.wait(), STATS_INTERVAL_S)
            stats = await pool.engine_stats()
            self.engines.add(stats)
            wall_s, hits = max((engine.wall_s for engine in stats), default=0.0), prefix_hit_rate(stats)
            rates = {"search/tokens_per_s": sum(engine.generated_tokens for engine in stats) / wall_s} if wall_s else {}
            display.update(rates | ({} if hits is None else {"search/prefix_hits": hits}))

    def _count(self, number: int, tree: Tree | TreeFailure) -> None:
        self.trees.add(number, tree)
        if isinstance(tree, TreeFailure):
            self._failed_trees.count(failed=1, total=0, details=[f"{tree.prompt_id}: {tree.reason}"])
            return
        verdicts = [node.verdict for node in tree.nodes if node.verdict is not None]
        failed = [f"{tree.prompt_id}: {v.detail}" for v in verdicts if v.outcome in ("error", "timeout")]
        self._failed_verdicts.count(failed=len(failed), total=len(verdicts), details=failed)
        lost, values = tree.failed_values, tree.counts.get("values", 0)
        detail = f"{tree.prompt_id}: values of {lost} nodes failed, see the log of its actor"
        self._failed_verdicts.count(failed=lost, total=values, details=[detail] if lost else [])


def check_answers(config: Config, figures: TreeFigures) -> list[str]:
    """Return a note for every node type of which no node came whole.

    Raises:
        TooManyFailuresError: there are trees, and none has a scored answer.
    """
    types = written_tags(config)
    missing = figures.never_whole(types) if figures.solved else {}
    notes = [f"no node of type {name} (tag <{types[name]}>) came whole: {why}" for name, why in missing.items()]
    if figures.solved and not figures.scored:
        unread = figures.defective.get(TEXT)
        texts = f"; texts without a known tag: {unread.total():,}" if unread else ""
        raise TooManyFailuresError(
            f"none of {len(figures.solved)} trees has a scored answer: {'; '.join(notes)}{texts}. Compare the tags of "
            "search.nodes and search.patterns with what the model writes: a warm start on such chains teaches them"
        )
    return notes


def written_tags(config: Config) -> dict[str, str]:
    """Return the tags of the node types that a model writes, by type; without those that backtracking alone begins."""
    search = config.search
    return {
        name: node.tag
        for pattern in resolve(search).values()
        for name, node in pattern.types.items()
        if node.writer != "nobody" and (search.backtracking or any(name in row for row in pattern.children.values()))
    }


def demonstration_notes(config: Config, task: Task) -> list[str]:
    """Return a note for every node type whose tag the demonstrations of the task lack.

    There is none without demonstrations, and none for node expansion, in which the search writes the opening tags.
    """
    size = task.size("train")
    count = DEMONSTRATIONS if size is None else min(size, DEMONSTRATIONS)
    shown = [task.demonstration(index, random.Random(index)) for index in range(count)]
    texts = "".join(piece for each in shown if each for piece in each[1])
    if not texts or config.search.expansion == "node":
        return []
    return [
        f"search.nodes.{name}: the task's demonstrations have no tag <{tag}>; a model that learned from them alone "
        "will write no such node"
        for name, tag in written_tags(config).items()
        if f"<{tag}>" not in texts
    ]


def open_trees(config: Config, folder: Path, prompts: Sequence[Prompt], inputs: Mapping[str, str]) -> Search:
    """Check that a folder holds no trees of another search, and read its trees.

    Args:
        inputs: digests of files and models that the config names, by config field.
    Raises:
        ConfigError, DataError: the folder holds another search or damaged files; nothing was changed.
        TooManyFailuresError: more of the finished trees failed than allowed.
    """
    check_origin(folder, deciding_fields(config), inputs)
    return Search(
        folder,
        prompts,
        shard_size=config.search.shard_size,
        share=config.search.max_failed_trees,
        ahead=trees_ahead(config),
        check_steps=build_task(config.task, config.run.seed).check_steps,
    )


def find_prompts(config: Config, inputs: Inputs) -> list[Prompt]:
    """Return the first search.prompts prompts of search.split, or all if there are fewer.

    Raises:
        ConfigError: a prompt leaves too little room for a chain, or too many rows of a data set do.
    """
    return inputs.builder.first(config.search.split, config.search.prompts)


def search_model_digests(models: Mapping[Role, ModelFolder]) -> dict[str, str]:
    """Return digests of the models of a search except the policy, and of their tokenizers, by config field."""
    digests = {}
    for role, model in models.items():
        if role not in ("policy", "teacher"):
            digests[f"{section_of(role)}.path"] = model.digest
            digests[f"the tokenizer of {section_of(role)}.path"] = model.tokenizer_digest
    return digests


def deciding_fields(config: Config) -> dict[str, Any]:
    """Return everything in a config that decides a tree, by dotted name.

    Node types and tables are those that the patterns use, shipped ones included. The order of a table row counts.
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
        if values["search"][key] is not None:  # replaces the value of `sampling`
            del values["sampling"][key]
    environment = ("environment",) if active_environment(config.environment, config.task) else ()
    deciding = select_fields(flat_fields(values), (*DECIDING, *environment))
    judges = {"search.value.count"} if isinstance(config.search.value, ModelValueConfig) else set()  # or of rollouts
    return {name: value for name, value in deciding.items() if name not in {*FREE, *judges}}
