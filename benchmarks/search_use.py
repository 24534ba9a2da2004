"""Solved fraction against generated tokens per prompt: tree searches and independent samples, on several tasks.

`python benchmarks/search_use.py [--tasks letter_count ...] [--arms NAME ...] [--write]`

Every arm of a task has the same policy, the same held-out prompts and the same sampling temperature. A search, or a
sequence of samples, ends at its first right answer or at the largest budget, because later tokens cannot change the
result. All generated tokens of a prompt count. Opening tags and prefixes that the search puts into a chain are not
generated. Every seed has different problems and different random draws; the policy is the same. Each arm and seed is a
file of the folder, and no file is made twice. There is no limit to meet: the tables are the result.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import search_page  # noqa: E402
from cells import trained  # noqa: E402

from rlsys.config.engine_roles import Searching  # noqa: E402
from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.schema import Config  # noqa: E402
from rlsys.control.search_evaluation import SearchPool, grow_trees, sample_until, sampling_of  # noqa: E402
from rlsys.data.inputs import Inputs  # noqa: E402
from rlsys.files import write_json  # noqa: E402
from rlsys.interfaces import Task  # noqa: E402
from rlsys.launch.placement import place  # noqa: E402
from rlsys.launch.ray_cluster import Cluster, ray_cluster  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.search.compare import Attempts, sample_attempts, tree_attempts  # noqa: E402
from rlsys.tasks import build_task  # noqa: E402
from rlsys.tasks.generated import GeneratedTask  # noqa: E402
from rlsys.trees import Tree, TreeFailure  # noqa: E402
from rlsys.types import Prompt, Trajectory  # noqa: E402

SAMPLES = search_page.SAMPLES
CHAIN, NODE = (
    ["search.patterns=[chain]", "search.expansion=chain"],
    ["search.patterns=[narrow]", "search.expansion=node"],
)
ONCE = ["search.backtracking=true", "search.max_backtracks=1"]
NEVER = ["search.backtracking=false"]
ARMS: Mapping[str, Sequence[str]] = {
    "surprise, token": [*CHAIN, *NEVER, "search.selection={type: surprise}"],
    "surprise, token, 8 at once": [
        *CHAIN,
        *NEVER,
        "search.selection={type: surprise}",
        "search.parallel_simulations=8",
    ],
    "surprise, token, step check": [*CHAIN, *NEVER, "search.selection={type: surprise}", "search.value={type: steps}"],
    "surprise, node": [*CHAIN, *NEVER, "search.selection={type: surprise, unit: node}"],
    "chain, UCB": [*CHAIN, *NEVER, "search.selection={type: ucb}"],
    "chain, UCB, backtracking once": [*CHAIN, *ONCE, "search.selection={type: ucb}"],
    "node, PUCT": [*NODE, *NEVER, "search.selection={type: puct}"],
    "node, UCB": [*NODE, *NEVER, "search.selection={type: ucb}"],
}


@dataclass(frozen=True, slots=True)
class Setup:
    """A task of the benchmark.

    Attributes:
        warm_start: Config whose warm start makes the policy.
        search: Config of the searches.
        budgets: Generated tokens per prompt.
    """

    warm_start: str
    search: str
    budgets: tuple[int, ...]


HARD_BUDGETS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
TASKS: Mapping[str, Setup] = {
    "letter_count": Setup("quickstart", "search_letter_count", (32, 48, 64, 96, 128, 192, 256, 384, 512)),
    "hard_letter_count": Setup("hard_letter_count", "search_hard_letter_count", HARD_BUDGETS),
    "hard_blocksworld": Setup("hard_blocksworld", "search_hard_blocksworld", HARD_BUDGETS),
    "countdown": Setup("countdown", "search_countdown", HARD_BUDGETS),
    "sums": Setup("sums", "search_sums", HARD_BUDGETS),
}


def find_policy(setup: Setup, folder: Path) -> Path:
    """Return the warm start of a task's config: that of the config's own run, or one in `folder`, made if missing."""
    config = ROOT / "configs" / f"{setup.warm_start}.yaml"
    own = Path(load_config(config, []).run.dir) / "stages" / "warm_start"
    if own.is_dir():
        return own.absolute()
    run_dir = folder.absolute() / setup.warm_start
    trained(run_dir, config, ["stages=[warm_start]", "evaluation.prompts=16", "evaluation.samples=0"])
    return run_dir / "stages" / "warm_start"


def config_of(setup: Setup, policy: Path, arm: Sequence[str]) -> Config:
    """Return the config of an arm. The limit of simulations is never reached, as nearly all of them generate tokens."""
    most = max(setup.budgets)
    return load_config(
        ROOT / "configs" / f"{setup.search}.yaml",
        [
            f"model.path={policy}",
            "evaluation.search_answers=4",  # samples of one dispatch; unsolved prompts get more
            f"search.stop={{simulations: {most}, tokens: {most}, correct: [{{count: 1}}]}}",
            "search.parallel_simulations=1",  # each knows the results of all earlier ones
            *arm,
        ],
    )


def prompts_of(config: Config, policy: Path, seed: int, count: int) -> list[Prompt]:
    """Return the held-out prompts of a seed. Their ids include the seed, because the ids seed the sampling."""
    evaluation = config.evaluation.model_copy(update={"prompts": count})
    run = config.run.model_copy(update={"seed": seed})
    own = config.model_copy(update={"run": run, "evaluation": evaluation})
    prompts = Inputs(own, ModelFolder(policy), training=False).held_out
    return [replace(prompt, prompt_id=f"seed-{seed}/{prompt.prompt_id}") for prompt in prompts]


class Cells:
    """The attempts of one arm, a file for each seed.

    A file is made again if the weights, a setting or the number of prompts differ. Other code or other defaults do not
    make it again.

    Args:
        arm: Name of the arm.
        folder: Folder of the task.
        count: Prompts of a seed.
    """

    def __init__(self, arm: str, folder: Path, config: Config, policy: Path, count: int) -> None:
        self.arm, self.config, self.policy, self.count = arm, config, policy, count
        self._folder = folder / arm.replace(", ", "-").replace(" ", "_")
        weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(policy.glob("*.safetensors"))]
        settings = config.model_dump_json(include={"task", "search", "sampling"}, exclude_defaults=True)
        self.asked = [*weights, hashlib.sha256(settings.encode()).hexdigest(), str(count)]

    def read(self, seed: int) -> list[Any] | None:
        """Return the rows of a seed; None if they were not made, or with another policy or other settings."""
        path = self._path(seed)
        found = json.loads(path.read_text()) if path.exists() else {}
        rows: list[Any] | None = found.get("rows") if found.get("asked") == self.asked else None
        return rows

    async def make(self, pool: SearchPool, seed: int) -> None:
        """Make the rows of a seed."""
        started, task = time.perf_counter(), build_task(self.config.task, self.config.run.seed)
        prompts = prompts_of(self.config, self.policy, seed, self.count)
        if self.arm == SAMPLES:
            tokenizer, limit = ModelFolder(self.policy).tokenizer, self.config.train.max_verifier_failures
            drawn = await sample_until(pool, prompts, sampling_of(self.config), self.enough, limit)
            rows = [
                self.samples_row(task, prompt, each, tokenizer) for prompt, each in zip(prompts, drawn, strict=True)
            ]
        else:
            rows = [self.tree_row(task, tree) for tree in await grow_trees(pool, prompts, self.config)]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(seed), {"asked": self.asked, "rows": rows})
        tokens, seconds = sum(row["total"] for row in rows), time.perf_counter() - started
        print(f"{self._folder.parent.name}, {self.arm}, seed {seed}: {tokens:,} tokens in {seconds:.0f} s", flush=True)

    def enough(self, drawn: Attempts) -> bool:
        """Return whether a prompt needs no more samples."""
        return drawn.total >= max(self.config.search.stop.tokens or 0, 1) or bool(drawn.right.any())

    def tree_row(self, task: Task, tree: Tree | TreeFailure) -> Any:
        """Return the attempts of a tree, and whether its first right chain has every step right."""
        attempts = tree_attempts(tree)
        chains = [tree.completion(n) for n in tree.answers() if tree.nodes[n].correct] if isinstance(tree, Tree) else []
        return _row(attempts, all_right(task, tree.question, chains[0]) if isinstance(tree, Tree) and chains else None)

    def samples_row(self, task: Task, prompt: Prompt, drawn: Sequence[Trajectory], tokenizer: Any) -> Any:
        """Return the attempts of independent samples, and whether the first right one has every step right."""
        right = [t for t in drawn if t.correct][:1]
        texts = [tokenizer.decode(t.token_ids[len(prompt.token_ids) :], skip_special_tokens=True) for t in right]
        return _row(sample_attempts(drawn), all_right(task, prompt.question, texts[0]) if texts else None)

    def _path(self, seed: int) -> Path:
        return self._folder / f"seed-{seed}.json"


def all_right(task: Task, question: Any, chain: str) -> bool | None:
    """Return whether every step of a chain is right; None if the task cannot tell."""
    verdict = task.check_steps(question, chain)
    return None if verdict is None else verdict.wrong_node is None


def _row(attempts: Attempts, sound: bool | None) -> dict[str, Any]:
    first = attempts.tokens[attempts.right]
    return {"solved_at": int(first[0]) if len(first) else None, "total": attempts.total, "sound": sound}


def problems_of(cell: Cells, seeds: Sequence[int]) -> list[list[str]]:
    """Return what the problem of each prompt is apart from names, by seed."""
    task = build_task(cell.config.task, cell.config.run.seed)
    assert isinstance(task, GeneratedTask)
    prompts = [prompts_of(cell.config, cell.policy, seed, cell.count) for seed in seeds]
    return [[task.identity(str(prompt.question)) for prompt in each] for each in prompts]


async def measure(cells: Sequence[Cells], seeds: Sequence[int], run_dir: Path) -> None:
    """Make the missing cells of a task."""
    missing = {cell: [seed for seed in seeds if cell.read(seed) is None] for cell in cells}
    missing = {cell: left for cell, left in missing.items() if left}
    if not missing:
        return
    first = next(iter(missing)).config
    with ray_cluster(first, run_dir, place(first).bundles) as cluster:
        for cell, left in missing.items():
            await _make(cell, left, replace(cluster, config=cell.config))


async def _make(cell: Cells, seeds: Sequence[int], cluster: Cluster) -> None:
    """Make cells of an arm. Ray frees the resources of the actors once nothing holds their handles."""
    from rlsys.launch.start import rollout_pool

    async with rollout_pool(cluster, cell.policy, Searching()) as pool:
        for seed in seeds:
            await cell.make(pool, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Solved fraction against tokens: tree search, independent samples.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="besides the samples")
    parser.add_argument("--prompts", type=int, default=512, help="number of held-out prompts of a seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--folder", type=Path, default=Path("runs/search_use"))
    parser.add_argument("--write", action="store_true", help=f"write the figures of {search_page.PAGE.name}")
    arguments = parser.parse_args()
    found: dict[str, search_page.Figures] = {}
    for name in arguments.tasks:
        setup, own = TASKS[name], arguments.folder / name
        policy = find_policy(setup, arguments.folder / "policies")
        arms = {arm: ARMS[arm] for arm in arguments.arms} | {SAMPLES: CHAIN}
        cells = [
            Cells(arm, own, config_of(setup, policy, keys), policy, arguments.prompts) for arm, keys in arms.items()
        ]
        with tempfile.TemporaryDirectory() as run_dir:
            asyncio.run(measure(cells, range(arguments.seeds), Path(run_dir)))
        rows = {cell.arm: [cell.read(seed) or [] for seed in range(arguments.seeds)] for cell in cells}
        found[name] = search_page.Figures(name, setup.budgets, rows, problems_of(cells[-1], range(arguments.seeds)))
        print("\n".join(found[name].lines()))
    if arguments.write:
        search_page.write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
